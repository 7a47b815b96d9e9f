"""SGLang's payload: every decoder layer, no word about itself, and no place for a row that is missing.

Axes: T rows, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import assert_contract, make_trace, refused, routing_traces

from moetrace.dialects import from_sglang, to_sglang
from moetrace.errors import FormatError, InvalidTraceError, MissingRowError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((1, 3), 8, 2)
TOKENS = [11, 12, 13, 14]
IDS_TDK = [  # layers 0, 2 and 4 are dense
    [[0, 0], [0, 7], [0, 0], [2, 1], [0, 0]],
    [[0, 0], [6, 3], [0, 0], [5, 4], [0, 0]],
    [[0, 0], [5, 6], [0, 0], [3, 4], [0, 0]],
]
IDS_TLK = [[[0, 7], [2, 1]], [[6, 3], [5, 4]], [[5, 6], [3, 4]]]


def by_hand(ids: Any) -> str:
    """Base64 of little-endian int32 in C order."""
    flat = np.array(ids).reshape(-1).tolist()
    return base64.b64encode(struct.pack(f"<{len(flat)}i", *flat)).decode()


def test_a_payload_made_by_hand_is_what_we_write_and_read() -> None:
    trace = RoutingTrace.build(np.array(IDS_TLK), LAYOUT, TOKENS, fingerprint="f", engine="sglang")
    assert to_sglang(trace, 5) == by_hand(IDS_TDK)
    read = from_sglang(by_hand(IDS_TDK), TOKENS, LAYOUT, 5, fingerprint="f")
    assert_contract(read)
    assert read == trace


def test_clients_reshape_it_to_rows_by_all_layers_by_k() -> None:
    layout = MoeLayout((3, 4, 5), 300, 4)
    trace = make_trace(range(40), layout)
    array = np.frombuffer(base64.b64decode(to_sglang(trace, 7)), np.int32).reshape(40 - 1, 7, 4)
    np.testing.assert_array_equal(array[:, 3:6], trace.experts_TLK)
    assert not array[:, [0, 1, 2, 6]].any()


def test_a_start_leaves_out_the_rows_before() -> None:
    payload = by_hand(IDS_TDK[2:])
    trace = from_sglang(payload, TOKENS, LAYOUT, 5, start=2)
    assert (trace.start, trace.experts_TLK.tolist()) == (2, IDS_TLK[2:])
    assert to_sglang(trace, 5) == payload
    for start in (3, 4):  # a turn that generated nothing: no rows, and the last prompt token has none
        assert from_sglang("", TOKENS, LAYOUT, 5, start=start).num_rows == 0


@given(routing_traces(spans=False), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back(trace: RoutingTrace, more: int) -> None:
    layers, num_layers = trace.layout.layers, trace.layout.layers[-1] + 1 + more
    if len(set(layers)) < len(layers):
        with pytest.raises(FormatError if trace.valid_T.all() else MissingRowError):
            to_sglang(trace, num_layers)
    elif not trace.valid_T.all():
        with pytest.raises(MissingRowError):
            to_sglang(trace, num_layers)
    else:
        assert trace.tokens is not None
        tokens = np.append(trace.tokens[: trace.stop], 7)
        facts: dict[str, Any] = {"order": trace.order, "fingerprint": trace.fingerprint, "engine": trace.engine}
        read = from_sglang(to_sglang(trace, num_layers), tokens, trace.layout, num_layers, start=trace.start, **facts)
        np.testing.assert_array_equal(read.experts_TLK, trace.experts_TLK)
        assert read.valid_T.all()
        assert (read.order, read.fingerprint, read.engine) == (trace.order, trace.fingerprint, trace.engine)


def test_a_row_that_was_not_captured_is_refused_not_filled() -> None:
    trace = make_trace(range(6), valid=[True, True, False, True, False])
    with refused(
        MissingRowError,
        "SGLang's payload cannot say which rows are missing",
        expected="every row captured",
        got="2 of 5 missing, the first at position 2",
        fix="Use /generate",
    ):
        to_sglang(trace, 6)
    assert from_sglang(to_sglang(trace.slice(0, 2), 6), range(3), trace.layout, 6).num_valid == 2


@pytest.mark.parametrize(
    ("layers", "num_layers"), [((1, 3), 3), ((1, 1, 3), 5)], ids=["a layer too many", "two routers in a layer"]
)
def test_layers_without_a_place_are_refused(layers: tuple[int, ...], num_layers: int) -> None:
    layout = MoeLayout(layers, 8, 2)
    trace = make_trace(TOKENS, layout)
    with refused(FormatError, "the model's MoE layers have no place", got=list(layers)):
        to_sglang(trace, num_layers)
    with refused(FormatError, "the model's MoE layers have no place", got=list(layers)):
        from_sglang(by_hand(IDS_TDK), TOKENS, layout, num_layers)


@pytest.mark.parametrize(
    ("payload", "changes", "got"),
    [
        (by_hand(IDS_TDK[:2]), {}, "80 bytes, 2 rows"),
        (by_hand([*IDS_TDK, IDS_TDK[0]]), {}, "160 bytes, 4 rows"),
        (by_hand(IDS_TDK), {"start": 1}, "120 bytes, 3 rows"),
        (by_hand(IDS_TDK), {"num_layers": 6}, "120 bytes, 2.5 rows"),
        (by_hand(IDS_TDK), {"layout": MoeLayout((1, 3), 8, 3)}, "120 bytes, 2 rows"),
        (base64.b64encode(np.array(IDS_TDK, np.int64).tobytes()).decode(), {}, "240 bytes, 6 rows"),
        (base64.b64encode(np.array(IDS_TDK, np.uint8).tobytes()).decode(), {}, "30 bytes, 0.75 rows"),
        (base64.b64encode(bytes(119)).decode(), {}, "119 bytes, 2.975 rows"),
        ("", {}, "0 bytes, 0 rows"),
    ],
)
def test_a_payload_of_another_length_or_type_is_refused(payload: str, changes: dict[str, Any], got: str) -> None:
    arguments: dict[str, Any] = {"tokens": TOKENS, "layout": LAYOUT, "num_layers": 5, **changes}
    with refused(FormatError, "the payload has not one row for each token", got=got):
        from_sglang(payload, **arguments)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_outside_the_tokens_is_refused(start: int) -> None:
    with refused(FormatError, "start is no position of these tokens", expected="<= 4", got=start):
        from_sglang("", TOKENS, LAYOUT, 5, start=start)


@pytest.mark.parametrize("payload", ["!", "AAA", "AAAA=", "_-AA", "AAA\n", None, 3, b"AAAA", "ä"])
def test_what_is_not_base64_is_refused(payload: Any) -> None:
    with refused(FormatError, "the payload is not base64"):
        from_sglang(payload, TOKENS, LAYOUT, 5)


def test_another_models_layers_are_noticed() -> None:
    with refused(FormatError, "a layer that does not route names an expert"):
        from_sglang(by_hand(IDS_TDK), TOKENS, MoeLayout((1, 2), 8, 2), 5)


def test_dense_layers_may_hold_minus_1_as_in_sglang_jax() -> None:
    ids_TDK = np.array(IDS_TDK)
    ids_TDK[:, [0, 2, 4]] = -1
    assert from_sglang(by_hand(ids_TDK), TOKENS, LAYOUT, 5).experts_TLK.tolist() == IDS_TLK


@pytest.mark.parametrize(
    ("row", "what"), [([0, 0], "names one expert twice"), ([8, 1], "out of range"), ([-1, 1], "out")]
)
def test_rows_that_nobody_wrote_and_ids_of_no_expert_are_refused(row: list[int], what: str) -> None:
    ids_TDK = np.array(IDS_TDK)
    ids_TDK[1, [1, 3]] = row
    with pytest.raises(InvalidTraceError, match=what):
        from_sglang(by_hand(ids_TDK), TOKENS, LAYOUT, 5)
