"""Keys, limits, logs, metrics and the end of a server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import EngineError
from moetrace.server import ServerConfig, create_app, generation

DYE = Dye()


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True))
    yield engine
    engine.close()


def client_of(engine: TransformersEngine, **knobs: Any) -> TestClient:
    return TestClient(create_app(engine, config=ServerConfig(**knobs)), raise_server_exceptions=False)


def body_of(tokens: int = 2, inputs: object = None, **parameters: object) -> dict[str, Any]:
    return {"inputs": inputs or [1], "parameters": {"max_new_tokens": tokens, **parameters}}


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer wrong", "secret", "Bearer secret ", "Bearer é"])
def test_without_the_key_nothing_but_health_answers(engine, header: str | None) -> None:
    client = client_of(engine, api_key="secret")
    headers: dict[bytes, bytes] = {} if header is None else {b"Authorization": header.encode("latin-1")}
    paths = [("GET", path) for path in ("/model", "/metrics", "/openapi.json", "/docs", "/nowhere")]
    paths += [("POST", path) for path in ("/generate", "/generate_stream", "/abort", "/pause", "/update_weights")]
    if header != "Bearer secret ":  # HTTP strips spaces around a value
        for method, path in paths:
            response = client.request(method, path, headers=headers, json=body_of() if method == "POST" else None)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer KEY" in response.json()["error"]["message"]
    assert not engine.is_paused
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert client.post("/generate", json=body_of(), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(engine) -> None:
    client = client_of(engine, max_body_bytes=200)
    assert client.post("/generate", json=body_of()).status_code == 200
    large = json.dumps(body_of(inputs=[1] * 100)).encode()
    json_type = {"content-type": "application/json"}
    for content in (large, iter([large[:150], large[150:]])):
        response = client.post("/generate", content=content, headers=json_type)
        assert response.status_code == 413
        assert "larger than 200 bytes" in response.json()["error"]["message"]
    assert client.post("/generate", json=body_of()).status_code == 200


def test_a_prompt_that_is_too_long_for_the_server_is_refused(engine) -> None:
    client = client_of(engine, max_prompt_tokens=5)
    assert client.post("/generate", json=body_of(inputs=[1] * 5)).status_code == 200
    response = client.post("/generate", json=body_of(inputs=[1] * 6))
    assert response.status_code == 400
    assert "expected at most 5 tokens, got 6" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("knobs", "second", "message"),
    [
        ({"max_requests": 1}, body_of(), "too many requests are under way: expected at most 1, got 2"),
        ({"max_sequences": 3}, body_of(n=2), "too many sequences are under way: expected at most 3, got 4"),
    ],
)
def test_more_than_the_server_takes_is_told_to_come_again(engine, knobs, second, message) -> None:
    app = create_app(engine, config=ServerConfig(**knobs))

    async def scenario() -> None:
        engine.pause()
        first = Call(app, "/generate", body_of(n=2))
        await until(lambda: engine._delivery.pending)
        for path in ("/generate", "/generate_stream"):
            refused = Call(app, path, second)
            await refused.done
            assert refused.status == 429
            assert refused.headers["retry-after"] == "1"
            assert message in json.loads(refused.chunks[0])["error"]["message"]
        engine.resume()
        await first.done
        assert first.status == 200
        again = Call(app, "/generate", second)
        await again.done
        assert again.status == 200

    asyncio.run(scenario())


def test_a_request_that_never_fits_is_not_told_to_come_again(engine) -> None:
    response = client_of(engine, max_sequences=3).post("/generate", json=body_of(inputs=[[1], [2]], n=2))
    assert response.status_code == 400
    assert "expected prompts * n <= 3, got 4" in response.json()["error"]["message"]
    response = client_of(engine).post("/generate", json=body_of(n=10**9))
    assert response.status_code == 400


def test_a_server_that_shuts_down_takes_nothing_new_and_answers_everybody(engine) -> None:
    app = create_app(engine)

    async def scenario() -> list[Call]:
        calls = [
            Call(app, path, body_of(400, return_routed_experts=True)) for path in ("/generate", "/generate_stream")
        ]
        await until(lambda: len(calls[1].chunks) > 3)
        app.state.requests.drain(0.05)
        refused = Call(app, "/generate", body_of())
        await refused.done
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        for call in calls:
            await call.done
        return calls

    calls = asyncio.run(scenario())
    assert TestClient(app).get("/ready").json() == {"status": "shutting down"}
    whole = json.loads(b"".join(calls[0].chunks))
    last = json.loads(b"".join(calls[1].chunks).split(b"\n\n")[-2].removeprefix(b"data:"))
    for answer in (whole, last):
        assert answer["finish_reason"] == "abort"
        tokens = answer["prompt_token_ids"] + answer["output_token_ids"]
        trace = from_lightllm(answer["routed_experts"], tokens)
        assert trace.valid_T.all()
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1]))


def test_every_request_is_a_line_of_json_in_the_log(engine, caplog) -> None:
    client = client_of(engine)
    with caplog.at_level(logging.INFO, "moetrace.access"):
        client.post("/generate", json=body_of(3, n=2), headers={"X-Request-Id": "mine"})
        client.get("/nowhere")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "moetrace.access"]
    assert all(0 < line.pop("seconds") < 30 for line in lines)
    assert lines[0] == {
        "request_id": "mine",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "prompt_tokens": 1,
        "output_tokens": 6,
        "finish_reasons": ["length"],
    }
    assert (lines[1]["path"], lines[1]["status"]) == ("/nowhere", 404)


def test_a_bug_is_a_500_in_the_form_of_every_error(engine, monkeypatch) -> None:
    def fail(*_: object) -> bytes:
        raise KeyError("x")

    monkeypatch.setattr(generation, "encode_responses", fail)
    response = client_of(engine).post("/generate", json=body_of(), headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert response.json()["error"]["got"] == "KeyError"
    assert response.headers["X-Request-Id"] == "mine"  # else clients take it for a gateway's, and generate again


def samples(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_was_served(engine) -> None:
    client = client_of(engine)
    client.post("/generate", json=body_of(5, inputs=[1, 2], n=2, return_routed_experts=True))
    client.post("/generate_stream", json=body_of(7))
    client.post("/generate", json=body_of(0))
    client.get("/nowhere/1"), client.get("/nowhere/2")
    counted = samples(client)
    rows = 2 * (2 + 5 - 1)
    expected = {
        "moetrace_requests_total,/generate,200": 1,
        "moetrace_requests_total,/generate,400": 1,
        "moetrace_requests_total,none,404": 2,
        "moetrace_sequences_total,length": 3,
        "moetrace_prompt_tokens_total": 3,
        "moetrace_output_tokens_total": 17,
        "moetrace_route_rows_total": rows,
        "moetrace_route_rows_missing_total": 0,
        "moetrace_route_bytes_total": rows * 12,
        "moetrace_first_token_seconds_count": 1,
        "moetrace_request_seconds_count,/generate": 2,
        "moetrace_requests_under_way": 0,
        "moetrace_sequences_under_way": 0,
        "moetrace_engine_healthy": 1,
    }
    assert {name: counted[name] for name in expected} == expected
    assert counted["moetrace_first_token_seconds_sum"] > 0
    assert 0 < counted["moetrace_between_tokens_seconds_count"] <= 6


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_body_bytes": 0},
        {"max_requests": 0},
        {"max_sequences": 0},
        {"max_prompt_tokens": 0},
        {"shutdown_seconds": -1},
        {"archive_seconds": float("nan")},
        {"port": -1},
        {"port": 65536},
        {"api_key": ""},
        {"api_key": "é"},
        {"api_key": "a\nb"},
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        ServerConfig(**knobs)


@pytest.mark.parametrize(
    ("host", "key", "exposed"),
    [
        ("127.0.0.1", None, False),
        ("127.9.9.9", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("10.0.0.1", None, True),
        ("example.org", None, True),
        ("0.0.0.0", "key", False),
    ],
)
def test_a_server_is_exposed_when_others_reach_it_without_a_key(host: str, key: str | None, exposed: bool) -> None:
    assert ServerConfig(host=host, api_key=key).is_exposed is exposed
