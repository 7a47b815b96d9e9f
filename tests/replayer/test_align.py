"""Rows of traces land exactly where a batch has their tokens, and nowhere else.

Axes: B rows and S columns of a batch, N = B * S tokens in memory order, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import dyed_ids, layouts, make_trace, refused, routing_traces

from moetrace.errors import InvalidTraceError, LayoutMismatchError, MissingRowError, ReplayError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.replayer.align import align
from moetrace.replayer.policy import ReplayPolicy
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.trace import RoutingTrace

PADDING, LIVE, REPLAY = 0, 1, 2
LAYOUT = MoeLayout((1, 2, 5), 16, 2)
examples = settings(max_examples=100, deadline=None)


@dataclass
class Batch:
    """A batch of sequences, and where the test put each of their tokens."""

    input_ids: Any
    arguments: dict[str, Any]
    places: list[list[int]]
    """For each sequence, the flat index of each of its tokens."""
    size: int = 0

    @property
    def num_tokens(self) -> int:
        """N; of what is no array it is known to who made it."""
        return self.size or self.input_ids.size


def lay_out(sequences: list[list[int]], kind: str, filler: int = 99) -> Batch:
    """Put sequences into a batch the slow way, one token at a time."""
    if kind in ("left", "right"):
        columns = max(map(len, sequences)) + 1
        cells, mask, places = [], [], []
        for row, tokens in enumerate(sequences):
            pad = columns - len(tokens)
            first = pad if kind == "left" else 0
            cells += [filler] * first + tokens + [filler] * (pad - first)
            mask += [0] * first + [1] * len(tokens) + [0] * (pad - first)
            places.append([row * columns + first + position for position in range(len(tokens))])
        shape = len(sequences), columns
        return Batch(np.array(cells).reshape(shape), {"attention_mask": np.array(mask).reshape(shape)}, places)
    spare = 2 if kind == "padded between" else 0
    cells, bounds, places = [], [0], []
    positions: list[int] = []
    for tokens in sequences:
        places.append([len(cells) + position for position in range(len(tokens))])
        cells += tokens + [filler] * spare
        positions += range(len(tokens))
        bounds.append(len(cells))
    if kind == "positions":
        return Batch(np.array([cells]), {"position_ids": np.array([positions])}, places)
    if kind == "nested":
        nested = torch.nested.nested_tensor([torch.tensor(tokens) for tokens in sequences], layout=torch.jagged)
        return Batch(nested, {}, places, len(cells))
    if kind == "lists":
        return Batch([np.array(tokens) for tokens in sequences], {}, places, len(cells))
    cells += [filler] * 2  # packed batches are padded at their end
    boundaries: dict[str, Any] = {"cu_seqlens": np.array(bounds, np.int32)}
    if kind == "padded between":
        real = {n for sequence in places for n in sequence}
        boundaries["attention_mask"] = np.array([[int(n in real) for n in range(len(cells))]])
    return Batch(np.array([cells]), boundaries, places)


def slow_align(traces: list[RoutingTrace], batch: Batch) -> tuple[list, list[int], list[bool]]:
    """The definition, one token at a time: experts `[L, N, K]`, mode `[N]`, follows `[N]`."""
    layout = traces[0].layout
    num_tokens = batch.num_tokens
    experts = [[[0] * layout.top_k for _ in range(num_tokens)] for _ in range(layout.num_layers)]
    mode, follows = [PADDING] * num_tokens, [False] * num_tokens
    for trace, places in zip(traces, batch.places, strict=True):
        for position, n in enumerate(places):
            row = position - trace.start
            if 0 <= row < trace.num_rows and trace.valid_T[row]:
                mode[n] = REPLAY
                for layer in range(layout.num_layers):
                    experts[layer][n] = trace.experts_TLK[row, layer].tolist()
                follows[n] = position > 0 and mode[places[position - 1]] == REPLAY
            else:
                mode[n] = LIVE
    return experts, mode, follows


def assert_equal_to_slow(routes: AlignedRoutes, traces: list[RoutingTrace], batch: Batch) -> None:
    experts, mode, follows = slow_align(traces, batch)
    assert routes.mode_N.tolist() == mode
    assert routes.follows_N.tolist() == follows
    assert routes.experts_LNK.tolist() == experts
    who = {n: (number, position) for number, places in enumerate(batch.places) for position, n in enumerate(places)}
    tokens = zip(routes.sequence_N.tolist(), routes.position_N.tolist(), strict=True)
    assert list(tokens) == [who.get(n, (-1, -1)) for n in range(batch.num_tokens)]
    assert routes.experts_LNK.dtype == traces[0].layout.dtype
    assert routes.experts_LNK.flags.c_contiguous
    assert routes.num_tokens == batch.num_tokens
    assert [routes.count(token_mode) for token_mode in TokenMode] == [mode.count(token_mode) for token_mode in range(3)]


KINDS = ["left", "right", "cu_seqlens", "positions", "padded between", "nested", "lists"]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[RoutingTrace], Batch]:
    """Traces of one model, and a batch of their tokens: whole, cut short or gone on."""
    layout = draw(layouts())
    fingerprint = draw(st.sampled_from(["", "f00d"]))
    traces, sequences = [], []
    for _ in range(draw(st.integers(1, 4))):
        trace = replace(draw(routing_traces(layout, max_rows=6)), fingerprint=fingerprint)
        assert trace.tokens is not None
        tokens = trace.tokens.tolist()
        change = draw(st.sampled_from(["whole", "cut", "on"]))
        if change == "on" or not tokens:
            tokens = tokens + draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
        elif change == "cut":
            tokens = tokens[: draw(st.integers(1, len(tokens)))]
        traces.append(trace)
        sequences.append(tokens)
    return traces, lay_out(sequences, draw(st.sampled_from(KINDS)))


@given(batches())
@examples
def test_alignment_equals_its_definition_token_by_token(case: tuple[list[RoutingTrace], Batch]) -> None:
    traces, batch = case
    assert_equal_to_slow(align(traces, batch.input_ids, missing="live", **batch.arguments), traces, batch)


@given(batches())
@examples
def test_missing_rows_are_refused_exactly_where_the_definition_lacks_them(
    case: tuple[list[RoutingTrace], Batch],
) -> None:
    traces, batch = case
    _, mode, _ = slow_align(traces, batch)
    lacking = [
        (number, position)
        for number, places in enumerate(batch.places)
        for position, n in enumerate(places[:-1])
        if mode[n] == LIVE
    ]
    if not lacking:
        assert_equal_to_slow(align(traces, batch.input_ids, **batch.arguments), traces, batch)
        return
    with pytest.raises(MissingRowError) as caught:
        align(traces, batch.input_ids, **batch.arguments)
    number, position = lacking[0]
    count = sum(sequence == number for sequence, _ in lacking)
    whole = f"sequence {number} lacks {count} of {len(batch.places[number])} rows, the first at position {position}"
    assert caught.value.what == whole


@pytest.mark.parametrize("kind", KINDS)
def test_rows_land_on_their_tokens(kind: str) -> None:
    first, second = [1, 2, 3, 4], [5, 6, 7]
    traces = [make_trace(first), make_trace(second, seed=5)]
    batch = lay_out([first, second], kind)
    routes = align(traces, batch.input_ids, **batch.arguments)
    for trace, places in zip(traces, batch.places, strict=True):
        for row in range(len(trace)):
            assert routes.experts_LNK[:, places[row]].tolist() == trace.experts_TLK[row].tolist()
            assert routes.mode_N[places[row]] == TokenMode.REPLAY
    assert traces[1].experts_TLK.tolist() == dyed_ids(2, LAYOUT, 5).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_of_each_sequence_is_live(kind: str) -> None:
    sequences = [[1, 2, 3, 4], [5, 6], [7]]
    batch = lay_out(sequences, kind)
    routes = align([make_trace(tokens) for tokens in sequences], batch.input_ids, **batch.arguments)
    live = [n for n in range(routes.num_tokens) if routes.mode_N[n] == TokenMode.LIVE]
    assert live == [places[-1] for places in batch.places]
    assert not routes.experts_LNK[:, live].any()


def test_a_scored_sequence_has_its_last_token_replayed_too() -> None:
    routes = align([make_trace([1, 2, 3], rows=3)], [[1, 2, 3]])
    assert routes.mode_N.tolist() == [REPLAY] * 3
    assert routes.follows_N.tolist() == [False, True, True]


def test_padding_is_neither_replayed_nor_live() -> None:
    routes = align(
        [make_trace([1, 2, 3]), make_trace([4, 5])], [[1, 2, 3], [0, 4, 5]], attention_mask=[[1] * 3, [0, 1, 1]]
    )
    assert routes.mode_N.tolist() == [REPLAY, REPLAY, LIVE, PADDING, REPLAY, LIVE]
    assert not routes.experts_LNK[:, 3].any()


def test_a_token_follows_only_within_its_own_sequence_and_after_a_replayed_one() -> None:
    whole, holey = (
        make_trace([1, 2, 3], rows=3),
        make_trace([4, 5, 6, 7, 8], rows=5, valid=[True, True, False, True, True]),
    )
    routes = align([whole, holey], [[1, 2, 3, 4, 5, 6, 7, 8]], cu_seqlens=[0, 3, 8], missing="live")
    assert routes.follows_N.tolist() == [False, True, True, False, True, False, False, True]


def test_tensors_and_a_single_trace_are_accepted() -> None:
    trace = make_trace([1, 2, 3])
    routes = align(trace, torch.tensor([[9, 1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert routes.mode_N.tolist() == [PADDING, REPLAY, REPLAY, LIVE]


@pytest.mark.parametrize("num_experts", [255, 256, 257, 512])
def test_the_highest_expert_survives_alignment(num_experts: int) -> None:
    layout = MoeLayout((0,), num_experts, 2)
    routes = align([make_trace([1, 2, 3], layout)], [[1, 2, 3]])
    assert routes.experts_LNK[0, 0].tolist() == [num_experts - 1, 0]
    assert routes.experts_LNK.dtype == layout.dtype


# --- truncated, gone on, deltas ---


def test_a_batch_cut_short_replays_what_it_has() -> None:
    trace = make_trace([1, 2, 3, 4, 5])
    routes = align([trace], [[1, 2, 3]])
    assert routes.mode_N.tolist() == [REPLAY] * 3
    assert routes.experts_LNK.transpose(1, 0, 2).tolist() == trace.experts_TLK[:3].tolist()


def test_a_batch_that_goes_on_past_the_trace_is_refused_unless_live_is_allowed() -> None:
    trace = make_trace([1, 2, 3])
    what = "sequence 0 lacks 2 of 5 rows, the first at position 2"
    with refused(MissingRowError, what, expected="every token but the last", fix="missing='live'"):
        align([trace], [[1, 2, 3, 4, 5]])
    routes = align([trace], [[1, 2, 3, 4, 5]], missing="live")
    assert routes.mode_N.tolist() == [REPLAY, REPLAY, LIVE, LIVE, LIVE]


def test_rows_of_a_later_turn_land_at_their_positions() -> None:
    delta = make_trace([1, 2, 3, 4, 5], start=2)
    with refused(MissingRowError, "sequence 0 lacks 2 of 5 rows, the first at position 0"):
        align([delta], [[1, 2, 3, 4, 5]])
    routes = align([delta], [[1, 2, 3, 4, 5]], missing="live")
    assert routes.mode_N.tolist() == [LIVE, LIVE, REPLAY, REPLAY, LIVE]
    assert routes.experts_LNK[:, 2].tolist() == delta.experts_TLK[0].tolist()


def test_a_batch_that_ends_before_a_delta_begins_replays_nothing() -> None:
    routes = align([make_trace([1, 2, 3, 4, 5], start=3)], [[1, 2]], missing="live")
    assert routes.mode_N.tolist() == [LIVE, LIVE]
    assert not routes.experts_LNK.any()


# --- missing ---


def test_a_missing_row_is_refused_by_sequence_and_position() -> None:
    whole, holey = make_trace([1, 2, 3]), make_trace([4, 5, 6, 7, 8], valid=[True, False, False, True])
    what, fix = "sequence 1 lacks 2 of 5 rows, the first at position 1", "missing='live'"
    with refused(MissingRowError, what, expected="a captured row", fix=fix):
        align([whole, holey], [[1, 2, 3, 4, 5, 6, 7, 8]], cu_seqlens=[0, 3, 8])


def test_live_routing_is_allowed_token_by_token() -> None:
    holey = make_trace([4, 5, 6, 7, 8], valid=[False, True, False, True])
    allowed = np.array([[True, True, True, False, False]])
    for permission in (allowed, allowed.tolist(), torch.tensor(allowed), allowed.astype(int)):
        assert align([holey], [[4, 5, 6, 7, 8]], missing=permission).mode_N.tolist() == [
            LIVE,
            REPLAY,
            LIVE,
            REPLAY,
            LIVE,
        ]
    with refused(MissingRowError, "sequence 0 lacks 1 of 5 rows, the first at position 2"):
        align([holey], [[4, 5, 6, 7, 8]], missing=[[True, True, False, True, True]])


def test_a_permission_stays_in_its_own_place_of_a_padded_batch() -> None:
    traces = [make_trace([1, 2, 3]), make_trace([4, 5, 6], valid=[False, True])]
    batch = lay_out([[1, 2, 3], [4, 5, 6]], "left")  # one column of padding
    allowed = np.zeros(batch.input_ids.shape, bool)
    allowed[1, 0], allowed[0, 1] = True, True  # padding, and the same position of the other sequence
    with refused(MissingRowError, "sequence 1 lacks 1 of 3 rows, the first at position 0"):
        align(traces, batch.input_ids, missing=allowed, **batch.arguments)
    allowed[1, 1] = True
    assert align(traces, batch.input_ids, missing=allowed, **batch.arguments).count(TokenMode.LIVE) == 3


def test_a_permission_that_is_none_is_refused() -> None:
    trace = make_trace([1, 2, 3])
    with refused(ReplayError, "missing is unknown", expected="'error', 'live'", got="'zero'"):
        align([trace], [[1, 2, 3]], missing="zero")
    with refused(ReplayError, "missing does not fit", expected="shape (1, 3)", got="shape (3,)"):
        align([trace], [[1, 2, 3]], missing=[True] * 3)


# --- refusals ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_token_is_refused_by_sequence_and_position(kind: str) -> None:
    sequences = [[1, 2, 3, 4], [5, 6, 7]]
    traces = [make_trace(tokens) for tokens in sequences]
    batch = lay_out([[1, 2, 3, 4], [5, 8, 7]], kind)
    what = "than sequence 1 of the batch: first difference at position 1"
    with refused(TokenMismatchError, what, expected="token 6", got="token 8", fix="order of the sequences"):
        align(traces, batch.input_ids, **batch.arguments)


def test_traces_in_another_order_are_refused() -> None:
    traces = [make_trace([5, 6, 7]), make_trace([1, 2, 3])]
    with refused(TokenMismatchError, "sequence 0 of the batch: first difference at position 0"):
        align(traces, [[1, 2, 3], [5, 6, 7]])


def test_a_sequence_shifted_by_one_is_refused() -> None:
    with refused(TokenMismatchError, "first difference at position 0", expected="token 1", got="token 2"):
        align([make_trace([1, 2, 3, 4])], [[2, 3, 4]])


def test_a_trace_that_knows_only_the_hash_is_checked_too() -> None:
    trace = replace(make_trace([1, 2, 3]), tokens=None)
    assert align([trace], [[1, 2, 3]]).mode_N.tolist() == [REPLAY, REPLAY, LIVE]
    for tokens in ([1, 2, 4], [1, 2], [1, 2, 3, 4]):
        with refused(TokenMismatchError, "other tokens than sequence 0"):
            align([trace], [tokens])


@pytest.mark.parametrize(
    "layout",
    [MoeLayout((1, 2, 6), 16, 2), MoeLayout((1, 2, 5), 17, 2), MoeLayout((1, 2, 5), 16, 3), MoeLayout((1, 2), 16, 2)],
    ids=repr,
)
def test_traces_of_different_layouts_are_not_mixed(layout: MoeLayout) -> None:
    with refused(LayoutMismatchError, "the batch's first trace", expected=LAYOUT, got=layout):
        align([make_trace([1, 2]), make_trace([3, 4], layout)], [[1, 2], [3, 4]])


def test_traces_of_different_models_are_not_mixed() -> None:
    traces = [make_trace([1, 2], fingerprint=fingerprint) for fingerprint in ("b", "", "a")]
    with refused(LayoutMismatchError, "different models", expected="one fingerprint", got="['a', 'b']"):
        align(traces, [[1, 2]] * 3)
    assert align(traces[:2], [[1, 2]] * 2).fingerprint == "b"
    assert align(traces[1:2], [[1, 2]]).fingerprint == ""


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_traces_is_refused(count: int) -> None:
    with refused(ReplayError, "each sequence of the batch needs one trace", expected="2 traces", got=count):
        align([make_trace([1, 2])] * count, [[1, 2], [1, 2]])


@pytest.mark.parametrize("traces", [None, "routes.safetensors", [{"data": "AA=="}], [make_trace([1, 2]), 3]], ids=repr)
def test_what_is_no_trace_is_refused(traces: Any) -> None:
    with refused(InvalidTraceError, "this is no trace", expected="a RoutingTrace", fix="A Completion has one"):
        align(traces, [[1, 2], [1, 2]])


def test_one_sequence_as_a_flat_list_is_refused() -> None:
    with refused(ReplayError, "input_ids must be a batch", got="shape (2,)"):
        align([make_trace([1, 2])], [1, 2])


def test_an_empty_batch_is_refused() -> None:
    for traces, input_ids in (([], np.zeros((0, 3), int)), ([make_trace([1, 2])], np.zeros((1, 0), int))):
        with pytest.raises(ReplayError):
            align(traces, input_ids, missing="live")


@given(st.sampled_from(KINDS), st.data())
@examples
def test_no_batch_of_other_tokens_is_ever_replayed(kind: str, data: st.DataObject) -> None:
    sequences = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3))
    traces = [make_trace(tokens) for tokens in sequences]
    number = data.draw(st.integers(0, len(sequences) - 1))
    position = data.draw(st.integers(0, len(sequences[number]) - 1))
    others = [list(tokens) for tokens in sequences]
    others[number][position] += data.draw(st.sampled_from([1, -1, 2**32]))
    batch = lay_out(others, kind)
    with refused(TokenMismatchError, f"sequence {number} of the batch: first difference at position {position}"):
        align(traces, batch.input_ids, missing="live", **batch.arguments)


# --- jagged batches ---


def test_a_list_of_sequences_of_one_length_is_a_plain_batch() -> None:
    traces = [make_trace([1, 2, 3]), make_trace([4, 5, 6])]
    expected = align(traces, [[1, 2, 3], [4, 5, 6]])
    for batch in ([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])], (np.array([1, 2, 3]), [4, 5, 6])):
        routes = align(traces, batch)
        assert routes.shape == (2, 3)
        assert np.array_equal(routes.experts_LNK, expected.experts_LNK)


def test_masks_lie_as_a_jagged_batch_does() -> None:
    traces = [make_trace([1, 2, 3], valid=[True, False]), make_trace([4, 5])]
    batch = [[1, 2, 3], [4, 5]]
    for mask in (
        [[False, True, False], [False, False]],
        torch.nested.nested_tensor([torch.tensor([0, 1, 0]), torch.tensor([0, 0])], layout=torch.jagged),
    ):
        assert align(traces, batch, missing=mask).mode_N.tolist() == [REPLAY, LIVE, LIVE, REPLAY, LIVE]
    with refused(ReplayError, "missing does not fit", expected="rows of (3, 2) tokens", got="rows of (2, 3)"):
        align(traces, batch, missing=[[False, True], [False] * 3])


def test_masks_of_rows_of_one_length_may_be_plain_or_jagged() -> None:
    traces = [make_trace([1, 2, 3], valid=[True, False]), make_trace([4, 5, 6])]
    ids, mask = [[1, 2, 3], [4, 5, 6]], [[0, 1, 0], [0, 0, 0]]
    nested = [
        torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged) for rows in (ids, mask)
    ]
    for batch in (ids, nested[0]):
        for missing in (mask, nested[1]):
            assert align(traces, batch, missing=missing).count(TokenMode.REPLAY) == 3
        with refused(ReplayError, "missing does not fit"):
            align(traces, batch, missing=[[0, 1], [0, 0], [0, 0]])
        with refused(ReplayError, "missing does not fit"):
            align(traces, batch, missing=[0, 1, 0])


def test_a_jagged_view_with_holes_is_refused() -> None:
    """A model that is called with its values sees tokens that are in no row."""
    view = torch.nested.narrow(
        torch.arange(12).view(3, 4), 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1]), layout=torch.jagged
    )
    traces = [make_trace(row.tolist()) for row in view.unbind()]
    with refused(ReplayError, "the jagged batch has holes", fix="cu_seqlens and a mask"):
        align(traces, view)
    assert align(traces, view.contiguous()).shape == (1, 6)


def test_what_contradicts_a_jagged_batch_is_refused() -> None:
    traces, batch = [make_trace([1, 2, 3]), make_trace([4, 5])], [[1, 2, 3], [4, 5]]
    assert align(traces, batch, cu_seqlens=[0, 3, 5], position_ids=[[0, 1, 2], [0, 1]]).count(TokenMode.REPLAY) == 3
    with refused(ReplayError, "cu_seqlens is not that of the jagged batch", expected=[0, 3, 5], got=[0, 2, 5]):
        align(traces, batch, cu_seqlens=[0, 2, 5])
    with refused(ReplayError, "a jagged batch has one sequence in each row", expected="at least one token"):
        align(traces, [[1, 2, 3], []])
    with refused(ReplayError, "a jagged batch has one sequence in each row", got="(1, 2)"):
        align(traces, [[[1, 2]], [4, 5]])


# --- policies ---


def slow_wanted(rows: Any, places: list[list[int]], sampled: list[int], num_tokens: int) -> list[bool]:
    """Which rows a policy wants, token by token: the row at n computed the distribution of the next token."""
    following = {n: later for sequence in places for n, later in pairwise(sequence)}
    predicts = [n in following and following[n] in sampled for n in range(num_tokens)]
    return {"all": [True] * num_tokens, "response": predicts, "prompt": [not p for p in predicts]}[rows]


@given(batches(), st.sampled_from(["all", "response", "prompt"]), st.data())
@examples
def test_a_policy_replays_the_rows_it_names_and_needs_no_others(
    case: tuple[list[RoutingTrace], Batch], rows: Any, data: st.DataObject
) -> None:
    traces, batch = case
    tokens = [n for places in batch.places for n in places]
    sampled = data.draw(st.lists(st.sampled_from(tokens), unique=True))
    flat = [int(n in sampled) for n in range(batch.num_tokens)]
    mask: Any
    if isinstance(batch.input_ids, np.ndarray):
        mask = np.array(flat).reshape(batch.input_ids.shape)
    else:
        mask = [[flat[n] for n in places] for places in batch.places]
    routes = align(
        traces, batch.input_ids, policy=ReplayPolicy(rows), response_mask=mask, missing="live", **batch.arguments
    )
    wanted = slow_wanted(rows, batch.places, sampled, batch.num_tokens)
    experts, mode, _ = slow_align(traces, batch)
    expected = [REPLAY if m == REPLAY and wanted[n] else min(m, LIVE) for n, m in enumerate(mode)]
    assert routes.mode_N.tolist() == expected
    nothing = [0] * traces[0].layout.top_k
    assert routes.experts_LNK.tolist() == [
        [row if expected[n] == REPLAY else nothing for n, row in enumerate(layer)] for layer in experts
    ]
    lasts = {places[-1] for places in batch.places}
    lacking = [n for n in tokens if wanted[n] and mode[n] == LIVE and n not in lasts]
    strict: dict[str, Any] = {"policy": ReplayPolicy(rows), "response_mask": mask, **batch.arguments}
    if lacking:
        with pytest.raises(MissingRowError):
            align(traces, batch.input_ids, **strict)
    else:
        assert align(traces, batch.input_ids, **strict).mode_N.tolist() == expected


def test_the_rows_of_a_conversation_are_those_before_each_sampled_token() -> None:
    """User 1 2, assistant 3 4, tool 5, assistant 6 7: tokens 3, 4, 6 and 7 were sampled."""
    trace, tokens, sampled = make_trace([1, 2, 3, 4, 5, 6, 7]), [[1, 2, 3, 4, 5, 6, 7]], [[0, 0, 1, 1, 0, 1, 1]]
    response = align(trace, tokens, policy=ReplayPolicy("response"), response_mask=sampled)
    assert response.mode_N.tolist() == [LIVE, REPLAY, REPLAY, LIVE, REPLAY, REPLAY, LIVE]
    prompt = align(trace, tokens, policy=ReplayPolicy("prompt"), response_mask=sampled)
    assert prompt.mode_N.tolist() == [REPLAY, LIVE, LIVE, REPLAY, LIVE, LIVE, LIVE]


def test_a_mask_of_its_own_is_a_policy_too() -> None:
    trace = make_trace([1, 2, 3, 4], valid=[True, False, True])
    for rows in ([[1, 0, 1, 1]], torch.tensor([[True, False, True, True]])):
        assert align(trace, [[1, 2, 3, 4]], policy=ReplayPolicy(rows)).mode_N.tolist() == [REPLAY, LIVE, REPLAY, LIVE]
    with refused(MissingRowError, "lacks 1 of 4 rows, the first at position 1"):
        align(trace, [[1, 2, 3, 4]], policy=ReplayPolicy([[1, 1, 1, 1]]))
    with refused(ReplayError, "ReplayPolicy.rows does not fit", expected="shape (1, 4)", got="shape (1, 3)"):
        align(trace, [[1, 2, 3, 4]], policy=ReplayPolicy([[1, 1, 1]]))


def test_policies_that_mean_nothing_are_refused() -> None:
    trace, batch = make_trace([1, 2, 3]), [[0, 1, 2, 3]]
    where = {"attention_mask": [[0, 1, 1, 1]]}
    with refused(ReplayError, "must know which tokens are the response", expected="response_mask=[B, S]"):
        align(trace, batch, policy=ReplayPolicy("response"), **where)
    with refused(ReplayError, "response_mask marks padding", got="1 ones there"):
        align(trace, batch, policy=ReplayPolicy("prompt"), response_mask=[[1, 0, 1, 1]], **where)
    with refused(ReplayError, "response_mask does not fit", got="shape (1, 2)"):
        align(trace, batch, policy=ReplayPolicy("response"), response_mask=[[1, 1]], **where)
    with refused(ReplayError, "this is no policy", expected="a ReplayPolicy", got="'response'"):
        align(trace, batch, policy="response", **where)  # type: ignore[arg-type]
    with refused(ReplayError, "rows is unknown", got="'none'"):
        ReplayPolicy("none")
    for margin in (0.0, -1.0, float("inf"), float("nan")):
        with refused(ReplayError, "the margin is a difference of scores", got=margin):
            ReplayPolicy(margin=margin)


def test_routes_carry_the_margin_through_slices() -> None:
    routes = align(make_trace([1, 2, 3]), [[1, 2, 3]], policy=ReplayPolicy(margin=0.25))
    assert routes.margin == 0.25
    assert routes.take([2, 0]).margin == 0.25
    assert align(make_trace([1, 2, 3]), [[1, 2, 3]]).margin is None
