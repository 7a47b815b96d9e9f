"""Megatron-Core inference's payload: an array in process, nested lists over HTTP, with and without their type."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from payloads import CASES, Case, packed
from traces import assert_contract, make_trace, refused, routing_traces

from moetrace.dialects import from_megatron, from_megatron_http, to_megatron, to_megatron_http
from moetrace.errors import FormatError, InvalidTraceError, MissingRowError, MoetraceError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

CASE = Case("two layers", 8, 2, (1, 3), 5, 4)
IDS = CASE.moe_ids()
MANY = Case("int32", 32769, 2, (0, 1), 2, 4)


def array_of(case: Case, dtype: str = "int16") -> np.ndarray:
    shape = (len(case.positions), len(case.layers), case.top_k)
    return np.frombuffer(packed(case.moe_ids(), dtype), dtype).reshape(shape)


def read_http(payload: Any, case: Case = CASE) -> RoutingTrace:
    return from_megatron_http(payload, case.tokens, case.layout)


@pytest.mark.parametrize("case", [case for case in CASES if case.start == 0], ids=lambda case: case.name)
def test_payloads_made_by_hand_are_what_we_write_and_read(case: Case) -> None:
    text = '["ndarray", {"data": %s, "dtype": "int16"}]' % json.dumps(case.moe_ids())  # noqa: UP031
    trace = from_megatron(array_of(case), case.tokens, case.layout)
    assert_contract(trace)
    assert trace.experts_TLK.tolist() == case.moe_ids()
    assert trace.valid_T.all()
    assert (trace.engine, trace.order, trace.start) == ("megatron_core", "rank", 0)
    np.testing.assert_array_equal(to_megatron(trace), array_of(case), strict=True)
    assert json.dumps(to_megatron_http(trace)) == text
    assert read_http(json.loads(text), case) == trace
    assert read_http(tuple(json.loads(text)), case) == trace


def test_a_nested_list_as_before_pull_request_4301_is_read() -> None:
    assert read_http(IDS).experts_TLK.tolist() == IDS
    assert read_http(MANY.moe_ids(), MANY).experts_TLK.tolist() == MANY.moe_ids()


def test_more_than_32768_experts_are_int32() -> None:
    trace = from_megatron(array_of(MANY, "int32"), MANY.tokens, MANY.layout)
    assert trace.experts_TLK.tolist() == MANY.moe_ids()
    assert trace.experts_TLK.max() == 32768
    assert to_megatron(trace).dtype == np.int32
    assert to_megatron_http(trace)[1]["dtype"] == "int32"
    assert to_megatron(make_trace(range(3), MoeLayout((0,), 32768, 2))).dtype == np.int16
    with refused(FormatError, "have another type", expected="int32", got="int16"):
        from_megatron(array_of(MANY, "int32").astype(np.int16), MANY.tokens, MANY.layout)


def test_fewer_experts_may_be_int32() -> None:
    assert from_megatron(array_of(CASE, "int32"), CASE.tokens, CASE.layout).experts_TLK.tolist() == IDS
    assert read_http(["ndarray", {"data": IDS, "dtype": "int32"}]).experts_TLK.tolist() == IDS


@given(routing_traces(spans=False))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back(trace: RoutingTrace) -> None:
    if trace.start or not trace.valid_T.all():
        with pytest.raises(FormatError if trace.valid_T.all() else MissingRowError):
            to_megatron_http(trace)
        return
    assert trace.tokens is not None
    tokens = np.append(trace.tokens[: trace.stop], 7)
    facts: dict[str, Any] = {"order": trace.order, "fingerprint": trace.fingerprint, "engine": trace.engine}
    payload = json.loads(json.dumps(to_megatron_http(trace)))
    for got in (
        from_megatron(to_megatron(trace), tokens, trace.layout, **facts),
        from_megatron_http(payload, tokens, trace.layout, **facts),
    ):
        np.testing.assert_array_equal(got.experts_TLK, trace.experts_TLK)
        assert got.valid_T.all()
        assert (got.order, got.fingerprint, got.engine) == tuple(facts.values())


def test_a_row_that_was_not_captured_is_refused_not_filled() -> None:
    trace = make_trace(range(6), valid=[True, True, False, True, False])
    for write in (to_megatron, to_megatron_http):
        with refused(MissingRowError, "Megatron-Core's payload cannot say", got="2 of 5 missing"):
            write(trace)


@pytest.mark.parametrize(
    ("payload", "got"),
    [
        pytest.param(array_of(CASE)[:-1], "[2, 2, 2]", id="a row too few"),
        pytest.param(np.repeat(array_of(CASE), 2, 0)[:4], "[4, 2, 2]", id="a row for each token"),
        pytest.param(np.repeat(array_of(CASE), 2, 1)[:, :3], "[3, 3, 2]", id="a draft head's router"),
        pytest.param(array_of(CASE)[:, :1], "[3, 1, 2]", id="one pipeline stage"),
        pytest.param(array_of(CASE)[..., :1], "[3, 2, 1]", id="another K"),
        pytest.param(array_of(CASE).transpose(1, 0, 2), "[2, 3, 2]", id="layer-major"),
    ],
)
def test_another_shape_is_refused(payload: np.ndarray, got: str) -> None:
    for given_payload, function in (
        (payload, from_megatron),
        (payload.tolist(), from_megatron_http),
        (["ndarray", {"data": payload.tolist(), "dtype": "int16"}], from_megatron_http),
    ):
        with refused(FormatError, "does not fit the tokens and the model", expected="[3, 2, 2]", got=got):
            function(given_payload, CASE.tokens, CASE.layout)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int64", ">i2", ">i4", "float32", "object", "U1"])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    with refused(FormatError, "have another type", expected="int16 or int32", got=np.dtype(dtype)):
        from_megatron(array_of(CASE).astype(dtype), CASE.tokens, CASE.layout)


def test_a_list_is_no_array() -> None:
    with refused(FormatError, "not Megatron-Core's routing indices", expected="an array", got="list"):
        from_megatron(IDS, CASE.tokens, CASE.layout)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "object", "", None, 16, ["int16"]], ids=repr)
def test_a_tagged_array_of_another_type_is_refused(dtype: Any) -> None:
    with refused(FormatError, "not an array of Megatron-Core", expected="int16 or int32", got=repr(dtype)):
        read_http(["ndarray", {"data": IDS, "dtype": dtype}])


@pytest.mark.parametrize(
    "content", [None, [], "x", {}, {"data": IDS}, {"dtype": "int16"}, {"data": IDS, "dtype": "int16", "shape": [3]}]
)
def test_a_tagged_thing_that_is_no_array_is_refused(content: Any) -> None:
    with refused(FormatError, "not an array of Megatron-Core"):
        read_http(["ndarray", content])


def with_id(value: Any) -> Any:
    """The nested list with one id replaced."""
    changed = json.loads(json.dumps(IDS))
    changed[1][1][0] = value
    return changed


@pytest.mark.parametrize(
    "nested",
    [
        pytest.param(with_id(2.0), id="a float"),
        pytest.param(with_id(float("nan")), id="nan"),
        pytest.param(with_id(True), id="a bool"),
        pytest.param(with_id("5"), id="a text"),
        pytest.param(with_id(None), id="null"),
        pytest.param(with_id([5]), id="a list in a route"),
        pytest.param(with_id({"a": 1}), id="an object in a route"),
        pytest.param(with_id(2**31), id="more than int32"),
        pytest.param(with_id(-(2**31) - 1), id="less than int32"),
        pytest.param(with_id(2**63), id="more than int64"),
        pytest.param(with_id(10**30), id="a huge number"),
        pytest.param([*IDS[:2], IDS[2][:1]], id="a row with a layer too few"),
        pytest.param([*IDS[:2], [[1], [2, 3]]], id="a route with an id too few"),
        pytest.param(IDS[0], id="two lists"),
        pytest.param([IDS], id="four lists"),
        pytest.param([[[]]], id="no ids"),
        pytest.param([[]], id="no layers"),
        pytest.param(["abc"], id="texts"),
        pytest.param([1, 2], id="numbers"),
    ],
)
def test_a_list_that_is_not_of_ids_is_refused(nested: Any) -> None:
    for payload in (nested, ["ndarray", {"data": nested, "dtype": "int16"}]):
        with refused(FormatError, "the payload is not a nested list of ids"):
            read_http(payload)


@pytest.mark.parametrize("payload", [None, "x", 5, {"data": IDS}, ["ndarray", {"data": None, "dtype": "int16"}]])
def test_what_is_no_list_is_refused(payload: Any) -> None:
    with refused(FormatError, "the payload is not a nested list"):
        read_http(payload)


def test_ids_that_the_declared_type_does_not_hold_are_refused() -> None:
    with refused(FormatError, "the payload is not a nested list of ids", expected="fit int16"):
        read_http(["ndarray", {"data": with_id(32768), "dtype": "int16"}])
    with pytest.raises(InvalidTraceError, match="out of range"):
        read_http(["ndarray", {"data": with_id(32768), "dtype": "int32"}])


@pytest.mark.parametrize(
    ("route", "what"),
    [([0, 0], "names one expert twice"), ([8, 1], "out of range"), ([-1, 1], "out of range"), ([-1, -1], "out of")],
    ids=["never written", "no expert", "-1 in part", "-1"],
)
def test_ids_that_no_router_chose_are_refused(route: list[int], what: str) -> None:
    array = array_of(CASE).copy()
    array[1, 1] = route
    with pytest.raises(InvalidTraceError, match=f"row 1, layer 3 .*{what}"):
        from_megatron(array, CASE.tokens, CASE.layout)
    with pytest.raises(InvalidTraceError, match=f"row 1, layer 3 .*{what}"):
        read_http(array.tolist())


def test_no_rows_are_read_from_an_empty_list() -> None:
    assert from_megatron_http([], [5], CASE.layout).num_rows == 0
    with pytest.raises(MoetraceError):
        read_http([])
