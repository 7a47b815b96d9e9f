"""`/generate_stream`: tokens as they come, and at the end the same rows as without streaming."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app
from moetrace.server.texts import TextStream

DYE = Dye(vocab=260)
TOKENIZER: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    config = EngineConfig(enable_return_routed_experts=True)
    engine = TransformersEngine(DYE.model(), config, TOKENIZER)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: TransformersEngine) -> TestClient:
    return TestClient(create_app(engine, TOKENIZER), raise_server_exceptions=False)


def events_of(content: bytes) -> list[dict[str, Any]]:
    *events, rest = content.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data:") for event in events)
    return [json.loads(event.removeprefix(b"data:")) for event in events]


def stream(client: TestClient, inputs: object, **parameters: object) -> list[dict[str, Any]]:
    response = client.post("/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.content)


def test_each_token_is_an_event_with_lightllms_fields(client: TestClient) -> None:
    events = stream(client, "AB", max_new_tokens=4)
    assert [event["token"]["text"] for event in events] == list("CDEF")
    first = dict(events[0])
    assert -1e-3 < first["token"].pop("logprob") <= 0
    assert first == {
        "token": {"id": 67, "text": "C", "special": False, "count_output_tokens": 1, "prompt_tokens": 2},
        "index": 0,
        "generated_text": None,
        "finished": False,
        "finish_reason": None,
        "details": None,
    }
    assert [event["finished"] for event in events] == [False, False, False, True]
    assert events[-1]["finish_reason"] == "length"
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert not any("routed_experts" in event for event in events)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stop_sequences": ["HI"]}, {"stop_sequences": [[71, 72], [200]]}, {"min_new_tokens": 3}],
)
def test_a_stream_ends_as_the_whole_response_would_with_every_row(client: TestClient, n: int, options: Any) -> None:
    parameters = {
        "max_new_tokens": 12,
        "n": n,
        "return_routed_experts": True,
        "routed_experts_layout": "TLK",
        **options,
    }
    body = {"inputs": "AB", "parameters": {**parameters, "return_details": True}}
    whole = client.post("/generate", json=body).json()
    events = stream(client, "AB", **parameters)
    for index in range(n):
        own = [event for event in events if event["index"] == index]
        last = own[-1]
        assert [event["finished"] for event in own] == [False] * (len(own) - 1) + [True]
        tokens = last["prompt_token_ids"] + last["output_token_ids"]
        trace = from_lightllm(last["routed_experts"], tokens)
        assert trace.valid_T.all()
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1]))
        assert [event["token"]["id"] for event in own] == last["output_token_ids"]
        assert "".join(event["token"]["text"] for event in own) == whole["generated_text"][index]
        assert last["output_token_ids"] == (whole["output_token_ids"] if n == 1 else whole["output_token_ids"][index])
        details = whole["tokens"] if n == 1 else whole["tokens"][index]
        assert [e["token"]["logprob"] for e in own] == pytest.approx([t["logprob"] for t in details], abs=1e-6)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_rows_come_as_deltas_that_join_to_the_whole(client: TestClient, n: int, start: int) -> None:
    options = {"return_routed_experts": True, "routed_experts_every": 7, "routed_experts_start": start}
    events = stream(client, "ABC", max_new_tokens=120, n=n, **options)
    for index in range(n):
        own = [event for event in events if event["index"] == index]
        tokens, traces, deltas = list(b"ABC"), [], 0
        for event in own:
            tokens.append(event["token"]["id"])
            if "routed_experts" in event:
                traces.append(from_lightllm(event["routed_experts"], tokens))
                deltas += not event["finished"]
        assert deltas >= 5
        assert all(trace.valid_T.all() for trace in traces)
        whole = traces[0]
        for trace in traces[1:]:
            whole = whole.concat(trace)
        assert (whole.start, whole.stop) == (start, 3 + 120 - 1)
        np.testing.assert_array_equal(whole.experts_TLK, DYE.routes(tokens[:-1])[start:])


def test_deltas_stay_right_when_requests_are_preempted_and_share_prefixes() -> None:
    knobs: dict[str, Any] = {"kv_cache_tokens": 160, "max_batch_tokens": 48, "page_size": 16}
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, **knobs))
    app = create_app(engine)
    parameters = {"max_new_tokens": 90, "return_routed_experts": True, "routed_experts_every": 5}

    async def scenario() -> list[Call]:
        prompts = [[*range(20), i] for i in range(6)]
        calls = [Call(app, "/generate_stream", {"inputs": p, "parameters": parameters}) for p in prompts]
        await asyncio.gather(*(call.done for call in calls))
        return calls

    calls = asyncio.run(scenario())
    engine.close()
    for call in calls:
        events = events_of(b"".join(call.chunks))
        tokens = list(events[-1]["prompt_token_ids"])
        end = 0
        for event in events:
            tokens.append(event["token"]["id"])
            if "routed_experts" in event:
                trace = from_lightllm(event["routed_experts"], tokens)
                assert trace.start == end
                assert trace.valid_T.all()
                np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1])[end : trace.stop])
                end = trace.stop
        assert end == 21 + 90 - 1


def test_tokens_leave_while_the_sequence_grows_and_an_abort_ends_the_stream_with_its_rows(engine) -> None:
    app = create_app(engine, TOKENIZER)

    async def scenario() -> bytes:
        parameters = {"max_new_tokens": 400, "return_routed_experts": True}
        call = Call(app, "/generate_stream", {"inputs": "A", "parameters": parameters}, {"X-Request-Id": "me"})
        await until(lambda: len(call.chunks) >= 5)
        assert call.status == 200
        assert not call.done.done()
        abort = Call(app, "/abort", {"request_ids": ["me"]})
        await abort.done
        assert json.loads(abort.chunks[0]) == {"aborted": ["me"], "unknown": []}
        await call.done
        return b"".join(call.chunks)

    events = events_of(asyncio.run(scenario()))
    last = events[-1]
    assert (last["finished"], last["finish_reason"]) == (True, "abort")
    assert 5 <= len(last["output_token_ids"]) < 400
    assert [event["token"]["id"] for event in events if event["token"]] == last["output_token_ids"]
    tokens = last["prompt_token_ids"] + last["output_token_ids"]
    trace = from_lightllm(last["routed_experts"], tokens)
    assert trace.valid_T.all()
    np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1]))


def test_an_abort_before_the_first_token_ends_the_stream_without_one(engine) -> None:
    app = create_app(engine, TOKENIZER)

    async def scenario() -> bytes:
        engine.pause()
        call = Call(app, "/generate_stream", {"inputs": "A"})
        await until(lambda: engine._delivery.pending)
        engine.abort()
        await call.done
        engine.resume()
        return b"".join(call.chunks)

    (event,) = events_of(asyncio.run(scenario()))
    assert (event["token"], event["finished"], event["finish_reason"]) == (None, True, "abort")


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (["A"], {}, "a stream has one prompt: expected text, or a list of token ids, got a list of 1 prompts"),
        ("", {}, "the prompt is empty"),
        ("A", {"return_routed_experts": False, "routed_experts_every": 3}, "routes that were not asked for"),
        ("A", {"presence_penalty": 3}, "'presence_penalty' is not supported"),
        ("A", {"presence_penalty": False}, "'presence_penalty' is not supported"),
        ("A", {"max_new_tokens": 600}, "does not fit the model's window"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_it_begins(client, inputs, parameters, message) -> None:
    for _ in range(2):  # the id is free again
        body = {"inputs": inputs, "parameters": parameters}
        response = client.post("/generate_stream", json=body, headers={"X-Request-Id": "same"})
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


def test_an_engine_that_dies_says_so_in_the_stream() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())

    def die(*_: object) -> None:
        raise RuntimeError("out of luck")

    engine._manager.batch_processor.update_batch = die
    client = TestClient(create_app(engine), raise_server_exceptions=False)
    (event,) = stream(client, [1])
    assert event["error"]["type"] == "EngineError"
    engine.close()


def test_a_listener_that_fails_hurts_neither_its_request_nor_others(engine, caplog) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("deaf")

    generation = engine.submit([65], SamplingParams(5), return_routes=True, on_progress=fail)
    assert generation.result(30).output_tokens == [66, 67, 68, 69, 70]
    assert engine.submit([65], SamplingParams(2)).result(30).output_tokens == [66, 67]
    assert "is told no more" in caplog.text


def test_pieces_of_text_never_split_a_character_and_add_up() -> None:
    text = "aé漢🙂b\u0301"
    stream = TextStream(TOKENIZER, True)
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.rest() == text
    assert pieces[1:3] == ["", "é"]
    assert "\ufffd" not in "".join(pieces)
    broken = TextStream(TOKENIZER, True)
    assert [broken.add(byte) for byte in "🙂".encode()[:2]] == ["", ""]
    assert "\ufffd" in broken.rest()
