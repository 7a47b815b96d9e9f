"""Payloads of other engines: their documented clients read ours, and we read theirs without bending an id."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import CASES, Case, b64, packed
from traces import EDGE_EXPERTS, assert_contract, make_trace, refused, routing_traces, sha256_of

from moetrace.dialects import from_lightllm, to_lightllm
from moetrace.errors import FormatError, InvalidTraceError, LayoutMismatchError, MoetraceError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

LAYOUT = MoeLayout((1, 3), 8, 2)
TOKENS = [11, 12, 13, 14]
IDS_TLK = [[[0, 7], [2, 1]], [[6, 3], [5, 4]], [[5, 6], [3, 4]]]
TRACE = RoutingTrace.build(
    np.array(IDS_TLK),
    LAYOUT,
    TOKENS,
    valid_T=np.array([True, False, True]),
    weight_spans=[WeightSpan(0, "a"), WeightSpan(2, "b")],
    order="set",
    fingerprint="f",
    engine="e 1",
)
examples = settings(max_examples=80, deadline=None)


def client_snippet(r: dict[str, Any]) -> np.ndarray:
    """What LightLLM's documentation tells its users to write."""
    return np.frombuffer(base64.b64decode(r["data"]), dtype=np.int32).reshape(r["shape"])


def encoded(ids: Any, dtype: type = np.int32) -> str:
    return base64.b64encode(np.ascontiguousarray(ids, dtype).tobytes()).decode()


def minimal(ids_LTK: Any) -> dict[str, Any]:
    """LightLLM's own payload: nothing but shape, dtype and data."""
    return {"shape": list(np.shape(ids_LTK)), "dtype": "int32", "data": encoded(ids_LTK)}


# --- writing ---


def test_payload_holds_layer_major_int32_with_minus_1_in_missing_rows() -> None:
    payload = to_lightllm(TRACE)
    assert client_snippet(payload).tolist() == [[[0, 7], [-1, -1], [5, 6]], [[2, 1], [-1, -1], [3, 4]]]
    del payload["data"]
    assert payload == {
        "shape": [2, 3, 2],
        "dtype": "int32",
        "layout": "LTK",
        "layers": [1, 3],
        "num_experts": 8,
        "order": "set",
        "start": 0,
        "num_valid": 2,
        "valid": base64.b64encode(bytes([0b10100000])).decode(),
        "token_sha256": sha256_of(TOKENS),
        "weight_spans": [{"start": 0, "version": "a"}, {"start": 2, "version": "b"}],
        "fingerprint": "f",
        "engine": "e 1",
    }


@given(routing_traces())
@examples
def test_documented_client_reads_the_trace_transposed(trace: RoutingTrace) -> None:
    routed_experts = client_snippet(to_lightllm(trace))
    assert routed_experts.shape == (trace.layout.num_layers, trace.num_rows, trace.layout.top_k)
    for layer in range(trace.layout.num_layers):
        for row in range(trace.num_rows):
            ids = trace.experts_TLK[row, layer].tolist() if trace.valid_T[row] else [-1] * trace.layout.top_k
            assert routed_experts[layer, row].tolist() == ids


@given(routing_traces())
@examples
def test_reading_back_gives_an_equal_trace(trace: RoutingTrace) -> None:
    payload = json.loads(json.dumps(to_lightllm(trace)))  # as it comes over HTTP
    assert trace.tokens is not None
    for layout in (None, trace.layout):
        read = from_lightllm(payload, trace.tokens, layout)
        assert read == trace
        assert_contract(read)


@pytest.mark.parametrize("num_experts", EDGE_EXPERTS)
def test_the_highest_expert_survives_the_payload(num_experts: int) -> None:
    trace = make_trace(range(4), MoeLayout((0,), num_experts, 2), valid=[True, True, False])
    payload = to_lightllm(trace)
    assert client_snippet(payload)[0, 0, 0] == num_experts - 1
    assert from_lightllm(payload, range(4)) == trace


@given(routing_traces(), st.sampled_from(["LTK", "TLK"]), st.sampled_from(["int32", "int16", "uint16", "uint8"]))
@examples
def test_every_axis_order_and_type_is_read_back_equal(trace: RoutingTrace, layout: Any, dtype: Any) -> None:
    assert trace.tokens is not None
    if trace.layout.num_experts - 1 > np.iinfo(dtype).max:
        with refused(FormatError, f"do not fit {dtype}", fix="int32"):
            to_lightllm(trace, layout=layout, dtype=dtype)
        return
    payload = json.loads(json.dumps(to_lightllm(trace, layout=layout, dtype=dtype)))
    axes = {"L": trace.layout.num_layers, "T": trace.num_rows, "K": trace.layout.top_k}
    assert payload["shape"] == [axes[axis] for axis in layout]
    assert from_lightllm(payload, trace.tokens) == trace
    ids = np.frombuffer(base64.b64decode(payload["data"]), dtype).reshape(payload["shape"])
    ids_TLK = ids.transpose(1, 0, 2) if layout == "LTK" else ids
    np.testing.assert_array_equal(ids_TLK[trace.valid_T], trace.experts_TLK[trace.valid_T])
    assert (ids_TLK[~trace.valid_T] == np.array(-1).astype(dtype)).all()  # never an expert K times, never zeros


def test_in_an_unsigned_type_whose_every_id_is_legal_the_bitmap_decides() -> None:
    layout = MoeLayout((0,), 256, 2)
    trace = RoutingTrace.build(np.array([[[254, 255]], [[0, 1]]]), layout, [1, 2], valid_T=np.array([True, False]))
    payload = to_lightllm(trace, layout="TLK", dtype="uint8")
    assert base64.b64decode(payload["data"]) == bytes([254, 255, 255, 255])
    assert from_lightllm(payload, [1, 2]) == trace
    hidden = base64.b64encode(bytes([0])).decode()
    with refused(FormatError, "bitmap contradicts its ids", got=hidden):
        from_lightllm(payload | {"valid": hidden}, [1, 2])


# --- reading LightLLM's own ---


@pytest.mark.parametrize("case", [case for case in CASES if case.start == 0], ids=lambda case: case.name)
def test_both_forms_made_by_hand_are_read_and_are_what_we_write(case: Case) -> None:
    ids = case.moe_ids()
    by_layer = [[row[layer] for row in ids] for layer in range(len(case.layers))]
    narrow: Any = "uint8" if case.num_experts <= 256 else "int16"
    sizes = len(case.layers), len(ids), case.top_k
    first = {"shape": list(sizes), "dtype": "int32", "data": b64(packed(by_layer, "int32"))}
    later = {"shape": [sizes[1], sizes[0], sizes[2]], "dtype": narrow, "data": b64(packed(ids, narrow))}
    trace = from_lightllm(first, case.tokens, case.layout)
    assert_contract(trace)
    assert trace.experts_TLK.tolist() == ids
    assert trace.valid_T.all()
    assert from_lightllm(later, case.tokens, case.layout) == trace
    assert to_lightllm(trace).items() >= first.items()
    assert to_lightllm(trace, layout="TLK", dtype=narrow).items() >= later.items()


@pytest.mark.parametrize("tokens", [TOKENS[:-1], [*TOKENS, 15]], ids=["a row for each token", "a row too few"])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16"])
def test_lightllms_own_payload_has_a_row_for_each_token_but_the_last(tokens: list[int], dtype: Any) -> None:
    payload = minimal(np.array(IDS_TLK).transpose(1, 0, 2))
    if dtype != "int32":
        payload = {"shape": [3, 2, 2], "dtype": dtype, "data": encoded(IDS_TLK, dtype)}
    with refused(FormatError, "not one row for each token", expected=f"{len(tokens) - 1} rows", got="3 rows"):
        from_lightllm(payload, tokens, LAYOUT)


def test_ids_that_lightllm_must_have_cut_off_are_refused() -> None:
    for num_experts, dtype in ((257, "uint8"), (32769, "int16")):
        payload = {"shape": [3, 2, 2], "dtype": dtype, "data": encoded(IDS_TLK, np.dtype(dtype).type)}
        with refused(FormatError, f"do not fit {dtype}"):
            from_lightllm(payload, TOKENS, MoeLayout((1, 3), num_experts, 2))


def test_255_is_no_missing_row_where_no_bitmap_says_so() -> None:
    ids = np.array(IDS_TLK)
    ids[1] = 255
    payload = {"shape": [3, 2, 2], "dtype": "uint8", "data": encoded(ids, np.uint8)}
    with refused(InvalidTraceError, "row 1, layer 1 is out of range", got=255):
        from_lightllm(payload, TOKENS, LAYOUT)


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_later_lightllms_token_major_payload_is_read(dtype: Any) -> None:
    payload = {"shape": [3, 2, 2], "dtype": dtype, "data": encoded(IDS_TLK, dtype)}
    trace = from_lightllm(payload, TOKENS, LAYOUT)
    assert trace.experts_TLK.tolist() == IDS_TLK
    assert trace.valid_T.all()


def test_the_minimal_payload_is_read_with_the_models_layout() -> None:
    ids_LTK = np.array(IDS_TLK).transpose(1, 0, 2)
    trace = from_lightllm(minimal(ids_LTK), TOKENS, LAYOUT)
    assert trace.experts_TLK.tolist() == IDS_TLK
    assert trace.valid_T.all()
    assert (trace.layout, trace.start, trace.order, trace.engine) == (LAYOUT, 0, "rank", "lightllm")


def test_the_minimal_payload_without_a_layout_is_refused() -> None:
    payload = minimal(np.array(IDS_TLK).transpose(1, 0, 2))
    with refused(FormatError, "does not say its layers", fix="layout=moetrace.layout_of(model)"):
        from_lightllm(payload, TOKENS)


def test_minus_1_rows_of_a_minimal_payload_are_not_valid() -> None:
    ids_LTK = np.array(IDS_TLK).transpose(1, 0, 2).copy()
    ids_LTK[:, 1] = -1
    trace = from_lightllm(minimal(ids_LTK), TOKENS, LAYOUT)
    assert trace.valid_T.tolist() == [True, False, True]
    assert trace.experts_TLK[1].tolist() == [[0, 0], [0, 0]]


def test_a_row_with_some_minus_1_is_refused() -> None:
    ids_LTK = np.array(IDS_TLK).transpose(1, 0, 2).copy()
    ids_LTK[1, 1, 1] = -1
    with refused(FormatError, "row 1 is captured in part: layer 3 is missing", got=[5, -1]):
        from_lightllm(minimal(ids_LTK), TOKENS, LAYOUT)


@pytest.mark.parametrize("filler", [-2, 8, 255, 2**31 - 1])
def test_ids_that_are_no_experts_are_refused(filler: int) -> None:
    ids_LTK = np.array(IDS_TLK).transpose(1, 0, 2).copy()
    ids_LTK[1, 2, 0] = filler
    with refused(InvalidTraceError, "row 2, layer 3 is out of range", expected="0 <= id < 8", got=filler):
        from_lightllm(minimal(ids_LTK), TOKENS, LAYOUT)


def test_zero_filled_rows_are_refused() -> None:
    with refused(InvalidTraceError, "names one expert twice", got="[0, 0]", fix="valid_T"):
        from_lightllm(minimal(np.zeros((2, 3, 2))), TOKENS, LAYOUT)


@pytest.mark.parametrize(
    "layout", [MoeLayout((1, 3, 4), 8, 2), MoeLayout((1, 3), 8, 3), MoeLayout((1,), 8, 2)], ids=repr
)
def test_a_layout_of_another_shape_is_refused(layout: MoeLayout) -> None:
    with refused(InvalidTraceError, "does not fit", got="shape (3, 2, 2)"):
        from_lightllm(minimal(np.array(IDS_TLK).transpose(1, 0, 2)), TOKENS, layout)


def test_a_layout_that_the_payload_contradicts_is_refused() -> None:
    with refused(LayoutMismatchError, "that of the model", expected=(1, 4), got=(1, 3)):
        from_lightllm(to_lightllm(TRACE), TOKENS, MoeLayout((1, 4), 8, 2))


@pytest.mark.parametrize("key", ["layers", "num_experts"])
def test_a_payload_that_says_only_one_fact_of_its_layout_is_held_to_that(key: str) -> None:
    payload = to_lightllm(TRACE)
    other = MoeLayout((1, 4), 8, 2) if key == "layers" else MoeLayout((1, 3), 9, 2)
    del payload["num_experts" if key == "layers" else "layers"]
    assert from_lightllm(payload, TOKENS, LAYOUT) == TRACE
    with refused(LayoutMismatchError, "that of the model", expected=other, got=LAYOUT):
        from_lightllm(payload, TOKENS, other)
    with refused(FormatError, "does not say its layers", fix="layout=moetrace.layout_of(model)"):
        from_lightllm(payload, TOKENS)


# --- refusals ---


@pytest.mark.parametrize("payload", [{}, {"shape": [1, 1, 1], "dtype": "int32"}, None, [], "x"], ids=repr)
def test_a_payload_that_is_not_lightllms_is_refused(payload: Any) -> None:
    with refused(FormatError, "not LightLLM's", expected="keys shape, dtype, data"):
        from_lightllm(payload, TOKENS, LAYOUT)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": ">i4"}, "dtype '>i4'"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"dtype": None}, "dtype None"),
        ({"dtype": ["int32"]}, "dtype ['int32']"),
        ({"layout": "KLT"}, "layout 'KLT'"),
        ({"layout": None}, "layout None"),
        ({"shape": [6, 2]}, "shape [6, 2]"),
        ({"shape": [2, 3, 2, 1]}, "shape [2, 3, 2, 1]"),
        ({"shape": [-1, 3, 2]}, "shape [-1, 3, 2]"),
    ],
)
def test_another_dtype_or_axis_order_is_refused(changes: dict[str, Any], got: str) -> None:
    with refused(FormatError, "another form than LightLLM's", expected="int32 or int16", got=got):
        from_lightllm(to_lightllm(TRACE) | changes, TOKENS)


def test_an_axis_order_that_is_not_the_datas_is_refused() -> None:
    with pytest.raises(MoetraceError):
        from_lightllm(to_lightllm(TRACE) | {"layout": "TLK"}, TOKENS)


@pytest.mark.parametrize("shape", [[2, 3, 1], [2, 4, 2], [0, 0, 0], [2**32, 2**32, 1], [2**63, 2, 2]])
def test_data_that_does_not_fill_its_shape_is_refused(shape: list[int]) -> None:
    with refused(FormatError, "does not fill its shape", expected=f"{shape} ids", got="12 ids"):
        from_lightllm(to_lightllm(TRACE) | {"shape": shape}, TOKENS)


def test_a_shape_whose_product_overflows_is_refused() -> None:
    with pytest.raises(FormatError):
        from_lightllm({"shape": [2**32, 2**32, 1], "dtype": "int32", "data": ""}, TOKENS, LAYOUT)


@pytest.mark.parametrize(
    "data",
    [
        "*",
        "AAA",
        "é",
        "A A=",
        "_-==",
        "AAAAAA=",
        "AAAAAB==",
        "AAAAAA==\n",
        b"AAAAAA==",
        None,
        5,
        "AAAA",
        base64.b64encode(bytes(49)).decode(),
    ],
    ids=repr,
)
def test_data_that_is_not_base64_of_int32_is_refused(data: Any) -> None:
    with refused(FormatError, "not base64 of int32"):
        from_lightllm(to_lightllm(TRACE) | {"data": data}, TOKENS)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": None},
        {"shape": 12},
        {"shape": ["2", "3", "2"]},
        {"shape": [2.0, 3.0, 2.0]},
        {"layers": None},
        {"layers": ["x", "y"]},
        {"num_experts": "8"},
        {"num_experts": 8.0},
        {"start": None},
        {"start": "0"},
        {"start": 0.0},
        {"weight_spans": None},
        {"weight_spans": [0]},
        {"weight_spans": [{"start": 0}]},
        {"fingerprint": 5},
        {"engine": None},
        {"valid": None},
        {"valid": "a"},
        {"valid": "*oA=="},
        {"valid": "é"},
    ],
    ids=repr,
)
def test_a_fact_of_a_wrong_type_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(MoetraceError):
        from_lightllm(to_lightllm(TRACE) | changes, TOKENS)


@pytest.mark.parametrize("bits", [0b11100000, 0b10000000, 0b00100000, 0b00000000, 0b01000000, 0b00000101])
def test_a_bitmap_that_contradicts_the_ids_is_refused(bits: int) -> None:
    valid = base64.b64encode(bytes([bits])).decode()
    with refused(FormatError, "bitmap contradicts its ids", got=valid):
        from_lightllm(to_lightllm(TRACE) | {"valid": valid}, TOKENS)


@pytest.mark.parametrize("bitmap", [b"", bytes([0b10100000, 0])])
def test_a_bitmap_of_another_length_is_refused(bitmap: bytes) -> None:
    valid = base64.b64encode(bitmap).decode()
    with refused(FormatError, "bitmap has a wrong length", expected="3 bits", got=len(bitmap)):
        from_lightllm(to_lightllm(TRACE) | {"valid": valid}, TOKENS)


@pytest.mark.parametrize("tokens", [[11, 12, 13, 15], [11, 12, 13], [*TOKENS, 15]])
def test_other_tokens_than_those_of_the_hash_are_refused(tokens: list[int]) -> None:
    with refused(TokenMismatchError, "recorded on other tokens", expected=sha256_of(TOKENS), got=sha256_of(tokens)):
        from_lightllm(to_lightllm(TRACE), tokens)


def test_fewer_tokens_than_rows_are_refused() -> None:
    payload = to_lightllm(TRACE)
    del payload["token_sha256"]
    with refused(FormatError, "not one row for each token", expected="1 rows", got="3 rows"):
        from_lightllm(payload, TOKENS[:2])


@given(routing_traces(min_rows=1, max_rows=4), st.data())
@examples
def test_a_flipped_bit_of_the_data_never_gives_an_illegal_trace(trace: RoutingTrace, data: st.DataObject) -> None:
    payload = to_lightllm(trace)
    ids = bytearray(base64.b64decode(payload["data"]))
    bit = data.draw(st.integers(0, 8 * len(ids) - 1))
    ids[bit // 8] ^= 1 << bit % 8
    payload["data"] = base64.b64encode(bytes(ids)).decode()
    assert trace.tokens is not None
    try:
        read = from_lightllm(payload, trace.tokens)
    except MoetraceError:
        return
    assert_contract(read)
    assert read.valid_T.tolist() == trace.valid_T.tolist()
