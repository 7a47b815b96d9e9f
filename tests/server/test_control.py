"""What an RL system does between rollouts, over HTTP: rows stay right, and nobody who waits is left alone."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app

DYE = Dye()
OTHER = Dye()
OTHER.route = lambda token, layer: DYE.route((token + 31) % DYE.vocab, layer)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    config = EngineConfig(enable_return_routed_experts=True, weight_version="old")
    engine = TransformersEngine(DYE.model(), config)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: TransformersEngine) -> TestClient:
    return TestClient(create_app(engine), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def body_of(inputs: object, tokens: int) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": tokens, "return_routed_experts": True}}


def post(client: TestClient, path: str, body: object = None, **headers: str) -> Any:
    response = client.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert response.status_code == 200, response.text
    return response.json()


def start(pool: ThreadPoolExecutor, client: TestClient, name: str, inputs: object, tokens: int = 400) -> Future[Any]:
    return pool.submit(post, client, "/generate", body_of(inputs, tokens), X_Request_Id=name)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_rows(response: dict[str, Any], dye: Dye = DYE) -> None:
    tokens = response["prompt_token_ids"] + response["output_token_ids"]
    assert response["output_token_ids"] == dye.continuation(tokens[0], len(tokens) - 1)
    trace = from_lightllm(response["routed_experts"], tokens)
    assert trace.num_rows == len(tokens) - 1
    assert trace.valid_T.all()
    np.testing.assert_array_equal(trace.experts_TLK, dye.routes(tokens[:-1]) if len(tokens) > 1 else trace.experts_TLK)


def test_an_aborted_request_answers_its_client_with_the_rows_there_are(engine, client, pool) -> None:
    waiting = {name: start(pool, client, name, [first]) for first, name in enumerate(("a", "b", "c"))}
    wait_until(lambda: len(engine._delivery.pending) == 3)
    time.sleep(0.2)
    assert post(client, "/abort", {"request_ids": ["a", "b", "nobody"]}) == {
        "aborted": ["a", "b"],
        "unknown": ["nobody"],
    }
    for name in ("a", "b"):
        response = waiting[name].result(30)
        assert response["finish_reason"] == "abort"
        assert 0 < response["count_output_tokens"] < 400
        assert_rows(response)
    response = waiting["c"].result(60)
    assert (response["finish_reason"], response["count_output_tokens"]) == ("length", 400)
    assert_rows(response)


def test_aborting_all_ends_every_sequence_of_every_prompt(engine, client, pool) -> None:
    body = body_of([[1], [2]], 400)
    body["parameters"]["n"] = 2
    waiting = [start(pool, client, "single", [3]), pool.submit(post, client, "/generate", body, X_Request_Id="many")]
    wait_until(lambda: len(engine._delivery.pending) == 5)
    assert sorted(post(client, "/abort", {"all": True})["aborted"]) == ["many", "single"]
    assert waiting[0].result(30)["finish_reason"] == "abort"
    for response in waiting[1].result(30):
        assert response["finish_reason"] == ["abort", "abort"]
        assert len(response["routed_experts"]) == 2
    assert post(client, "/abort", {"all": True}) == {"aborted": [], "unknown": []}


def test_paused_nothing_runs_new_requests_wait_and_can_be_aborted(engine, client, pool) -> None:
    running = start(pool, client, "running", [5], 300)
    wait_until(lambda: engine._delivery.pending)
    assert post(client, "/pause") == {"paused": True}
    assert client.get("/ready").status_code == 503
    assert client.get("/ready").json() == {"status": "paused"}
    assert client.get("/health").status_code == 200
    waiting, aborted = start(pool, client, "waiting", [6], 3), start(pool, client, "aborted", [7], 3)
    wait_until(lambda: len(engine._delivery.pending) == 3)
    post(client, "/abort", {"request_ids": ["aborted"]})
    assert aborted.result(30)["finish_reason"] == "abort"
    assert aborted.result()["count_output_tokens"] == 0
    time.sleep(0.2)
    assert not waiting.done()
    assert not running.done()
    assert post(client, "/resume") == {"paused": False}
    assert client.get("/ready").json() == {"status": "ready"}
    for request, count in ((running, 300), (waiting, 3)):
        assert request.result(30)["count_output_tokens"] == count
        assert_rows(request.result())


@pytest.mark.parametrize("which", [{"request_ids": ["reading"]}, {"all": True}])
def test_an_abort_counts_for_a_request_that_is_being_tokenised(client, pool, monkeypatch, which) -> None:
    reading, goes_on = threading.Event(), threading.Event()

    def slowly(prompts: Any, *_: object) -> Any:
        reading.set()
        assert goes_on.wait(30)
        return [[7] for _ in prompts]

    monkeypatch.setattr("moetrace.server.tokenizing.prompt_tokens", slowly)
    waiting = start(pool, client, "reading", "text")
    assert reading.wait(30)
    assert post(client, "/abort", which)["aborted"] == ["reading"]
    goes_on.set()
    assert waiting.result(30)["finish_reason"] == "abort"
    assert waiting.result()["count_output_tokens"] < 400


def test_a_second_request_of_a_running_id_is_refused(engine, client, pool) -> None:
    post(client, "/pause")
    first = start(pool, client, "twin", [5], 2)
    wait_until(lambda: engine._delivery.pending)
    refused = client.post("/generate", json=body_of([5], 2), headers={"X-Request-Id": "twin"})
    assert refused.status_code == 409
    assert refused.json()["error"]["type"] == "DuplicateRequestError"
    post(client, "/resume")
    assert_rows(first.result(30))
    assert_rows(post(client, "/generate", body_of([5], 2), X_Request_Id="twin"))


def test_every_response_repeats_its_request_id_or_has_a_new_one(client) -> None:
    assert client.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert len(client.get("/nowhere").headers["x-request-id"]) == 32
    assert len(client.get("/health", headers={"X-Request-Id": "x" * 129}).headers["x-request-id"]) == 32


@pytest.mark.parametrize("body", [{}, {"all": False}, {"all": True, "request_ids": ["a"]}])
def test_an_unclear_abort_is_refused(client, body) -> None:
    response = client.post("/abort", json=body)
    assert response.status_code == 400
    assert "not clear what to abort" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/abort", {"request_ids": "a"}),
        ("/abort", {"everything": True}),
        ("/abort", {"request_ids": [""]}),
        ("/update_weights", {"path": "x"}),
        ("/update_weights", {"path": "", "version": "1"}),
        ("/update_weights", {"path": "x", "version": 1}),
    ],
)
def test_a_control_request_of_a_wrong_form_is_refused(client, path, body) -> None:
    assert client.post(path, json=body).status_code == 422


def test_the_model_is_described(engine, client) -> None:
    assert client.get("/model").json() == {
        "engine": engine.name,
        "fingerprint": engine.fingerprint,
        "layout": {"layers": [1, 2, 3], "num_experts": 32, "top_k": 4},
        "weight_version": engine.weight_version,
        "window": 512,
        "vocab_size": 96,
        "paused": False,
    }
    payload = post(client, "/generate", body_of([1], 2))["routed_experts"]
    assert payload["fingerprint"] == engine.fingerprint
    assert len(payload["fingerprint"]) == 64


def test_new_weights_come_from_a_folder_or_a_file_while_requests_run(engine, client, pool, tmp_path) -> None:
    OTHER.model().save_pretrained(tmp_path / "other")
    DYE.model().save_pretrained(tmp_path / "own")
    running = start(pool, client, "running", [5], 400)
    wait_until(lambda: engine._delivery.pending)
    time.sleep(0.1)
    assert post(client, "/update_weights", {"path": str(tmp_path / "other"), "version": "1"}) == {"weight_version": "1"}
    response = running.result(30)
    tokens = response["prompt_token_ids"] + response["output_token_ids"]
    trace = from_lightllm(response["routed_experts"], tokens)
    assert [span.version for span in trace.weight_spans] == ["old", "1"]
    assert response["weight_version"] == "1"
    split = trace.weight_spans[1].start
    np.testing.assert_array_equal(trace.experts_TLK[:split], DYE.routes(tokens)[:split])
    np.testing.assert_array_equal(trace.experts_TLK[split:], OTHER.routes(tokens)[split:-1])
    assert_rows(post(client, "/generate", body_of([5], 4)), OTHER)
    file = str(tmp_path / "own" / "model.safetensors")
    assert post(client, "/update_weights", {"path": file, "version": "2"}) == {"weight_version": "2"}
    response = post(client, "/generate", body_of([5], 4))
    assert response["weight_version"] == "2"
    assert_rows(response)
    assert client.get("/model").json()["weight_version"] == "2"


def broken_checkpoints(folder: Any) -> Iterator[str]:
    name = "model.layers.1.mlp.gate.weight"
    OTHER.model().save_pretrained(folder / "good")
    weights = load_file(folder / "good" / "model.safetensors")
    for case, tensor in (("missing", None), ("shape", torch.zeros(3, 3)), ("nan", weights[name] * float("nan"))):
        shutil.copytree(folder / "good", folder / case)
        changed = {key: value for key, value in weights.items() if key != name}
        save_file(changed if tensor is None else {**changed, name: tensor}, folder / case / "model.safetensors")
        yield from (str(folder / case), str(folder / case / "model.safetensors"))
    (folder / "cut.safetensors").write_bytes((folder / "good" / "model.safetensors").read_bytes()[:-100])
    yield from (str(folder / "cut.safetensors"), str(folder / "good" / "config.json"), str(folder), "./no/such/place")


def test_weights_that_do_not_fit_are_a_400_and_change_nothing(client, tmp_path) -> None:
    before = client.get("/model").json()
    for path in broken_checkpoints(tmp_path):
        response = client.post("/update_weights", json={"path": path, "version": "bad"})
        assert response.status_code == 400, path
        assert response.json()["error"]["type"] == "WeightsError"
        assert "the old" in response.json()["error"]["message"]
    assert client.get("/model").json() == before
    assert_rows(post(client, "/generate", body_of([5], 4)))


@pytest.mark.parametrize("path", ["org/name", "name", "~nobody-of-this-name/x", "/dev/null", "a\0b", "x" * 5000])
def test_weights_that_are_no_place_here_are_a_400_and_are_looked_for_nowhere_else(client, monkeypatch, path) -> None:
    def call_out(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", call_out)
    response = client.post("/update_weights", json={"path": path, "version": "bad"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "WeightsError"
    assert "asked" not in response.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_ends_its_request(engine, path: str) -> None:
    app = create_app(engine)

    async def scenario() -> None:
        call = Call(app, path, {"inputs": [1], "parameters": {"max_new_tokens": 400, "n": 2}})
        await until(lambda: len(engine._delivery.pending) == 2)
        futures = [pending.future for pending in engine._delivery.pending.values()]
        call.leave()
        await call.done
        await until(lambda: all(future.done() for future in futures))
        assert [future.result().finish_reason for future in futures] == ["abort", "abort"]

    asyncio.run(scenario())
    assert_rows(post(TestClient(app), "/generate", body_of([5], 4)))


def test_when_the_engines_thread_dies_everybody_is_told(pool) -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    client = TestClient(create_app(engine), raise_server_exceptions=False)
    waiting = [
        pool.submit(client.post, "/generate", json={"inputs": [i], "parameters": {"max_new_tokens": 400}})
        for i in range(2)
    ]
    wait_until(lambda: len(engine._delivery.pending) == 2)

    def die(*_: object) -> None:
        raise RuntimeError("out of luck")

    engine._manager.batch_processor.update_batch = die
    for response in waiting:
        assert response.result(30).status_code == 503
        assert "error" in response.result().json()
    for path in ("/health", "/ready"):
        assert client.get(path).json()["status"] == "stopped"
        assert client.get(path).status_code == 503
    assert client.post("/generate", json={"inputs": [1]}).status_code == 503
    assert client.post("/abort", json={"all": True}).status_code == 200
    update = pool.submit(engine.update_weights, DYE.model().state_dict(), "1")
    assert "stopped" in str(update.exception(30))
    engine.close()
