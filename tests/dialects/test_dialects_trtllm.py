"""TensorRT-LLM's payload: int16 over MoE layers, -1 in the whole of a row that is missing, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from payloads import CASES, Case, packed
from traces import assert_contract, make_trace, refused, routing_traces

from moetrace.dialects import from_trtllm, to_trtllm
from moetrace.errors import FormatError, InvalidTraceError, MoetraceError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

CASE = Case("two layers", 8, 2, (1, 3), 5, 4)


def array_of(case: Case) -> np.ndarray:
    shape = (len(case.positions), len(case.layers), case.top_k)
    return np.frombuffer(packed(case.moe_ids(), "int16"), "<i2").reshape(shape)


@pytest.mark.parametrize("case", [case for case in CASES if case.start == 0], ids=lambda case: case.name)
def test_payloads_made_by_hand_are_what_we_write_and_read(case: Case) -> None:
    trace = from_trtllm(array_of(case), case.tokens, case.layout)
    assert_contract(trace)
    assert trace.experts_TLK.tolist() == case.moe_ids()
    assert trace.valid_T.all()
    assert (trace.engine, trace.order, trace.start) == ("tensorrt_llm", "rank", 0)
    np.testing.assert_array_equal(to_trtllm(trace), array_of(case), strict=True)


def test_a_tensor_is_read() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(CASE.moe_ids(), dtype=torch.int16)
    assert from_trtllm(tensor, CASE.tokens, CASE.layout).experts_TLK.tolist() == CASE.moe_ids()
    with refused(FormatError, "not an array on the CPU"):
        from_trtllm(tensor.to("meta"), CASE.tokens, CASE.layout)


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
def test_rows_of_minus_1_are_not_valid(rows: list[int]) -> None:
    array = array_of(CASE).copy()
    array[rows] = -1
    trace = from_trtllm(array, CASE.tokens, CASE.layout)
    assert_contract(trace)
    assert np.flatnonzero(~trace.valid_T).tolist() == rows
    np.testing.assert_array_equal(to_trtllm(trace), array, strict=True)


@pytest.mark.parametrize(
    ("place", "layer"),
    [((1, 1, 1), 3), ((1, 0), 1), ((1, 1), 3), ((1, slice(None), 0), 1), ((2, 0, 0), 1)],
    ids=["one id", "the first layer", "the last layer", "one rank of all layers", "in the last row"],
)
def test_a_row_that_is_missing_in_part_is_refused(place: tuple, layer: int) -> None:
    array = array_of(CASE).copy()
    array[0] = -1  # a row that is missing as a whole is no excuse
    array[place] = -1
    with refused(
        FormatError, f"row {place[0]} is captured in part: layer {layer} is missing", expected="-1 in all of a row"
    ):
        from_trtllm(array, CASE.tokens, CASE.layout)


@given(routing_traces(spans=False))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back(trace: RoutingTrace) -> None:
    if trace.start:
        with refused(FormatError, "TensorRT-LLM's payload begins at the first token", got=trace.start):
            to_trtllm(trace)
        return
    assert trace.tokens is not None
    got = from_trtllm(
        to_trtllm(trace),
        np.append(trace.tokens[: trace.stop], 7),
        trace.layout,
        order=trace.order,
        fingerprint=trace.fingerprint,
        engine=trace.engine,
    )
    np.testing.assert_array_equal(got.experts_TLK, trace.experts_TLK)
    np.testing.assert_array_equal(got.valid_T, trace.valid_T)
    assert (got.order, got.fingerprint, got.engine) == (trace.order, trace.fingerprint, trace.engine)


def test_ids_that_do_not_fit_int16_are_refused() -> None:
    fits, wide = MoeLayout((0,), 32768, 2), MoeLayout((0,), 32769, 2)
    trace = make_trace(range(3), fits)
    assert to_trtllm(trace).max() == 32767
    assert from_trtllm(to_trtllm(trace), range(3), fits).experts_TLK.max() == 32767
    with refused(FormatError, "do not fit int16", expected="holds 32768"):
        to_trtllm(make_trace(range(3), wide))
    with refused(FormatError, "do not fit int16"):
        from_trtllm(to_trtllm(trace), range(3), wide)


@pytest.mark.parametrize(
    ("payload", "got"),
    [
        pytest.param(array_of(CASE)[:-1], "[2, 2, 2]", id="a tail that was cut"),
        pytest.param(np.repeat(array_of(CASE), 2, 0)[:4], "[4, 2, 2]", id="a row for each token"),
        pytest.param(np.repeat(array_of(CASE), 2, 1)[:, :3], "[3, 3, 2]", id="a layer too many"),
        pytest.param(array_of(CASE)[:, :1], "[3, 1, 2]", id="a layer too few"),
        pytest.param(array_of(CASE)[..., :1], "[3, 2, 1]", id="another K"),
        pytest.param(array_of(CASE).reshape(-1), "[12]", id="flat"),
    ],
)
def test_an_array_of_another_shape_is_refused(payload: np.ndarray, got: str) -> None:
    with refused(FormatError, "does not fit the tokens and the model", expected="[3, 2, 2]", got=got):
        from_trtllm(payload, CASE.tokens, CASE.layout)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "int64", ">i2", "float16", "object", "U1"])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    with refused(FormatError, "have another type", expected="int16", got=np.dtype(dtype)):
        from_trtllm(array_of(CASE).astype(dtype), CASE.tokens, CASE.layout)


@pytest.mark.parametrize("payload", [None, CASE.moe_ids(), "x"], ids=["none", "list", "text"])
def test_what_is_no_array_is_refused(payload: Any) -> None:
    with refused(FormatError, "the payload is not TensorRT-LLM's routed_experts", expected="an array"):
        from_trtllm(payload, CASE.tokens, CASE.layout)


@pytest.mark.parametrize("route", [[0, 0], [8, 1], [-2, 1], [32767, 1]], ids=str)
def test_ids_that_no_router_chose_are_refused(route: list[int]) -> None:
    array = array_of(CASE).copy()
    array[1, 1] = route
    with pytest.raises(InvalidTraceError, match="row 1, layer 3"):
        from_trtllm(array, CASE.tokens, CASE.layout)


def test_no_tokens_have_no_rows() -> None:
    empty = np.zeros((0, 2, 2), np.int16)
    assert from_trtllm(empty, [], CASE.layout).num_rows == 0
    with pytest.raises(MoetraceError):
        from_trtllm(empty, [1, 2], CASE.layout)
