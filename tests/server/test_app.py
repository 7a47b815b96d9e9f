"""The server's contract, in process, over a real engine with a dye checkpoint."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from dye import Dye
from fastapi.testclient import TestClient
from pydantic import ValidationError
from transformers import AutoTokenizer

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app, generation
from moetrace.server.lifecycle import AbortRequest
from moetrace.server.openai.schemas import ChatRequest, CompletionRequest
from moetrace.server.schemas import GenerateParameters, GenerateRequest
from moetrace.server.sglang.schemas import SGLangRequest

DYE = Dye(vocab=260)  # the tiny model's tokenizer: token id = byte


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, seed=0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: TransformersEngine) -> TestClient:
    tokenizer: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
    return TestClient(create_app(engine, tokenizer), raise_server_exceptions=False)


def generate(client: TestClient, inputs: object, **parameters: object) -> dict:
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()


def refusal(client: TestClient, body: bytes | dict, status: int) -> dict:
    """The error of a request that must be refused, after which the server still serves."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert generate(client, "A", max_new_tokens=2)["generated_text"] == ["BC"]
    return response.json()["error"]


def test_text_comes_back_with_lightllms_fields(client: TestClient) -> None:
    response = generate(client, "ABC", max_new_tokens=5)
    assert response == {
        "generated_text": ["DEFGH"],
        "count_output_tokens": 5,
        "finish_reason": "length",
        "prompt_tokens": 3,
        "prompt_token_ids": [65, 66, 67],
        "output_token_ids": [68, 69, 70, 71, 72],
        "weight_version": "0",
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def test_token_ids_go_in_and_come_out(client: TestClient) -> None:
    response = generate(client, [10, 20, 30], max_new_tokens=3)
    assert response["prompt_token_ids"] == [10, 20, 30]
    assert response["output_token_ids"] == [31, 32, 33]


def test_the_documented_client_reads_an_LTK_array_with_the_right_ids(client: TestClient) -> None:
    response = generate(client, "Hello, world!", max_new_tokens=100, return_routed_experts=True)
    payload = response["routed_experts"]
    array = np.frombuffer(base64.b64decode(payload["data"]), dtype=np.int32).reshape(payload["shape"])
    tokens = response["prompt_token_ids"] + response["output_token_ids"]
    assert array.shape == (3, 13 + 100 - 1, 4)
    np.testing.assert_array_equal(array, DYE.routes(tokens[:-1]).transpose(1, 0, 2))


def test_the_payload_describes_itself(client: TestClient) -> None:
    response = generate(client, "Hello", max_new_tokens=3, return_routed_experts=True)
    payload = response["routed_experts"]
    assert {key: payload[key] for key in ("shape", "dtype", "layout", "layers", "num_experts", "order", "start")} == {
        "shape": [3, 7, 4],
        "dtype": "int32",
        "layout": "LTK",
        "layers": [1, 2, 3],
        "num_experts": 32,
        "order": "rank",
        "start": 0,
    }
    trace = from_lightllm(payload, response["prompt_token_ids"] + response["output_token_ids"])
    assert trace.num_valid == trace.num_rows == 7
    assert trace.weight_version(6) == "0"


def test_log_probabilities_come_when_asked(client: TestClient) -> None:
    response = generate(client, "AB", max_new_tokens=2, return_details=True)
    assert [(token["id"], token["text"]) for token in response["tokens"]] == [(67, "C"), (68, "D")]
    assert all(-1e-3 < token["logprob"] <= 0 for token in response["tokens"])
    assert "tokens" not in generate(client, "AB", max_new_tokens=2)


def test_no_routes_come_unless_asked(client: TestClient) -> None:
    assert "routed_experts" not in generate(client, "AB", max_new_tokens=2)


def test_concurrent_clients_get_their_own_rows(client: TestClient) -> None:
    def one(first: int) -> dict:
        return generate(client, [first, 7, first], max_new_tokens=10, return_routed_experts=True)

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(one, range(48)))
    for first, response in enumerate(responses):
        tokens = [first, 7, first, *DYE.continuation(first, 10)]
        assert response["output_token_ids"] == tokens[3:]
        trace = from_lightllm(response["routed_experts"], tokens)
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1]))


def test_a_body_without_its_type_is_told_so(client: TestClient) -> None:
    response = client.post("/generate", content=b'{"inputs": "A"}')
    assert response.status_code == 422
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (GenerateRequest, {"inputs": [*[5] * 20_000, "x"]}),
        (GenerateRequest, {"inputs": [[*[5] * 20_000, "x"]]}),
        (GenerateRequest, {"inputs": [*["a"] * 20_000, 5]}),
        (GenerateRequest, {"inputs": "a", "parameters": {"stop_sequences": [5] * 20_000}}),
        (SGLangRequest, {"input_ids": [*[5] * 20_000, "x"]}),
        (SGLangRequest, {"text": [5] * 20_000}),
        (CompletionRequest, {"model": "m", "prompt": [*[5] * 20_000, "x"]}),
        (ChatRequest, {"model": "m", "messages": [5] * 20_000}),
        (AbortRequest, {"request_ids": [5] * 20_000}),
    ],
)
def test_a_long_list_with_wrong_elements_is_not_answered_element_by_element(schema: Any, body: Any) -> None:
    """An error for each would take a hundred times the memory of the list, and the event loop with it."""
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() <= 6


def test_neutral_values_of_parameters_we_do_not_have_are_accepted(client: TestClient) -> None:
    response = generate(client, "A", max_new_tokens=1, repetition_penalty=1.0, seed=-1, allowed_token_ids=None)
    assert response["generated_text"] == ["B"]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"{", 422, "not JSON: expected a JSON object"),
        (b"\xff", 422, "not JSON: expected a JSON object"),
        (b"[" * 100_000, 422, "not JSON: expected a JSON object"),
        (b"[]", 422, "the request body is wrong"),
        (b"{}", 422, "inputs is missing. See /docs"),
        (b'{"inputs": 3}', 422, "expected text, or a list of token ids, or a list of either, got 3"),
        (b'{"inputs": ["a", 1]}', 422, "expected text, or a list of token ids"),
        (b'{"inputs": "\\ud800"}', 400, "not valid Unicode"),
        (b'{"inputs": "a", "prompt": "b"}', 422, "prompt is unknown: got 'b'. See /docs"),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', 400, "temperature is out of range"),
        ({"inputs": ""}, 400, "the prompt is empty"),
        ({"inputs": [1, 260]}, 400, "token id at position 1 is out of range: expected 0 <= id < 260, got 260"),
        ({"inputs": [-1]}, 400, "token id at position 0 is out of range"),
        ({"inputs": [10**30]}, 400, "token id at position 0 is out of range"),
        ({"inputs": "a" * 600}, 400, "longer than the model's window: expected at most 511 tokens, got 600"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, 400, "nothing is to be generated, and nothing of"),
        ({"inputs": "a", "parameters": {"max_new_tokens": -5}}, 400, "expected an integer >= 0 (0: score"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 512}}, 400, "at most 511 after a prompt of 1"),
        (
            {"inputs": "a", "parameters": {"max_new_tokens": "9"}},
            422,
            "max_new_tokens is wrong: expected a valid integer, got '9'",
        ),
        ({"inputs": "a", "parameters": {"max_new_tokens": True}}, 422, "parameters.max_new_tokens is wrong"),
        ({"inputs": "a", "parameters": {"top_p": 0}}, 400, "top_p is out of range"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, 400, "top_k is out of range"),
        ({"inputs": "a", "parameters": {"return_routed_expert": True}}, 400, "'return_routed_expert' is unknown"),
        ({"inputs": "a", "parameters": []}, 422, "parameters is wrong"),
        ({"inputs": []}, 400, "the prompt is empty"),
        ({"inputs": [[1], []]}, 400, "the prompt is empty"),
        ({"inputs": [[1], [260]]}, 400, "token id at position 0 is out of range"),
        ({"inputs": ["a", ["b"]]}, 422, "inputs is wrong"),
        *(
            ({"inputs": "a", "parameters": parameters}, status, expected)
            for parameters, status, expected in [
                ({"n": 0}, 400, "n is out of range: expected an integer >= 1, got 0"),
                ({"n": 2, "best_of": 3}, 400, "best_of is not n, and this server ranks no sequences: expected"),
                ({"best_of": 2}, 400, "best_of absent, or 1, got 2"),
                ({"seed": 2**63}, 400, "seed is out of range: expected an integer of 64 bits, or none"),
                ({"seed": 1.5}, 422, "parameters.seed is wrong"),
                ({"repetition_penalty": 1.1}, 400, "'repetition_penalty' is not supported"),
                ({"presence_penalty": 0.5}, 400, "before the tokens of the last one are known"),
                ({"allowed_token_ids": [1]}, 400, "'allowed_token_ids' is not supported"),
                ({"stop_sequences": 3}, 422, "parameters.stop_sequences is wrong: expected a text, or a list"),
                ({"stop_sequences": [3]}, 422, "parameters.stop_sequences is wrong"),
                ({"stop_sequences": [""]}, 400, "stop is out of range: expected texts that are not empty"),
                ({"stop_sequences": [[]]}, 400, "stop_sequences is out of range"),
                ({"stop_sequences": [[300]]}, 400, "stop token at position 0 is out of range"),
                ({"min_new_tokens": 17}, 400, "min_new_tokens is out of range"),
                ({"temperature": 1e-40}, 400, "temperature is out of range"),
                ({"routed_experts_start": 1}, 400, "says how to return routes that were not asked for"),
                ({"routed_experts_codec": "set"}, 400, "says how to return routes that were not asked for"),
                ({"return_routed_experts": True, "routed_experts_start": 2}, 400, "expected 0 <= start <= 1 prompt"),
                ({"return_routed_experts": True, "routed_experts_start": -1}, 400, "routed_experts_start is out of"),
                ({"return_routed_experts": True, "routed_experts_layout": "KLT"}, 422, "routed_experts_layout is wr"),
                (
                    {"return_routed_experts": True, "routed_experts_every": 5},
                    400,
                    "routed_experts_every is for streams",
                ),
                ({"return_routed_experts": True, "routed_experts_every": -5}, 422, "routed_experts_every is wrong"),
                ({"return_routed_experts": True, "routed_experts_dtype": "int8"}, 422, "routed_experts_dtype is wr"),
            ]
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_the_server_goes_on(client: TestClient, body, status, expected) -> None:
    error = refusal(client, body, status)
    assert expected in error["message"]
    assert error["type"] == "RequestError"


def test_every_default_may_be_sent(client: TestClient) -> None:
    """As the example of docs/server.md does."""
    defaults = GenerateParameters().model_dump()
    assert {"routed_experts_start", "routed_experts_codec"} < set(defaults)
    response = client.post("/generate", json={"inputs": "a", "parameters": defaults})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/abort", b'{"request_ids": [HALF]}', 422),
        ("/update_weights", b'{"path": HALF, "version": "1"}', 422),
        ("/generate", b'{"inputs": [1], HALF: 1}', 422),
        ("/generate", b'{"inputs": [1], "parameters": {"presence_penalty": HALF}}', 400),
        ("/v1/completions", b'{"model": HALF, "prompt": "a"}', 404),
        ("/v1/chat/completions", b'{"model": "model", "messages": [{"role": HALF, "content": HALF}]}', 400),
        ("/sglang/generate", b'{"text": HALF}', 400),
        ("/sglang/abort_request", b'{"rid": HALF}', 200),
    ],
)
def test_half_a_character_is_never_a_bug(client: TestClient, path: str, body: bytes, status: int) -> None:
    """JSON can say it, UTF-8 cannot."""
    content = body.replace(b"HALF", b'"\\ud800"')
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert b"\xed\xa0" not in response.content


def test_an_unknown_path_is_refused_in_the_same_form(client: TestClient) -> None:
    for method, path, status, what in (
        ("GET", "/nowhere", 404, "Not Found"),
        ("POST", "/generate/generate", 404, "Not Found"),
        ("POST", "/v1/generate", 404, "Not Found"),
        ("GET", "/generate", 405, "Method Not Allowed"),
    ):
        response = client.request(method, path)
        assert response.status_code == status
        message = response.json()["error"]["message"]
        assert message.startswith(
            f"the request cannot be served ({what}): got {method} {path}. See /docs for the paths"
        )


def test_health_tells_what_is_served(client: TestClient) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json()["status"] == "ok"
    assert response.json()["captures"] is True


def test_without_the_flag_a_request_for_routes_says_how_to_start_the_server() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    try:
        client = TestClient(create_app(engine))
        body = {"inputs": [1], "parameters": {"return_routed_experts": True}}
        response = client.post("/generate", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "CaptureOffError"
        assert "moetrace serve MODEL --enable-return-routed-experts" in response.json()["error"]["message"]
        assert client.get("/health").json()["captures"] is False
    finally:
        engine.close()


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(engine: TransformersEngine) -> None:
    client = TestClient(create_app(engine, tokenizer=None))
    response = generate(client, [65], max_new_tokens=2, return_details=True)
    assert response["generated_text"] is None
    assert response["output_token_ids"] == [66, 67]
    assert response["tokens"][0]["text"] is None
    refused = client.post("/generate", json={"inputs": "A"})
    assert refused.status_code == 400
    assert "Send token ids" in refused.json()["error"]["message"]


def test_when_the_engine_has_died_health_and_generate_say_so() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    engine.close()
    client = TestClient(create_app(engine))
    assert client.get("/health").status_code == 503
    response = client.post("/generate", json={"inputs": [1]})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "EngineError"


def test_encoding_a_long_sequence_does_not_hold_up_the_event_loop(engine: TransformersEngine, monkeypatch) -> None:
    threads: list[int] = []
    encode = generation.encode_responses

    def slow_encode(*args: Any) -> Any:
        threads.append(threading.get_ident())
        time.sleep(0.5)
        return encode(*args)

    monkeypatch.setattr(generation, "encode_responses", slow_encode)

    async def scenario() -> float:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            slow = asyncio.create_task(
                http.post("/generate", json={"inputs": [1], "parameters": {"max_new_tokens": 1}})
            )
            while not threads:
                await asyncio.sleep(0.01)
            began = time.perf_counter()
            assert (await http.get("/health")).status_code == 200
            waited = time.perf_counter() - began
            assert not slow.done()
            assert (await slow).status_code == 200
            return waited

    assert asyncio.run(scenario()) < 0.4
    assert threads[0] != threading.get_ident()
