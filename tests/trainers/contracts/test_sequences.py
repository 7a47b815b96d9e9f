"""One sequence as each trainer takes it: exactly its rows, types and layers; what was not captured is never data."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from documented import DOCUMENTED, WHOLE, shorter, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import Case
from traces import assert_contract, make_trace, refused, routing_traces

from moetrace.errors import FormatError, InvalidTraceError, MissingRowError, MoetraceError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace
from moetrace.trainers.contracts import CONTRACTS, SKYRL, from_prime_rl, to_prime_rl

CONTRACTS_OF_SEQUENCES = CONTRACTS | {"skyrl": SKYRL}
NAMES = list(DOCUMENTED)
CASE = Case("dense around", 12, 3, (1, 2, 4), 6, 6)
SAYS_MISSING = [name for name in NAMES if DOCUMENTED[name].missing is not None]
NEEDS_CAPTURED = ["verl", "nemo_rl", "automodel", "prime_rl"]


def depth(name: str, case: Case) -> int | None:
    return case.num_layers if DOCUMENTED[name].every_layer else None


def write(name: str, trace: RoutingTrace, tokens: Any, case: Case = CASE, **arguments: Any) -> np.ndarray:
    return CONTRACTS_OF_SEQUENCES[name].write(trace, tokens, depth(name, case), **arguments)


def read(name: str, payload: Any, tokens: Any, case: Case = CASE, **arguments: Any) -> RoutingTrace:
    if name in NEEDS_CAPTURED and "captured" not in arguments:
        arguments["captured"] = max(len(tokens) - 1, 0)
    return CONTRACTS_OF_SEQUENCES[name].read(payload, tokens, case.layout, depth(name, case), **arguments)


def test_every_contract_is_documented() -> None:
    assert list(CONTRACTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_what_is_documented_is_written_and_read(name: str, case: Case) -> None:
    by_hand = DOCUMENTED[name].rows(case)
    written = write(name, trace_of(case), case.tokens, case)
    np.testing.assert_array_equal(written, by_hand, strict=True)
    assert written.flags.c_contiguous
    trace = read(name, by_hand, case.tokens, case, order="set", fingerprint="f00d", engine="e 1")
    assert_contract(trace)
    assert trace == trace_of(case, order="set", fingerprint="f00d", engine="e 1")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_is_as_good_as_an_array(name: str) -> None:
    payload = torch.from_numpy(DOCUMENTED[name].rows(CASE))
    assert read(name, payload, torch.tensor(CASE.tokens)) == trace_of(CASE)
    np.testing.assert_array_equal(write(name, trace_of(CASE), torch.tensor(CASE.tokens)), payload.numpy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("missing", [(0,), (2,), (0, 1, 2, 3), (1, 3)], ids=str)
def test_a_missing_row_is_refused_unless_the_trainer_can_be_told(name: str, missing: tuple[int, ...]) -> None:
    documented, trace = DOCUMENTED[name], trace_of(CASE, missing)
    with refused(MissingRowError, "", got=f"{len(missing)} of 6 missing, the first at position {missing[0]}"):
        write(name, trace, CASE.tokens)
    for word in ("live", "dummy"):
        if word != documented.word:
            with refused(FormatError, "missing is not known to", expected="'error'", got=repr(word)):
                write(name, trace, CASE.tokens, missing=word)
    if name not in SAYS_MISSING:
        return
    written = write(name, trace, CASE.tokens, missing=documented.word)
    np.testing.assert_array_equal(written, documented.rows(CASE, missing), strict=True)
    assert read(name, written, CASE.tokens) == trace


@pytest.mark.parametrize("name", SAYS_MISSING)
def test_the_error_names_the_word_that_permits(name: str) -> None:
    with refused(MissingRowError, "needs every row", fix=f"missing='{DOCUMENTED[name].word}'"):
        write(name, trace_of(CASE, (1,)), CASE.tokens)


@pytest.mark.parametrize("name", ["verl", "slime", "automodel", "prime_rl"])
def test_where_nothing_can_be_said_no_word_permits(name: str) -> None:
    with refused(MissingRowError, "cannot say that a row is missing", fix="Leave this sequence out"):
        write(name, trace_of(CASE, (4,)), CASE.tokens)


def test_skyrl_takes_a_prefix() -> None:
    behind = trace_of(CASE, (3, 4))
    with refused(MissingRowError, "needs every row", fix="missing='dummy'"):
        write("skyrl", behind, CASE.tokens)
    written = write("skyrl", behind, CASE.tokens, missing="dummy")
    np.testing.assert_array_equal(written, DOCUMENTED["skyrl"].rows(CASE)[:3], strict=True)
    assert read("skyrl", written, CASE.tokens) == behind
    with refused(MissingRowError, "cannot say that a row is missing", got="2 of 6 missing, the first at position 1"):
        write("skyrl", trace_of(CASE, (1, 4)), CASE.tokens, missing="dummy")
    everything = np.concatenate([written, written])
    assert read("skyrl", everything, CASE.tokens).valid_T.tolist() == [True] * 6
    with refused(FormatError, "does not fit the tokens", expected="[6, 6, 3]", got="[7, 6, 3]"):
        read("skyrl", np.concatenate([everything, written[:1]]), CASE.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_alone_lacks_the_earlier_rows(name: str) -> None:
    with refused(MissingRowError, "", got="2 of 6 missing, the first at position 0"):
        write(name, trace_of(CASE).slice(2, 5), CASE.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_behind_the_trace_have_no_rows(name: str) -> None:
    with refused(MissingRowError, "", got="1 of 7 missing, the first at position 5"):
        write(name, trace_of(CASE), [*CASE.tokens, 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_context_that_was_cut_keeps_its_rows(name: str) -> None:
    written = write(name, trace_of(CASE), CASE.tokens[:4])
    by_hand = DOCUMENTED[name].rows(shorter(CASE, 6))[:4]  # the fourth token was an input, so its row is there
    np.testing.assert_array_equal(written, by_hand[: 3 if name in ("slime", "miles") else 4], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_last_token_is_data_where_there_is_place(name: str) -> None:
    scored = make_trace(CASE.tokens, CASE.layout, rows=6)
    written = write(name, scored, CASE.tokens)
    places = list(CASE.layers) if DOCUMENTED[name].every_layer else [0, 1, 2]
    np.testing.assert_array_equal(written[:, places], scored.experts_TLK[: len(written)])
    again = read(name, written, CASE.tokens, captured=6 if name in NEEDS_CAPTURED else None)
    assert again == (scored.slice(0, 5) if name in ("slime", "miles") else scored)


@pytest.mark.parametrize("name", NAMES)
def test_other_tokens_are_refused(name: str) -> None:
    tokens = [*CASE.tokens[:3], 7, *CASE.tokens[4:]]
    with refused(TokenMismatchError, "first difference at position 3", expected="token 109", got="token 7"):
        write(name, trace_of(CASE), tokens)
    with refused(TokenMismatchError, "recorded on other tokens", expected="SHA-256"):
        write(name, trace_of(CASE).without_tokens(), tokens)
    assert write(name, trace_of(CASE).without_tokens(), CASE.tokens).size


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_traces_is_no_sequence(name: str) -> None:
    with refused(InvalidTraceError, "this is no trace", expected="a RoutingTrace", got="[RoutingTrace("):
        write(name, [trace_of(CASE)], CASE.tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_no_whole_numbers_are_refused_not_rounded(name: str) -> None:
    payload, bent = write(name, trace_of(CASE), CASE.tokens), [token + 0.25 for token in CASE.tokens]
    for use in (lambda: write(name, trace_of(CASE), bent), lambda: read(name, payload, bent)):
        with refused(InvalidTraceError, "tokens must be the ids of one sequence", got="float64"):
            use()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_another_number_of_rows_is_refused(name: str, change: int) -> None:
    payload = np.concatenate([DOCUMENTED[name].rows(CASE)] * 2)[: len(DOCUMENTED[name].rows(CASE)) + change]
    if (name, change) == ("verl", -1) or (name == "skyrl" and change < 2):
        assert read(name, payload, CASE.tokens, captured=min(len(payload), 5)).num_valid == min(len(payload), 5)
        return
    with refused(FormatError, "does not fit the tokens and the model", got=f"[{len(payload)}, "):
        read(name, payload, CASE.tokens, captured=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(None), slice(None), slice(1, None))], ids=str)
def test_another_number_of_layers_or_experts_per_token_is_refused(name: str, cut: tuple) -> None:
    with refused(FormatError, "does not fit the tokens and the model"):
        read(name, DOCUMENTED[name].rows(CASE)[cut], CASE.tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", ">i4", "float32"])
def test_another_type_is_refused(name: str, dtype: str) -> None:
    payload = DOCUMENTED[name].rows(CASE)
    if dtype in dict(DOCUMENTED[name].limits):
        assert read(name, payload.astype(dtype), CASE.tokens) == trace_of(CASE)
        return
    with refused(FormatError, "have another type", got=np.dtype(dtype)):
        read(name, payload.astype(dtype), CASE.tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("payload", [None, DOCUMENTED["verl"].rows(CASE).tolist(), "x"], ids=["none", "list", "text"])
def test_what_is_no_array_is_refused(name: str, payload: Any) -> None:
    with refused(FormatError, "the payload is not", expected="an array"):
        read(name, payload, CASE.tokens)


@pytest.mark.parametrize(("name", "dtype", "limit"), [("verl", "int16", 32768), ("maxtext", "int16", 32768)])
def test_a_model_with_more_experts_than_the_type_holds_is_refused(name: str, dtype: str, limit: int) -> None:
    for count in (limit, limit + 1):
        case = Case("many", count, 2, (0,), 1, 3)
        if count == limit:
            payload = write(name, trace_of(case), case.tokens, case)
            assert payload.max() == limit - 1
            assert read(name, payload, case.tokens, case) == trace_of(case)
            continue
        for call in (
            lambda: write(name, trace_of(case), case.tokens, case),  # noqa: B023
            lambda: read(name, payload, case.tokens, case),  # noqa: B023
        ):
            with refused(FormatError, "do not fit", expected=f"at most {limit} experts, for {dtype}", got=count):
                call()


@pytest.mark.parametrize(("num_experts", "dtypes"), [(128, "int8 int16 int32"), (129, "int16 int32")])
def test_nemo_rl_refuses_a_type_in_which_ids_would_have_wrapped(num_experts: int, dtypes: str) -> None:
    case = Case("edge", num_experts, 2, (0, 1), 2, 4)
    for dtype in ("int8", "int16", "int32"):
        payload = (DOCUMENTED["nemo_rl"].rows(case) % 100).astype(dtype)
        if dtype in dtypes.split():
            assert read("nemo_rl", payload, case.tokens, case).num_valid == 3
        else:
            with refused(FormatError, "have another type", expected="int16 or int32", got="int8"):
                read("nemo_rl", payload, case.tokens, case)


@pytest.mark.parametrize("name", ["skyrl", "prime_rl"])
def test_types_that_follow_the_highest_id_of_an_array_are_read(name: str) -> None:
    case = Case("wide", 512, 2, (0, 1), 2, 4)
    ids = np.arange(2 * 2 * (3 if name == "skyrl" else 4), dtype=np.uint8).reshape(-1, 2, 2)
    assert read(name, ids, case.tokens, case).experts_TLK[:3].tolist() == ids[:3].tolist()


@pytest.mark.parametrize("name", [name for name in NAMES if DOCUMENTED[name].every_layer])
def test_dense_layers_are_dropped_by_their_number_and_hold_nothing_where_that_is_documented(name: str) -> None:
    payload = DOCUMENTED[name].rows(CASE)
    payload[:, [0, 3, 5]] = 11
    if name in ("slime", "miles"):
        with refused(FormatError, "does not route names an expert", expected="[1, 2, 4]"):
            read(name, payload, CASE.tokens)
        payload[:, [0, 3, 5]] = -1  # as sglang-jax does
    assert read(name, payload, CASE.tokens) == trace_of(CASE)


@pytest.mark.parametrize("name", ["verl", "nemo_rl"])
def test_moe_layers_alone_are_written_and_read_where_that_is_documented(name: str) -> None:
    contract = CONTRACTS[name]
    written = contract.write(trace_of(CASE), CASE.tokens)
    np.testing.assert_array_equal(written, DOCUMENTED[name].rows(CASE)[:, CASE.layers], strict=True)
    assert contract.read(written, CASE.tokens, CASE.layout, captured=5) == trace_of(CASE)
    with refused(FormatError, "does not fit the tokens and the model", expected="[6, 6, 3]", got="[6, 3, 3]"):
        contract.read(written, CASE.tokens, CASE.layout, 6, captured=5)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_layers_is_asked_for_where_it_is_needed(name: str) -> None:
    contract = CONTRACTS_OF_SEQUENCES[name]
    if name == "automodel":
        with refused(FormatError, "has MoE layers only", expected="no num_layers", got=6):
            contract.write(trace_of(CASE), CASE.tokens, 6)
        return
    with refused(FormatError, "MoE layers have no place", expected="below 4", got="[1, 2, 4]"):
        contract.write(trace_of(CASE), CASE.tokens, 4)
    if name not in ("verl", "nemo_rl"):
        with refused(FormatError, "has all decoder layers", expected="num_layers", fix="num_hidden_layers"):
            contract.write(trace_of(CASE), CASE.tokens)


@pytest.mark.parametrize("name", NEEDS_CAPTURED)
def test_rows_that_nobody_vouches_for_are_not_read(name: str) -> None:
    payload, contract = DOCUMENTED[name].rows(CASE), CONTRACTS[name]
    with refused(FormatError, "does not say which of its rows are routes", expected="captured", fix="len(tokens) - 1"):
        contract.read(payload, CASE.tokens, CASE.layout, depth(name, CASE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [0, 1])
def test_rows_that_are_not_captured_are_never_data(name: str, fill: int) -> None:
    """Also where what stands there looks like a route: the arange of a pad, or another token's."""
    payload = DOCUMENTED[name].rows(CASE)
    payload[[1, 3]] = np.arange(3) if fill else 0
    said = np.isin(np.arange(len(payload)), [0, 2, 4])
    trace = read(name, payload, CASE.tokens, captured=said)
    assert_contract(trace)
    assert trace == trace_of(CASE, (1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_that_are_called_captured_are_refused(name: str) -> None:
    payload = DOCUMENTED[name].rows(CASE)
    payload[2] = 0
    with refused(InvalidTraceError, "row 2, layer 1 names one expert twice"):
        read(name, payload, CASE.tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("captured", [-1, 7, True, 2.0, [True], [1, 1, 0, 0, 0], "5"], ids=repr)
def test_captured_that_fits_no_row_is_refused(name: str, captured: Any) -> None:
    with refused(FormatError, "captured does not fit", expected="rows, or"):
        read(name, DOCUMENTED[name].rows(CASE), CASE.tokens, captured=captured)


@pytest.mark.parametrize("name", SAYS_MISSING)
@pytest.mark.parametrize("place", [(1, 2, 0), (1, 2), (1, slice(None), 1)], ids=str)
def test_a_row_that_is_missing_in_part_is_refused(name: str, place: tuple) -> None:
    payload = DOCUMENTED[name].rows(CASE)
    payload[place] = -1
    with refused(FormatError, "row 1 is captured in part", expected="-1 in all of a row or nowhere"):
        read(name, payload, CASE.tokens)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAYS_MISSING and name != "prime_rl"])
@pytest.mark.parametrize("place", [(1, 2, 0), 1], ids=str)
def test_minus_1_is_no_mark_where_it_is_not_documented(name: str, place: Any) -> None:
    payload = DOCUMENTED[name].rows(CASE).astype("int32" if name == "skyrl" else DOCUMENTED[name].dtype(12))
    payload[place] = -1
    with refused(InvalidTraceError, "is out of range", got=-1):
        read(name, payload, CASE.tokens)


@pytest.mark.parametrize("name", [name for name in NAMES if DOCUMENTED[name].last in ("spread", "first")])
@given(st.integers(1, 600), st.integers(1, 8), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_fillers_name_k_different_experts(name: str, num_experts: int, top_k: int, num_tokens: int) -> None:
    case = Case("any", num_experts, min(top_k, num_experts), (0,), 1, num_tokens)
    last = write(name, trace_of(case), case.tokens, case)[-1]
    assert all(len({*route}) == case.top_k for route in last.tolist())
    assert 0 <= last.min() <= last.max() < num_experts


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(name: str, data: st.DataObject) -> None:
    layers = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)
    num_experts = data.draw(st.sampled_from([2, 127, 128, 129, 255, 256, 257, 600]))
    layout = MoeLayout(tuple(sorted(data.draw(layers))), num_experts, data.draw(st.integers(1, min(num_experts, 4))))
    trace = data.draw(routing_traces(layout, max_rows=6, spans=False))
    assert trace.tokens is not None
    case = Case("drawn", num_experts, layout.top_k, layout.layers, 12, len(trace.tokens))
    word = DOCUMENTED[name].word
    try:
        written = write(name, trace, trace.tokens, case, missing=word or "error")
    except MissingRowError:
        lacking = [position for position in range(len(trace.tokens) - 1) if not captured_at(trace, position)]
        assert lacking
        assert word is None or (name == "skyrl" and any(captured_at(trace, later) for later in range(lacking[0], 99)))
        return
    said = np.array([captured_at(trace, position) for position in range(len(written))], bool)
    facts = {"order": trace.order, "fingerprint": trace.fingerprint, "engine": trace.engine}
    again = read(name, written, trace.tokens, case, captured=said, **facts)
    assert_contract(again)
    assert again.start == 0
    for position in range(len(trace.tokens)):
        if position == len(trace.tokens) - 1 and name in ("slime", "miles"):
            continue
        assert captured_at(again, position) == captured_at(trace, position)
        if captured_at(trace, position):
            np.testing.assert_array_equal(again.experts_TLK[position], trace.experts_TLK[position - trace.start])
    assert (again.order, again.fingerprint, again.engine) == tuple(facts.values())


def captured_at(trace: RoutingTrace, position: int) -> bool:
    return trace.start <= position < trace.stop and bool(trace.valid_T[position - trace.start])


# --- prime-rl's bytes ---


def test_prime_rl_takes_bytes_that_say_their_shape() -> None:
    written = to_prime_rl(trace_of(CASE), CASE.tokens, 6)
    assert (written["shape"], written["dtype"], list(written)) == ([6, 6, 3], "uint8", ["data", "shape", "dtype"])
    assert written["data"] == DOCUMENTED["prime_rl"].rows(CASE).tobytes()
    assert from_prime_rl(written, CASE.tokens, CASE.layout, 6, captured=5) == trace_of(CASE)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"data": b""}, "is cut"),
        ({"data": "x"}, "is not prime-rl's"),
        ({"data": None}, "is not prime-rl's"),
        ({"shape": [6, 6]}, "is cut"),
        ({"shape": [6, 6, -3]}, "is not prime-rl's"),
        ({"shape": [6, 6, 3.0]}, "is not prime-rl's"),
        ({"shape": None}, "is not prime-rl's"),
        ({"shape": [18, 6]}, "does not fit the tokens and the model"),
        ({"shape": [6, 3, 6]}, "does not fit the tokens and the model"),
        ({"dtype": "int32"}, "is not prime-rl's"),
        ({"dtype": "uint16"}, "is cut"),
        ({"dtype": ["uint8"]}, "is not prime-rl's"),
    ],
    ids=str,
)
def test_prime_rl_bytes_that_are_something_else_are_refused(change: dict, what: str) -> None:
    payload = to_prime_rl(trace_of(CASE), CASE.tokens, 6) | change
    with pytest.raises(MoetraceError, match=what):
        from_prime_rl(payload, CASE.tokens, CASE.layout, 6, captured=5)


def test_contracts_need_numpy_only() -> None:
    script = (
        "import sys, moetrace.trainers.contracts\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'megatron', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
