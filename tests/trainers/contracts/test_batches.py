"""Whole batches as trainers take them: each row where its token is, whichever side is padded, and harmless pads.

Axes: B rows and S columns of a batch, N = B * S, L MoE layers, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from documented import DOCUMENTED, shorter, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import Case
from traces import make_trace, refused

from moetrace.errors import (
    FormatError,
    InvalidTraceError,
    LayoutMismatchError,
    MissingRowError,
    ReplayError,
    TokenMismatchError,
)
from moetrace.layout import MoeLayout
from moetrace.replayer import align
from moetrace.trainers.contracts import (
    AUTOMODEL,
    MAXTEXT,
    NEMO_RL,
    SKYRL_BATCH,
    VERL,
    BatchContract,
    from_automodel,
    from_skyrl_batch,
    to_automodel,
    to_skyrl_batch,
)

BATCHES: dict[str, BatchContract] = {
    "verl": VERL,
    "nemo_rl": NEMO_RL,
    "automodel": AUTOMODEL,
    "skyrl": SKYRL_BATCH,
    "maxtext": MAXTEXT,
}
LAST = {name: DOCUMENTED[name].last or "first" for name in BATCHES}
CASE = Case("dense around", 12, 3, (1, 2, 4), 6, 6)
SIDES = {
    "verl": ["left", "right", "both"],
    "nemo_rl": ["right"],
    "automodel": ["left", "right", "both"],
    "skyrl": ["left"],
    "maxtext": ["left", "right", "both"],
}


def lay_out(cases: list[Case], side: str, pad_token: int = 3) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """`input_ids`, `attention_mask` and where each sequence starts in memory, one token at a time."""
    columns = max(case.num_tokens for case in cases) + 2
    ids, mask, starts = [], [], []
    for row, case in enumerate(cases):
        spare = columns - case.num_tokens
        left = {"left": spare, "right": 0, "both": spare // 2}[side]
        ids.append([pad_token] * left + case.tokens + [pad_token] * (spare - left))
        mask.append([0] * left + [1] * case.num_tokens + [0] * (spare - left))
        starts.append(row * columns + left)
    return np.array(ids), np.array(mask), starts


def depth(name: str) -> int | None:
    return CASE.num_layers if DOCUMENTED[name].every_layer else None


def by_hand(name: str, cases: list[Case], starts: list[int], num_cells: int) -> np.ndarray:
    """`[N, D, K]`, cell for cell."""
    documented = DOCUMENTED[name]
    width = CASE.num_layers if documented.every_layer else len(CASE.layers)
    cells = [[documented.filler(LAST[name], cell, CASE)] * width for cell in range(num_cells)]
    for case, start in zip(cases, starts, strict=True):
        for position, row in enumerate(documented.rows(case, first_row=start).tolist()):
            cells[start + position] = row
    return np.array(cells, documented.dtype(CASE.num_experts))


@pytest.mark.parametrize(("name", "side"), [(name, side) for name, sides in SIDES.items() for side in sides])
def test_a_padded_batch_is_written_and_read(name: str, side: str) -> None:
    cases = [shorter(CASE, length) for length in (4, 7, 1, 6)]
    input_ids, mask, starts = lay_out(cases, side)
    traces = [trace_of(case) for case in cases]
    batch = BATCHES[name].write_batch(traces, torch.from_numpy(input_ids), depth(name), attention_mask=mask)
    expected = by_hand(name, cases, starts, input_ids.size)
    np.testing.assert_array_equal(batch, expected.reshape(*input_ids.shape, *expected.shape[1:]), strict=True)
    captured = [case.num_tokens - 1 for case in cases]
    again = BATCHES[name].read_batch(
        torch.from_numpy(batch), input_ids, CASE.layout, depth(name), attention_mask=mask, captured=captured
    )
    assert again == traces


@pytest.mark.parametrize(("name", "side"), [("nemo_rl", "left"), ("nemo_rl", "both"), ("skyrl", "right")])
def test_padding_where_the_trainer_does_not_look_is_refused(name: str, side: str) -> None:
    cases = [shorter(CASE, 7), shorter(CASE, 5)]
    input_ids, mask, _ = lay_out(cases, side)
    traces = [trace_of(case) for case in cases]
    with refused(ReplayError, "sequence 0 is not where", expected=f"padding on the {SIDES[name][0]} only"):
        BATCHES[name].write_batch(traces, input_ids, 6, attention_mask=mask)
    payload = np.zeros((*input_ids.shape, 6, 3), DOCUMENTED[name].dtype(12))
    with refused(ReplayError, "sequence 0 is not where"):
        BATCHES[name].read_batch(payload, input_ids, CASE.layout, 6, attention_mask=mask, captured=[0, 0])


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_without_padding_needs_no_mask(name: str) -> None:
    input_ids, traces = np.array([CASE.tokens] * 2), [trace_of(CASE)] * 2
    batch = BATCHES[name].write_batch(traces, input_ids, depth(name))
    assert BATCHES[name].read_batch(batch, input_ids, CASE.layout, depth(name), captured=[5, 5]) == traces


@pytest.mark.parametrize("name", ["verl", "automodel", "maxtext"])
def test_a_packed_batch_is_written_and_read(name: str) -> None:
    cases = [shorter(CASE, 4), shorter(CASE, 6)]
    input_ids = np.array([[*cases[0].tokens, *cases[1].tokens, 0, 0]])
    expected = by_hand(name, cases, [0, 4], 12)
    traces = [trace_of(case) for case in cases]
    batch = BATCHES[name].write_batch(traces, input_ids, depth(name), cu_seqlens=[0, 4, 10])
    np.testing.assert_array_equal(batch[0], expected, strict=True)
    again = BATCHES[name].read_batch(batch, input_ids, CASE.layout, depth(name), cu_seqlens=[0, 4, 10], captured=[3, 5])
    assert again == traces


@pytest.mark.parametrize("name", BATCHES)
def test_traces_in_another_order_are_refused(name: str) -> None:
    ids = [[1, 2, 3, 4], [1, 2, 5, 6]]
    traces = [make_trace(tokens, CASE.layout) for tokens in reversed(ids)]
    with refused(TokenMismatchError, "first difference at position 2"):
        BATCHES[name].write_batch(traces, ids, depth(name))


@pytest.mark.parametrize("name", BATCHES)
def test_traces_too_few_or_of_different_models_are_refused(name: str) -> None:
    ids = [[1, 2, 3, 4], [1, 2, 5, 6]]
    traces = [make_trace(tokens, CASE.layout, fingerprint=mark) for tokens, mark in zip(ids, "ab", strict=True)]
    with refused(LayoutMismatchError, "from different models", expected="one fingerprint", got="['a', 'b']"):
        BATCHES[name].write_batch(traces, ids, depth(name))
    with refused(ReplayError, "needs one trace", expected="2 traces", got=1):
        BATCHES[name].write_batch(traces[:1], ids, depth(name))
    with refused(InvalidTraceError, "this is no trace", got="None"):
        BATCHES[name].write_batch([traces[0], None], ids, depth(name))  # type: ignore[list-item]
    other = make_trace(ids[1], MoeLayout((1, 2, 4), 13, 3))
    with refused(LayoutMismatchError, "not that of the batch's first trace"):
        BATCHES[name].write_batch([traces[0], other], ids, depth(name))


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_another_shape_is_refused(name: str) -> None:
    input_ids, traces = np.array([CASE.tokens] * 2), [trace_of(CASE)] * 2
    batch = BATCHES[name].write_batch(traces, input_ids, depth(name))
    for payload in (batch[:1], batch[:, 1:], batch[0], batch.reshape(-1)):
        with refused(FormatError, "does not fit input_ids", expected="[2, 6] and two more", got=list(payload.shape)):
            BATCHES[name].read_batch(payload, input_ids, CASE.layout, depth(name), captured=[5, 5])
    with refused(FormatError, "not one entry for each sequence", expected="2 entries", got=1):
        BATCHES[name].read_batch(batch, input_ids, CASE.layout, depth(name), captured=[5])


@pytest.mark.parametrize("name", ["verl", "nemo_rl", "automodel", "skyrl"])
def test_what_is_captured_must_be_said(name: str) -> None:
    batch = BATCHES[name].write_batch([trace_of(CASE)], [CASE.tokens], depth(name))
    with refused(FormatError, "does not say which of its rows are routes"):
        BATCHES[name].read_batch(batch, [CASE.tokens], CASE.layout, depth(name))


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), name=st.sampled_from(list(BATCHES)), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_cell_without_a_route_holds_different_experts_or_the_mark(
    lengths: list[int], name: str, data: st.DataObject
) -> None:
    cases = [shorter(CASE, length) for length in lengths]
    input_ids, mask, starts = lay_out(cases, data.draw(st.sampled_from(SIDES[name])))
    traces = [trace_of(case) for case in cases]
    batch = BATCHES[name].write_batch(traces, input_ids, depth(name), attention_mask=mask)
    cells = batch.reshape(-1, *batch.shape[2:]).tolist()
    routed = {start + position for start, case in zip(starts, cases, strict=True) for position in case.positions}
    for cell in set(range(len(cells))) - routed:
        for route in cells[cell]:
            assert route == [-1] * 3 if name == "maxtext" else len(set(route)) == 3
            assert all(-1 <= expert < 12 for expert in route)


@pytest.mark.parametrize("name", ["nemo_rl", "maxtext"])
def test_a_missing_row_of_a_batch_is_marked(name: str) -> None:
    word: Any = DOCUMENTED[name].word
    traces = [trace_of(CASE, (0, 3)), trace_of(CASE)]
    with refused(MissingRowError, "needs every row"):
        BATCHES[name].write_batch(traces, [CASE.tokens] * 2, 6)
    batch = BATCHES[name].write_batch(traces, [CASE.tokens] * 2, 6, missing=word)
    assert np.flatnonzero((batch[:, :5] == -1).all(axis=(2, 3))).tolist() == [0, 3]
    assert BATCHES[name].read_batch(batch, [CASE.tokens] * 2, CASE.layout, 6, captured=[5, 5]) == traces


# --- SkyRL's mask ---


def test_skyrl_masks_what_is_not_routed() -> None:
    cases = [shorter(CASE, 4), shorter(CASE, 6)]
    input_ids, mask, _ = lay_out(cases, "left")
    traces = [trace_of(cases[0]), trace_of(cases[1], (1, 4))]
    with refused(MissingRowError, "needs every row", fix="missing='dummy'"):
        to_skyrl_batch(traces, input_ids, 6, attention_mask=mask)
    ids, padding = to_skyrl_batch(traces, input_ids, 6, attention_mask=mask, missing="dummy")
    assert padding.astype(int).tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 1],
        [1, 1, 0, 1, 0, 0, 1, 1],
    ]
    assert (ids[padding] == np.arange(3)).all()
    assert from_skyrl_batch(ids, torch.from_numpy(padding), input_ids, CASE.layout, 6, attention_mask=mask) == traces


def test_skyrl_routes_of_a_later_turn_or_a_longer_context() -> None:
    input_ids = [CASE.tokens]
    ids, padding = to_skyrl_batch([trace_of(CASE).slice(2, 4)], input_ids, 6, missing="dummy")
    assert padding.astype(int).tolist() == [[1, 1, 0, 0, 1, 1]]
    (again,) = from_skyrl_batch(ids, padding, input_ids, CASE.layout, 6)
    assert again.valid_T.tolist() == [False, False, True, True, False]
    _, padding = to_skyrl_batch([trace_of(shorter(CASE, 9))], input_ids, 6)
    assert not padding.any()  # the context was cut: its last token was an input


@pytest.mark.parametrize("mask", [np.zeros((1, 6)), np.zeros((1, 5), bool), np.zeros(6, bool)], ids=["type", "S", "1D"])
def test_skyrl_refuses_another_mask(mask: np.ndarray) -> None:
    ids, _ = to_skyrl_batch([trace_of(CASE)], [CASE.tokens], 6)
    with refused(FormatError, "router_padding_mask does not fit input_ids", expected="bool [1, 6]"):
        from_skyrl_batch(ids, mask, [CASE.tokens], CASE.layout, 6)


# --- Automodel's list ---


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_automodel_gets_what_our_own_replay_uses(side: str) -> None:
    cases = [shorter(CASE, 4), shorter(CASE, 6)]
    input_ids, mask, _ = lay_out(cases, side)
    traces = [trace_of(case) for case in cases]
    gates = to_automodel(traces, input_ids, attention_mask=mask)
    ours = align(traces, input_ids, attention_mask=mask)
    assert [gate.shape for gate in gates] == [(16, 3)] * 3
    for gate, ids_NK in zip(gates, ours.experts_LNK, strict=True):
        assert gate.dtype == np.int64
        assert gate.flags.c_contiguous
        np.testing.assert_array_equal(gate[ours.mode_N == 2], ids_NK[ours.mode_N == 2])
    again = from_automodel(gates, input_ids, CASE.layout, captured=[3, 5], attention_mask=mask)
    assert again == traces


def test_automodel_lists_of_another_form_are_refused() -> None:
    gates = to_automodel([trace_of(CASE)], [CASE.tokens])
    for payload, got in (
        (gates[:2], "2 of [6, 3]"),
        ([*gates, gates[0]], "4 of [6, 3]"),
        ([gate[1:] for gate in gates], "3 of [5, 3]"),
        ([gates[0], gates[1], gates[2][:, :2]], "3 of [6, 2] and [6, 3]"),
        ([], "0 of"),
    ):
        with refused(FormatError, "do not fit input_ids and the model", expected="3 of [6, 3]", got=got):
            from_automodel(payload, [CASE.tokens], CASE.layout, captured=[5])
    with refused(FormatError, "have another type", expected="int64", got="int32"):
        from_automodel([gate.astype(np.int32) for gate in gates], [CASE.tokens], CASE.layout, captured=[5])
