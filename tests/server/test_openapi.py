"""The OpenAPI document is true: schemathesis finds no answer that it does not describe, and types follow the answers.

A longer run: `MOETRACE_OPENAPI_EXAMPLES=1000 python -m pytest tests/server/test_openapi.py -s`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import schemathesis
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from pydantic import TypeAdapter
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events as happenings
from schemathesis.engine import from_schema
from transformers import AutoTokenizer

from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import ServerConfig, create_app
from moetrace.server.answers import (
    Description,
    ErrorResponse,
    GenerateResponse,
    RoutedContainer,
    RoutedExperts,
    RoutedReference,
    RoutingFacts,
    StreamEvent,
    StreamToken,
    Token,
)
from moetrace.server.openai.answers import ChatChunk, ChatCompletion, Completion
from moetrace.server.openai.schemas import ChatRequest, CompletionRequest
from moetrace.server.openapi import RANGES
from moetrace.server.schemas import GenerateParameters
from moetrace.server.sglang.answers import MetaInfo, SGLangResponse
from moetrace.server.sglang.schemas import SGLangRequest, SGLangSampling

DYE = Dye(vocab=260, window=256)
TOKENIZER: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
CHATTING: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
CHATTING.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
KEY = {"Authorization": "Bearer secret"}
EXAMPLES = int(os.environ.get("MOETRACE_OPENAPI_EXAMPLES", "10"))
CONFIG = {
    "seed": 0,
    "headers": KEY,
    "continue-on-failure": True,
    "output": {"sanitization": {"enabled": False}},  # it takes every "token" for a secret
    "generation": {"max-examples": EXAMPLES, "deterministic": True, "no-shrink": True, "database": "none"},
    # A window, a vocabulary, what excludes what: no schema says it. To break such a rule is a 400.
    # Nor which traces and models there are: another is a 404.
    "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404"]}},
    "operations": [
        # Bodies of many parts have hundreds of cases: all of them in the long run, of one path otherwise.
        {"include-path": path, "phases": {"coverage": {"enabled": EXAMPLES > 10}}}
        for path in ("/generate_stream", "/v1/completions", "/v1/chat/completions", "/sglang/generate")
    ],
}


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True), TOKENIZER)
    yield engine
    engine.close()


def with_whole_numbers(body: Any) -> Any:
    """JSON Schema calls 2.0 an integer. The server wants 2."""
    if isinstance(body, dict):
        return {name: with_whole_numbers(value) for name, value in body.items()}
    if isinstance(body, list):
        return [with_whole_numbers(value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


def test_schemathesis_finds_no_answer_that_the_document_does_not_describe(engine: TransformersEngine) -> None:
    app = create_app(engine, CHATTING, ServerConfig(api_key="secret", served_model_name="model"))
    config = SchemathesisConfig.from_dict(CONFIG)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=KEY)
    answers: Counter[tuple[str, int]] = Counter()
    checks: Counter[str] = Counter()
    failures: dict[str, str] = {}

    @schema.hook
    def after_call(context: Any, case: Any, response: Any) -> None:
        engine.resume()  # after /pause everybody would wait
        if case.path == "/routing/stop":  # and be refused
            engine.start_capture()

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        return with_whole_numbers(body)

    for event in from_schema(schema).execute():
        if isinstance(event, happenings.NonFatalError | happenings.FatalError):
            raise getattr(event, "value", None) or event.exception  # type: ignore[union-attr]
        if isinstance(event, happenings.ScenarioFinished):
            for name, interaction in event.recorder.interactions.items():
                status = interaction.response.status_code if interaction.response else 0
                answers[event.recorder.cases[name].value.operation.label, status] += 1
            for check in [check for of_case in event.recorder.checks.values() for check in of_case]:
                checks[check.name] += 1
                if check.failure_info is not None:
                    failures.setdefault(f"{event.recorder.label}: {check.failure_info.failure.title}", str(check))
    for (operation, status), count in sorted(answers.items()):
        print(f"{operation:24} {status} {count:8}")
    print(f"{answers.total()} answers, {checks.total()} checks: {dict(checks)}")
    assert not failures, "\n\n".join(f"{name}\n{facts}" for name, facts in failures.items())
    assert {200, 400, 401, 405, 422} <= {status for operation, status in answers if operation == "POST /generate"}
    for path in ("generate_stream", "sglang/generate", "v1/completions", "v1/chat/completions"):
        assert {200, 400} <= {status for operation, status in answers if operation == f"POST /{path}"}


def body_of(inputs: object = "AB", **parameters: object) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 4, **parameters}}


def keys_of(values: Iterable[dict[str, Any]]) -> set[str]:
    return {key for value in values for key in value}


def test_answers_have_the_described_keys_and_no_others(engine: TransformersEngine) -> None:
    client = TestClient(create_app(engine, TOKENIZER))
    everything = {"return_routed_experts": True, "return_details": True, "return_prompt_logprobs": True}
    bodies = [body_of(), body_of(**everything), body_of(n=2, **everything), body_of(["A", [66]], n=2)]
    bodies += [body_of(max_new_tokens=0, return_routed_experts=True)]
    answers = []
    for body in bodies:
        content = client.post("/generate", json=body).content
        TypeAdapter(GenerateResponse | list[GenerateResponse]).validate_json(content, strict=True)
        answers.append(json.loads(content))
    assert set(answers[1]) == set(GenerateResponse.__annotations__)
    assert set(answers[0]) == set(GenerateResponse.__annotations__) - {"tokens", "routed_experts", "prompt_logprobs"}
    assert set(answers[1]["tokens"][0]) == set(Token.__annotations__)
    described = set(Description.__annotations__)
    assert set(answers[1]["routed_experts"]) == described | set(RoutedExperts.__annotations__)
    for options, form in (({"routed_experts_codec": "set"}, RoutedContainer), ({}, RoutedReference)):
        asked: object = True if options else "reference"
        content = client.post("/generate", json=body_of(return_routed_experts=asked, **options)).content
        TypeAdapter(GenerateResponse).validate_json(content, strict=True)
        assert set(json.loads(content)["routed_experts"]) == described | set(form.__annotations__)
    TypeAdapter(RoutingFacts).validate_json(client.get("/routing").content, strict=True)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_events_have_the_described_keys_and_no_others(engine: TransformersEngine, tokenizer: Any) -> None:
    client = TestClient(create_app(engine, tokenizer))
    options = {"return_routed_experts": True, "routed_experts_every": 3, "return_prompt_logprobs": True}
    content = client.post("/generate_stream", json=body_of([65], max_new_tokens=60, n=2, **options)).content
    seen = [event.removeprefix(b"data:") for event in content.split(b"\n\n")[:-1]]
    for event in seen:
        TypeAdapter(StreamEvent).validate_json(event, strict=True)
    events = [json.loads(event) for event in seen]
    assert keys_of(event for event in events if event["finished"]) == set(StreamEvent.__annotations__)
    assert keys_of(event["token"] for event in events) == set(StreamToken.__annotations__ | Token.__annotations__)


@pytest.mark.parametrize(
    ("path", "body", "whole", "part"),
    [
        ("/v1/completions", {"prompt": "AB", "max_tokens": 4, "n": 2, "logprobs": 0}, Completion, Completion),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "A"}], "max_tokens": 4, "logprobs": True},
            ChatCompletion,
            ChatChunk,
        ),
    ],
)
def test_openais_answers_have_the_described_keys_and_no_others(engine, path, body, whole, part) -> None:
    client = TestClient(create_app(engine, CHATTING))
    body = {"model": "model", **body}
    answer = client.post(path, json=body)
    TypeAdapter(whole).validate_json(answer.content, strict=True)
    assert set(answer.json()) == set(whole.__annotations__)
    content = client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}).content
    *seen, mark = [event.removeprefix(b"data: ") for event in content.split(b"\n\n")[:-1]]
    assert mark == b"[DONE]"
    for event in seen:
        TypeAdapter(part).validate_json(event, strict=True)
    assert keys_of(map(json.loads, seen)) == set(part.__annotations__)


def test_sglangs_answers_have_the_described_keys_and_no_others(engine: TransformersEngine) -> None:
    client = TestClient(create_app(engine, TOKENIZER))
    body = {"text": "AB", "sampling_params": {"max_new_tokens": 4, "n": 2}, "return_routed_experts": True}
    body |= {"return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
    content = client.post("/sglang/generate", json=body).content
    TypeAdapter(list[SGLangResponse]).validate_json(content)  # not strict: JSON has no tuples
    stream = client.post("/sglang/generate", json={**body, "stream": True}).content
    *seen, mark = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")[:-1]]
    assert mark == b"[DONE]"
    for event in seen:
        TypeAdapter(SGLangResponse).validate_json(event)
    assert keys_of(map(json.loads, seen)) == set(SGLangResponse.__annotations__)
    assert keys_of(answer["meta_info"] for answer in json.loads(content)) == set(MetaInfo.__annotations__)


def test_errors_that_need_company_are_described_too(engine: TransformersEngine) -> None:
    app = create_app(engine, TOKENIZER, ServerConfig(max_requests=2, max_body_bytes=1000))

    async def scenario() -> list[Call]:
        engine.pause()
        waiting = [Call(app, "/generate", body_of(), {"X-Request-Id": "taken"})]
        await until(lambda: engine._delivery.pending)
        refused = [
            Call(app, "/generate", body_of(), {"X-Request-Id": "taken"}),
            Call(app, "/generate", body_of(), {"Content-Length": "1001"}),
        ]
        waiting.append(Call(app, "/generate", body_of()))
        await until(lambda: len(engine._delivery.pending) == 2)
        refused.append(Call(app, "/generate", body_of()))
        for call in refused:
            await call.done
        app.state.requests.drain(30)
        refused.append(Call(app, "/generate", body_of()))
        await refused[-1].done
        engine.resume()
        for call in waiting:
            await call.done
        return refused

    calls = asyncio.run(scenario())
    assert [call.status for call in calls] == [409, 413, 429, 503]
    described = app.openapi()["paths"]["/generate"]["post"]["responses"]
    for call in calls:
        TypeAdapter(ErrorResponse).validate_json(b"".join(call.chunks), strict=True)
        assert set(described[str(call.status)]["headers"]) - {"X-Request-Id"} <= {name.title() for name in call.headers}


@pytest.mark.parametrize(("name", "bounds"), sorted(RANGES["GenerateParameters"].items()))
def test_a_described_range_is_the_one_that_is_enforced(engine: TransformersEngine, name: str, bounds: Any) -> None:
    client = TestClient(create_app(engine, TOKENIZER))
    step = {"exclusiveMinimum": 0, "minimum": -1, "maximum": 1}
    for kind, bound in bounds.items():
        options = {"return_routed_experts": True}  # without, nothing would be asked of 0 new tokens
        outside = body_of(**{**options, name: bound + step[kind]})
        refused = client.post("/generate", json=outside)
        assert (refused.status_code, name in refused.text) == (400, True), outside
        if not kind.startswith("exclusive"):
            inside = body_of(**{"max_new_tokens": 2, **options, name: bound})
            assert client.post("/generate", json=inside).status_code == 200, inside


@pytest.mark.parametrize(
    "kind",
    [GenerateParameters, CompletionRequest, ChatRequest, SGLangRequest, SGLangSampling],
    ids=lambda k: k.__name__,
)
def test_parameters_that_are_refused_are_described_so(engine: TransformersEngine, kind: Any) -> None:
    client = TestClient(create_app(engine, TOKENIZER))
    schema = client.get("/openapi.json").json()["components"]["schemas"][kind.__name__]
    assert schema["additionalProperties"] is False
    extra = set(schema["properties"]) - set(kind.model_fields)
    assert any("enum" in schema["properties"][name] for name in extra)
    for name in extra:
        for value in schema["properties"][name].get("enum", [1]):
            given = {name: value}
            if kind is GenerateParameters:
                path, body = "/generate", body_of(**given)
            elif kind is SGLangSampling:
                path, body = "/sglang/generate", {"text": "A", "sampling_params": {"max_new_tokens": 1, **given}}
            elif kind is SGLangRequest:
                path, body = "/sglang/generate", {"text": "A", "sampling_params": {"max_new_tokens": 1}, **given}
            else:
                prompt = {"prompt": "A"} if kind is CompletionRequest else {"messages": [{"role": "user"}]}
                path = "/v1/completions" if kind is CompletionRequest else "/v1/chat/completions"
                body = {"model": "model", "max_tokens": 1, **prompt, **given}
            assert f"{name!r} is" not in client.post(path, json=body).text, given
