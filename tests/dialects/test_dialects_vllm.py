"""vLLM's payload: all decoder layers in the narrowest type, in process as an array, over HTTP as a `.npy` in base64."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import CASES, Case, b64, npy, npy_of, packed
from traces import assert_contract, make_trace, refused, routing_traces

from moetrace.dialects import from_vllm, from_vllm_http, to_vllm, to_vllm_http
from moetrace.errors import FormatError, InvalidTraceError, MissingRowError, MoetraceError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

CASE = Case("dense at both ends", 8, 2, (1, 3), 5, 4)
IDS = CASE.all_ids()
WIDE = Case("uint16", 300, 2, (1, 3), 5, 4)


def dtype_of(case: Case) -> tuple[str, str]:
    """The type of the ids, by name and as a `.npy` spells it."""
    return ("uint8", "|u1") if case.num_experts <= 256 else ("uint16", "<u2")


def shape_of(case: Case) -> tuple[int, int, int]:
    return len(case.positions), case.num_layers, case.top_k


def array_of(case: Case, dense: int = 0) -> np.ndarray:
    return np.array(case.all_ids(dense), dtype_of(case)[0]).reshape(shape_of(case))


def text_of(case: Case, dense: int = 0) -> str:
    dtype, descr = dtype_of(case)
    return b64(npy(descr, shape_of(case), packed(case.all_ids(dense), dtype)))


def read(text: Any, case: Case = CASE, **changes: Any) -> RoutingTrace:
    known = {"tokens": case.tokens, "layout": case.layout, "num_layers": case.num_layers, "start": case.start}
    return from_vllm_http(text, **{**known, **changes})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_payloads_made_by_hand_are_what_we_write_and_read(case: Case) -> None:
    trace = RoutingTrace.build(
        np.array(case.moe_ids(), int).reshape(-1, len(case.layers), case.top_k),
        case.layout,
        case.tokens,
        start=case.start,
        engine="vllm",
    )
    written = to_vllm(trace, case.num_layers)
    assert written.dtype == dtype_of(case)[0]
    np.testing.assert_array_equal(written, array_of(case), strict=True)
    assert to_vllm_http(trace, case.num_layers) == text_of(case)
    for got in (
        read(text_of(case), case),
        from_vllm(array_of(case), case.tokens, case.layout, case.num_layers, start=case.start),
    ):
        assert_contract(got)
        assert got == trace
        assert got.experts_TLK.tolist() == case.moe_ids()


def test_numpys_own_file_is_read() -> None:
    file = io.BytesIO()
    np.save(file, array_of(WIDE))
    assert read(b64(file.getvalue()), WIDE).experts_TLK.tolist() == WIDE.moe_ids()


def test_clients_load_what_we_write() -> None:
    text = to_vllm_http(read(text_of(WIDE), WIDE), 5)
    loaded = np.load(io.BytesIO(base64.b64decode(text)))
    assert loaded.dtype == np.uint16
    assert loaded.tolist() == WIDE.all_ids()


@pytest.mark.parametrize("dense", [1, 7, 255])
def test_what_dense_layers_hold_means_nothing(dense: int) -> None:
    assert read(text_of(CASE, dense)).experts_TLK.tolist() == CASE.moe_ids()
    assert from_vllm(array_of(CASE, dense), CASE.tokens, CASE.layout, 5).experts_TLK.tolist() == CASE.moe_ids()


def test_an_array_in_another_memory_order_is_the_same_array() -> None:
    array = np.asfortranarray(array_of(CASE))
    assert from_vllm(array, CASE.tokens, CASE.layout, 5).experts_TLK.tolist() == CASE.moe_ids()


def test_the_trace_says_of_itself_what_the_client_knows() -> None:
    trace = read(text_of(CASE), order="set", fingerprint="f", engine="vllm 0.26.0")
    assert (trace.order, trace.fingerprint, trace.engine, trace.layout) == ("set", "f", "vllm 0.26.0", CASE.layout)
    assert trace.valid_T.all()
    assert trace.tokens is not None
    assert trace.tokens.tolist() == CASE.tokens


@given(routing_traces(spans=False), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back(trace: RoutingTrace, more: int) -> None:
    layers, num_layers = trace.layout.layers, trace.layout.layers[-1] + 1 + more
    if not trace.valid_T.all() or len(set(layers)) < len(layers):
        with pytest.raises(MoetraceError):
            to_vllm_http(trace, num_layers)
        return
    assert trace.tokens is not None
    tokens = np.append(trace.tokens[: trace.stop], 7)
    facts: dict[str, Any] = {"order": trace.order, "fingerprint": trace.fingerprint, "engine": trace.engine}
    for got in (
        from_vllm_http(to_vllm_http(trace, num_layers), tokens, trace.layout, num_layers, start=trace.start, **facts),
        from_vllm(to_vllm(trace, num_layers), tokens, trace.layout, num_layers, start=trace.start, **facts),
    ):
        np.testing.assert_array_equal(got.experts_TLK, trace.experts_TLK)
        assert got.valid_T.all()
        assert (got.start, got.order, got.fingerprint, got.engine) == (trace.start, *facts.values())


# --- writing what has no place ---


def test_a_row_that_was_not_captured_is_refused_not_filled() -> None:
    trace = make_trace(range(6), valid=[True, True, False, True, False])
    for write in (to_vllm, to_vllm_http):
        with refused(MissingRowError, "vLLM's payload cannot say", got="2 of 5 missing, the first at position 2"):
            write(trace, 6)


@pytest.mark.parametrize(("layers", "num_layers"), [((1, 3), 3), ((1, 1, 3), 5)])
def test_layers_without_a_place_are_refused(layers: tuple[int, ...], num_layers: int) -> None:
    layout = MoeLayout(layers, 8, 2)
    with refused(FormatError, "have no place in vLLM's payload", expected=num_layers, got=list(layers)):
        to_vllm(make_trace(CASE.tokens, layout), num_layers)
    with refused(FormatError, "have no place in vLLM's payload", got=list(layers)):
        from_vllm(array_of(CASE), CASE.tokens, layout, num_layers)


# --- arrays that are not the engine's ---


@pytest.mark.parametrize(
    ("payload", "changes", "expected", "got"),
    [
        pytest.param(array_of(CASE)[:-1], {}, "[3, 5, 2]", "[2, 5, 2]", id="a row too few"),
        pytest.param(np.concatenate([array_of(CASE)] * 2)[:4], {}, "[3, 5, 2]", "[4, 5, 2]", id="a row for each token"),
        pytest.param(array_of(CASE), {"start": 1}, "[2, 5, 2]", "[3, 5, 2]", id="a start that was not heeded"),
        pytest.param(array_of(CASE)[1:], {}, "[3, 5, 2]", "[2, 5, 2]", id="a start that was not said"),
        pytest.param(array_of(CASE)[:, 1:], {}, "[3, 5, 2]", "[3, 4, 2]", id="a layer too few"),
        pytest.param(array_of(CASE), {"num_layers": 6}, "[3, 6, 2]", "[3, 5, 2]", id="another number of layers"),
        pytest.param(array_of(CASE)[:, [1, 3]], {}, "[3, 5, 2]", "[3, 2, 2]", id="MoE layers only"),
        pytest.param(array_of(CASE)[..., :1], {}, "[3, 5, 2]", "[3, 5, 1]", id="another K"),
        pytest.param(array_of(CASE)[None], {}, "[3, 5, 2]", "[1, 3, 5, 2]", id="a batch axis"),
        pytest.param(array_of(CASE).transpose(1, 0, 2), {}, "[3, 5, 2]", "[5, 3, 2]", id="layer-major"),
    ],
)
def test_an_array_of_another_shape_is_refused(payload: np.ndarray, changes: Any, expected: str, got: str) -> None:
    known = {"tokens": CASE.tokens, "layout": CASE.layout, "num_layers": 5, **changes}
    with refused(FormatError, "does not fit the tokens and the model", expected=expected, got=got):
        from_vllm(payload, **known)


@pytest.mark.parametrize("dtype", ["uint16", "int8", "int16", "int32", "int64", "float32", "bool", "object", "U1"])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    with refused(FormatError, "have another type", expected="uint8", got=np.dtype(dtype)):
        from_vllm(array_of(CASE).astype(dtype), CASE.tokens, CASE.layout, 5)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16"])
def test_an_array_too_narrow_or_big_endian_is_refused(dtype: str) -> None:
    with refused(FormatError, "have another type", expected="uint16", got=np.dtype(dtype)):
        from_vllm(array_of(WIDE).astype(dtype), WIDE.tokens, WIDE.layout, 5)


@pytest.mark.parametrize(
    "payload", [None, IDS, "x", text_of(CASE), 5], ids=["none", "list", "text", "HTTP's", "number"]
)
def test_what_is_no_array_is_refused(payload: Any) -> None:
    with refused(FormatError, "the payload is not vLLM's routed_experts", expected="an array"):
        from_vllm(payload, CASE.tokens, CASE.layout, 5)


@pytest.mark.parametrize("start", [-1, 5, 1.0, None, True])
def test_a_start_that_is_no_position_is_refused(start: Any) -> None:
    with pytest.raises(MoetraceError, match="start"):
        from_vllm(array_of(CASE), CASE.tokens, CASE.layout, 5, start=start)
    with pytest.raises(MoetraceError, match="start"):
        read(text_of(CASE), start=start)


# --- ids that are not a router's ---


@pytest.mark.parametrize(
    ("route", "what"),
    [
        pytest.param([0, 0], "row 1, layer 3 names one expert twice", id="never written"),
        pytest.param([255, 255], "row 1, layer 3 is out of range", id="fill value of uint8"),
        pytest.param([6, 6], "row 1, layer 3 names one expert twice", id="one expert twice"),
        pytest.param([8, 1], "row 1, layer 3 is out of range", id="no expert"),
    ],
)
def test_ids_that_no_router_chose_are_refused(route: list[int], what: str) -> None:
    array = array_of(CASE)
    array[1, 3] = route
    with pytest.raises(InvalidTraceError, match=what):
        from_vllm(array, CASE.tokens, CASE.layout, 5)
    with pytest.raises(InvalidTraceError, match=what):
        read(b64(npy("|u1", (3, 5, 2), array.tobytes())))


def test_another_models_layers_are_noticed() -> None:
    with pytest.raises(InvalidTraceError, match="layer 2 names one expert twice"):
        read(text_of(CASE), layout=MoeLayout((1, 2), 8, 2))


# --- files that are not vLLM's ---

DATA = packed(IDS, "uint8")
GOOD = npy("|u1", (3, 5, 2), DATA)
NESTED = "[" * 120


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:5], id="truncated magic"),
        pytest.param(GOOD[:8], id="no length of the header"),
        pytest.param(GOOD[:60], id="truncated header"),
        pytest.param(b"PK\x03\x04" + GOOD, id="npz"),
        pytest.param(DATA, id="ids without a header"),
        pytest.param(pickle.dumps(array_of(CASE)), id="a pickle"),
        pytest.param(npy("|u1", (3, 5, 2), DATA, version=b"\x01\x01"), id="version 1.1"),
        pytest.param(npy("|u1", (3, 5, 2), DATA, version=b"\x02\x00"), id="version 2"),
        pytest.param(npy("|u1", (3, 5, 2), DATA, version=b"\x03\x00"), id="version 3"),
        pytest.param(npy("|u1", (3, 5, 2), DATA, version=b"\x07\x00"), id="version 7"),
        pytest.param(
            npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 5, 2), }" + " " * 300, DATA), id="long"
        ),
        pytest.param(npy_of("{'descr': '|u1', 'shape': (3, 5, 2), }", DATA), id="a key too few"),
        pytest.param(npy_of("{'descr': '|u1', 'fortran_order': 0, 'shape': (3, 5, 2), }", DATA), id="order a number"),
        pytest.param(npy("|u1", "[3, 5, 2]", DATA), id="shape a list"),
        pytest.param(npy("|u1", "(3.0, 5.0, 2.0)", DATA), id="shape of floats"),
        pytest.param(npy("nonsense", (3, 5, 2), DATA), id="no type"),
        pytest.param(npy("[('a', '|u1'), ('a', '|u1')]", (3, 5, 2), DATA), id="a record type that is none"),
        pytest.param(npy_of("[1, 2]", DATA), id="no dictionary"),
        pytest.param(npy_of("{'descr': ", DATA), id="no literal"),
        pytest.param(npy_of(NESTED, DATA), id="nested"),
        pytest.param(npy_of("'''", DATA), id="no end"),
        pytest.param(npy_of("  {'descr'\n:\n 1", DATA), id="indented"),
        pytest.param(npy_of("__import__('os').system('true')", DATA), id="code"),
        pytest.param(npy_of("\x00" * 20, DATA), id="null bytes"),
    ],
)
def test_what_is_no_npy_of_vllms_is_refused(file: bytes) -> None:
    with refused(FormatError, "the payload is not a .npy of expert ids"):
        read(b64(file))


@pytest.mark.parametrize(
    ("descr", "dtype"),
    [("<i4", "int32"), ("|i1", "int8"), ("<u2", "uint16"), ("<i8", "int64"), (">u2", "uint16")],
)
def test_a_file_of_another_integer_is_refused(descr: str, dtype: str) -> None:
    with refused(FormatError, "another form than vLLM's", expected="|u1 in C order", got=f"{descr} in C order"):
        read(b64(npy(descr, (3, 5, 2), packed(IDS, dtype))))


def test_a_big_endian_file_is_refused() -> None:
    file = npy(">u2", (3, 5, 2), packed(WIDE.all_ids(), "uint16", ">"))
    with refused(FormatError, "another form than vLLM's", expected="<u2 in C order", got=">u2 in C order"):
        read(b64(file), WIDE)


def test_a_fortran_ordered_file_is_refused() -> None:
    with refused(FormatError, "another form than vLLM's", expected="C order", got="|u1 in Fortran order"):
        read(b64(npy("|u1", (3, 5, 2), DATA, fortran=True)))


def test_a_file_of_floats_with_nan_is_refused() -> None:
    data = np.full((3, 5, 2), np.nan, "<f4").tobytes()
    with refused(FormatError, "another form than vLLM's", got="<f4"):
        read(b64(npy("<f4", (3, 5, 2), data)))


@pytest.mark.parametrize("descr", ["<U1", "|S1", "|V1", "|b1", "<M8[s]", "[('a', '|u1'), ('b', '|u1')]"])
def test_a_file_of_texts_or_records_is_refused(descr: str) -> None:
    with refused(FormatError, "another form than vLLM's", expected="|u1 in C order"):
        read(b64(npy(descr, (3, 5, 2), DATA)))


class _Tripwire:
    fired = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _fire, ()


def _fire() -> None:
    _Tripwire.fired = True


def test_an_object_file_is_refused_and_never_unpickled() -> None:
    with refused(FormatError, "another form than vLLM's", expected="|u1", got="|O"):
        read(b64(npy("|O", (3, 5, 2), pickle.dumps(_Tripwire()))))
    assert not _Tripwire.fired
    pickle.loads(pickle.dumps(_Tripwire()))
    assert _Tripwire.fired  # it would have


@pytest.mark.parametrize(
    "shape", [(10**12, 5, 2), (2**62, 2**62, 2**62), (2**63, 5, 2), (-3, 5, 2), (3, 5), (3, 5, 2, 1), (30,), ()]
)
def test_a_declared_shape_takes_no_memory(shape: tuple[int, ...]) -> None:
    text = "(" + "".join(f"{n}, " for n in shape) + ")"
    with refused(FormatError, "the shape of the .npy does not fit", expected="[3, 5, 2]", got=list(shape)):
        read(b64(npy("|u1", text, DATA)))


@pytest.mark.parametrize(
    ("data", "got"), [(DATA[:-1], "29 B"), (DATA + b"\x00", "31 B"), (b"", "0 B"), (DATA * 2, "60 B")]
)
def test_a_file_that_does_not_hold_what_it_declares_is_refused(data: bytes, got: str) -> None:
    with refused(FormatError, "does not hold what it declares", expected="[3, 5, 2] ids", got=got):
        read(b64(npy("|u1", (3, 5, 2), data)))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [((2, 5, 2), {}), ((4, 5, 2), {}), ((3, 4, 2), {}), ((3, 5, 3), {}), ((3, 5, 2), {"start": 1})],
    ids=["a row too few", "a row for each token", "a layer too few", "another K", "a start that was not heeded"],
)
def test_a_file_of_another_shape_is_refused(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    file = npy("|u1", shape, bytes(int(np.prod(shape))))
    with refused(FormatError, "the shape of the .npy does not fit the tokens and the model", got=list(shape)):
        read(b64(file), **changes)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b64(GOOD)[:-1], id="cut"),
        pytest.param(b64(GOOD) + "=", id="too much padding"),
        pytest.param(b64(GOOD[:-1]).rstrip("="), id="no padding"),
        pytest.param(b64(GOOD).replace("T", "-", 1), id="url-safe alphabet"),
        pytest.param(b64(GOOD) + "\n", id="a line break"),
        pytest.param("é", id="not ASCII"),
        pytest.param(GOOD, id="bytes"),
        pytest.param(None, id="none"),
    ],
)
def test_what_is_not_base64_is_refused(text: Any) -> None:
    with refused(FormatError, "the payload is not base64 of .npy"):
        read(text)


@given(st.integers(0, 8 * len(GOOD) - 1))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:Reading")
def test_a_flipped_bit_never_gives_an_illegal_trace(bit: int) -> None:
    file = bytearray(GOOD)
    file[bit // 8] ^= 1 << bit % 8
    try:
        trace = read(b64(bytes(file)))
    except MoetraceError:
        return
    assert_contract(trace)
    assert trace.num_rows == 3
