"""What is asked, and what answers mean: pure functions, against answers made by hand and the server's own schema."""

from __future__ import annotations

import base64
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traces import dyed_ids, make_trace, refused

from moetrace.client.events import Events
from moetrace.client.wire import Asked, asked_of, completions_of, parameters_of, sampling_of
from moetrace.container import BytesSource, Container
from moetrace.dialects import to_lightllm
from moetrace.engines.requests import SamplingParams
from moetrace.errors import FormatError, MissingRowError, RequestError, ServerError, TokenMismatchError, TraceError
from moetrace.format import save
from moetrace.layout import MoeLayout
from moetrace.server.schemas import GenerateParameters
from moetrace.trace import RoutingTrace

PROMPT, OUTPUT = [5, 6, 7], [8, 9]
LAYOUT = MoeLayout((1, 2, 5), 16, 2)
TRACE = make_trace(PROMPT + OUTPUT)


def asked(inputs: Any = tuple(PROMPT), n: int = 1, routes: Any = True, start: int = 0) -> Asked:
    return asked_of(inputs, n, routes, start, None)


@pytest.mark.parametrize("prompt", [[1.9, 2], [1.0], ["1"], [None], np.array([1.5]), [[1]]], ids=repr)
def test_a_prompt_that_is_neither_text_nor_whole_numbers_is_refused(prompt: Any) -> None:
    with refused(RequestError, "the prompt is neither text nor token ids", expected="whole numbers"):
        asked([prompt, "text"])


@pytest.mark.parametrize(
    "inputs", [None, 5, {"a": 1}, {1: 2}, {"text"}, b"text", iter(["a"])], ids=lambda inputs: type(inputs).__name__
)
def test_inputs_that_are_no_run_of_prompts_are_refused(inputs: Any) -> None:
    with refused(RequestError, "the prompt is neither text nor token ids", got=repr(inputs)):
        asked(inputs)


def test_whole_numbers_of_any_kind_are_token_ids() -> None:
    for prompt in (
        np.array(PROMPT, np.uint16),
        torch.tensor(PROMPT),
        tuple(PROMPT),
        [np.int64(token) for token in PROMPT],
    ):
        plain = asked([prompt, "text"]).prompts[0]
        assert plain == PROMPT
        assert all(type(token) is int for token in plain)


def answer(trace: RoutingTrace | None = TRACE, codec: str | None = None, **changes: Any) -> dict[str, Any]:
    """An answer of `/generate` to `PROMPT`, as the documentation has it."""
    said: dict[str, Any] = {
        "generated_text": ["hi"],
        "count_output_tokens": 2,
        "finish_reason": "length",
        "prompt_tokens": 3,
        "prompt_token_ids": PROMPT,
        "output_token_ids": OUTPUT,
        "weight_version": "7",
        "tokens": [{"id": 8, "text": "h", "logprob": -0.5}, {"id": 9, "text": "i", "logprob": -1.5}],
    }
    if trace is not None:
        payload = to_lightllm(trace)
        if codec is not None:
            payload |= {
                "codec": codec,
                "format": "moetrace",
                "data": base64.b64encode(save(trace, codec=codec)).decode(),
            }
        said["routed_experts"] = payload
    return said | changes


def one(said: Any, request: Asked | None = None) -> Any:
    (completion,) = completions_of(said, request or asked(), "me")
    return completion


# --- parameters ---


def test_every_parameter_of_the_server_can_be_asked_for_and_no_other() -> None:
    own = {"n", "best_of", "return_details", "return_prompt_logprobs"}  # by arguments of their own, or never
    theirs = {name for name in GenerateParameters.model_fields if "routed_experts" not in name} - own
    ours = {knob.name for knob in fields(SamplingParams)} | {"add_special_tokens", "skip_special_tokens"}
    assert theirs == ours - {"n", "stop", "stop_token_ids"}
    with refused(RequestError, "'top_q' is unknown", expected="top_p", got="top_q"):
        parameters_of({"top_q": 1})


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(20, 30),
        "do_sample": st.booleans(),
        "temperature": st.floats(0.01, 10),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(1, 50),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 4),
        "min_new_tokens": st.integers(0, 5),
        "stop": st.lists(st.text(min_size=1), max_size=2),
        "stop_token_ids": st.lists(st.integers(0, 99), max_size=2),
        "stop_sequences": st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=3), max_size=2),
    },
)


@given(SAMPLING)
def test_what_is_asked_is_what_the_server_understands(values: dict[str, Any]) -> None:
    wire = parameters_of(values)
    assert GenerateParameters(**wire).sampling() == sampling_of(values)
    assert set(wire) <= set(values) | {"stop_sequences"}


def test_values_are_checked_before_anything_is_sent() -> None:
    with refused(RequestError, "temperature is out of range", got=0):
        parameters_of({"temperature": 0})
    assert parameters_of({"stop": "abc"}) == {"stop_sequences": ["abc"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("stop_sequences", [1]),
        ("stop_sequences", [["a"]]),
        ("skip_special_tokens", "no"),
        ("max_new_tokens", "5"),
        ("min_new_tokens", None),
        ("top_k", 1.5),
        ("n", True),
        ("temperature", "1"),
        ("top_p", None),
        ("seed", "7"),
    ],
)
def test_types_are_checked_down_to_the_elements(name: str, value: Any) -> None:
    with refused(RequestError, f"{name} has a wrong type", got=str(value)):
        parameters_of({name: value})


@pytest.mark.parametrize(
    ("inputs", "is_batch", "prompts"),
    [
        ("text", False, ["text"]),
        (np.array([1, 2]), False, [[1, 2]]),
        ((1, 2), False, [[1, 2]]),
        (["a", [1], np.array([2])], True, ["a", [1], [2]]),
        (np.array([[1, 2], [3, 4]]), True, [[1, 2], [3, 4]]),
        ([], False, [[]]),
    ],
)
def test_one_prompt_or_several(inputs: Any, is_batch: bool, prompts: Any) -> None:
    request = asked(inputs)
    assert (request.is_batch, request.prompts) == (is_batch, prompts)
    assert all(type(token) is int for prompt in request.prompts if not isinstance(prompt, str) for token in prompt)


# --- answers ---


@pytest.mark.parametrize("codec", [None, "raw", "bits", "raw+zstd", "bits+zstd"])
def test_an_answer_with_routes_in_every_form(codec: str | None) -> None:
    completion = one(answer(codec=codec))
    assert completion.trace == TRACE
    assert (completion.prompt_tokens, completion.tokens) == (PROMPT, OUTPUT)
    assert (completion.text, completion.logprobs, completion.prompt_logprobs) == ("hi", [-0.5, -1.5], None)
    assert (completion.request_id, completion.prompt_number, completion.index) == ("me", 0, 0)
    assert (completion.finish_reason, completion.weight_version) == ("length", "7")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        3,
        2,
        5,
    )
    assert completion.reference is None


def test_routes_as_sets_and_without_token_ids() -> None:
    assert one(answer(codec="set")).trace == TRACE.as_set()
    assert one(answer(TRACE.without_tokens(), codec="bits")).trace == TRACE


def test_a_reference_is_typed_and_tied_to_the_tokens() -> None:
    digest = Container(BytesSource(save(TRACE))).digest
    facts = {"id": digest, "path": f"/routing/traces/{digest}", "num_bytes": 9, "codec": "bits", "sha256": digest}
    payload = {"token_sha256": TRACE.token_sha256, "reference": facts | {"expires_at": 1.5}}
    completion = one(answer(None, routed_experts=payload), asked(routes="reference"))
    assert completion.trace is None
    reference = completion.reference
    assert (reference.id, reference.path, reference.num_bytes) == (digest, facts["path"], 9)
    assert (reference.codec, reference.token_sha256, reference.expires_at) == ("bits", TRACE.token_sha256, 1.5)
    with refused(TokenMismatchError, "routes of other tokens"):
        one(answer(None, routed_experts=payload, output_token_ids=[8, 8]), asked(routes="reference"))


def test_lightllms_own_answer_needs_the_layout_and_tokens() -> None:
    ids = dyed_ids(4, LAYOUT)
    own: dict[str, Any] = {
        "generated_text": ["hi"],
        "count_output_tokens": 2,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "tokens": [{"id": 8, "logprob": -0.5}, {"id": 9, "logprob": -1.5}],
        "routed_experts": {
            "shape": [3, 4, 2],
            "dtype": "int32",
            "data": base64.b64encode(ids.transpose(1, 0, 2).astype("<i4").tobytes()).decode(),
        },
    }
    completion = one(own, asked_of(PROMPT, 1, True, 0, LAYOUT))
    assert (completion.tokens, completion.logprobs, completion.weight_version) == (OUTPUT, [-0.5, -1.5], None)
    np.testing.assert_array_equal(completion.trace.experts_TLK, ids)
    with refused(FormatError, "does not say its layers"):
        one(own)
    with refused(ServerError, "does not say which token ids the prompt had", fix="Send the prompt as token ids."):
        one(own, asked_of("text", 1, True, 0, LAYOUT))


def test_several_prompts_and_sequences() -> None:
    several = answer(None) | {
        "generated_text": ["a", "b"],
        "finish_reason": ["stop", "length"],
        "output_token_ids": [[8, 9], [9]],
        "weight_version": ["1", "2"],
        "tokens": [[{"id": 8, "logprob": -1.0}, {"id": 9, "logprob": -2.0}], [{"id": 9, "logprob": -3.0}]],
        "routed_experts": [to_lightllm(TRACE), to_lightllm(make_trace([*PROMPT, 9], seed=3))],
    }
    completions = completions_of([several, several], asked([PROMPT, "text"], n=2), "me")
    assert [(c.prompt_number, c.index, c.text) for c in completions] == [
        (0, 0, "a"),
        (0, 1, "b"),
        (1, 0, "a"),
        (1, 1, "b"),
    ]
    assert completions[0].trace == TRACE
    assert completions[1].trace == make_trace([*PROMPT, 9], seed=3)
    assert [c.logprobs for c in completions[2:]] == [[-1.0, -2.0], [-3.0]]
    assert [(c.finish_reason, c.weight_version) for c in completions[:2]] == [("stop", "1"), ("length", "2")]


def test_a_start_and_a_scored_prompt() -> None:
    later = one(answer(TRACE.slice(2, 4)), asked(start=2))
    assert later.trace == TRACE.slice(2, 4)
    scored = make_trace(PROMPT, rows=3)
    completion = one(
        answer(scored, output_token_ids=[], tokens=[], generated_text=[""], prompt_logprobs=[None, -1.0, -2.0])
    )
    assert completion.trace == scored
    assert completion.prompt_logprobs == [None, -1.0, -2.0]


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        (answer(make_trace([5, 6, 7, 8, 8])), TokenMismatchError, "other tokens"),
        (answer(make_trace([5, 6, 7, 8, 8]), codec="bits"), TokenMismatchError, "other tokens"),
        (answer(make_trace([5, 6, 7, 8]), codec="bits"), TokenMismatchError, "other tokens"),
        (answer(make_trace(PROMPT + OUTPUT, rows=3)), FormatError, "other rows"),
        (answer(make_trace(PROMPT + OUTPUT, rows=5)), FormatError, "other rows"),
        (answer(TRACE.slice(1, 4)), FormatError, "other rows"),
        (answer(None), ServerError, "the answer has none"),
        (answer(prompt_token_ids=[5, 6, 8]), ServerError, "another prompt"),
        (answer(tokens=None, output_token_ids=None), ServerError, "not one of /generate"),
        (answer(tokens=[{"id": 8}]), ServerError, "not one of /generate"),
        (answer(routed_experts="no"), ServerError, "not one of /generate"),
        (answer(routed_experts={"format": "moetrace", "data": "%"}), FormatError, "not base64"),
        (answer(routed_experts={"format": "moetrace", "data": "AAAA"}), FormatError, ""),
        (answer(routed_experts={"reference": {"id": "x"}}), ServerError, "not one of /generate"),
        ([answer()], ServerError, "not one of /generate"),
        ({"detail": "no"}, ServerError, "not one of /generate"),
        ("text", ServerError, "not one of /generate"),
        (None, ServerError, "not one of /generate"),
    ],
)
def test_answers_that_are_not_to_this_request_are_refused(said: Any, kind: Any, what: str) -> None:
    with refused(kind, what):
        one(said)


def test_two_responses_to_one_prompt_are_refused() -> None:
    for wrong in ([], [answer(), answer()]):
        with refused(ServerError, "not one of /generate"):
            completions_of(wrong, asked([PROMPT]), "me")
    with refused(ServerError, "not one of /generate"):
        completions_of(answer(), asked(n=2), "me")


def test_an_aborted_sequence_may_have_fewer_rows_but_no_others() -> None:
    short = answer(make_trace(PROMPT + OUTPUT, rows=3), finish_reason="abort")
    assert len(one(short).trace) == 3
    with refused(FormatError, "other rows"):
        one(answer(TRACE.slice(1, 4), finish_reason="abort"))
    with pytest.raises((TraceError, FormatError)):
        one(answer(make_trace([*PROMPT, *OUTPUT, 1], rows=5), finish_reason="abort"))


# --- streams ---


def stream_of(events: list[bytes], pieces: int = 1) -> list[Any]:
    data, reader = b"".join(b"data:" + event + b"\n\n" for event in events), Events(asked(), "me")
    came = [event for i in range(0, len(data), pieces) for event in reader.feed(data[i : i + pieces])]
    reader.end()
    return came


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (b'{"token": null}', "not one of /generate_stream"),
        (b"[]", "not one of /generate_stream"),
        (b"{", "not one of /generate_stream"),
        (b"[" * 100_000, "not one of /generate_stream"),
        (b'{"token": null, "index": 1, "finished": false}', "not one of /generate_stream"),
        (
            b'{"token": null, "finished": true, "finish_reason": "stop", "output_token_ids": [8]}',
            "other tokens than came",
        ),
        (b'{"token": null, "index": 0, "finished": false}', "ended before its sequences did"),
    ],
)
def test_a_stream_that_is_none_is_refused(last: bytes, what: str) -> None:
    with refused(ServerError, what):
        stream_of([last])


def test_what_a_server_says_last_in_a_stream_is_raised() -> None:
    with refused(MissingRowError, "gone", got="3"):
        stream_of([b'{"error": {"type": "MissingRowError", "message": "gone: got 3.", "got": "3"}}'])
