"""`/generate` in full: several prompts, several sequences, stops, and routes as they are asked for."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from dye import Dye
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app

DYE = Dye(vocab=260)  # the tiny model's tokenizer: token id = byte


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    tokenizer: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, seed=0), tokenizer)
    yield TestClient(create_app(engine, tokenizer), raise_server_exceptions=False)
    engine.close()


def generate(client: TestClient, inputs: object, **parameters: object) -> Any:
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()


def assert_dyed(response: dict[str, Any], payload: dict[str, Any], output: list[int]) -> None:
    tokens = response["prompt_token_ids"] + output
    trace = from_lightllm(payload, tokens)
    assert trace.valid_T.all()
    assert trace.stop == len(tokens) - 1
    np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1])[trace.start :])


def test_a_list_of_prompts_gives_a_list_of_responses_as_each_would_have_alone(client: TestClient) -> None:
    prompts = ["ABC", [10, 20], "x", [5]]
    parameters = {"max_new_tokens": 4, "return_routed_experts": True, "return_details": True}
    responses = generate(client, prompts, **parameters)
    assert responses == [generate(client, prompt, **parameters) for prompt in prompts]
    assert [response["generated_text"] for response in responses] == [
        ["DEFG"],
        ["\x15\x16\x17\x18"],
        ["yz{|"],
        ["\x06\x07\x08\t"],
    ]
    assert generate(client, ["ABC"], **parameters) == responses[:1]


def test_n_sequences_come_as_lists_with_the_rows_of_each(client: TestClient) -> None:
    response = generate(client, "AB", n=3, best_of=3, max_new_tokens=6, return_routed_experts=True, return_details=True)
    assert response["generated_text"] == ["CDEFGH"] * 3
    assert response["count_output_tokens"] == [6, 6, 6]
    assert response["finish_reason"] == ["length"] * 3
    assert response["weight_version"] == ["0"] * 3
    assert response["prompt_tokens"] == 2
    assert response["usage"] == {"prompt_tokens": 2, "completion_tokens": 18, "total_tokens": 20}
    assert [[token["text"] for token in tokens] for tokens in response["tokens"]] == [list("CDEFGH")] * 3
    assert len(response["routed_experts"]) == 3
    for payload, output in zip(response["routed_experts"], response["output_token_ids"], strict=True):
        assert_dyed(response, payload, output)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_sequences_that_differ_have_rows_of_their_own(client: TestClient, path: str) -> None:
    parameters = {"n": 4, "do_sample": True, "temperature": 1e6, "max_new_tokens": 12, "return_routed_experts": True}
    response = client.post(path, json={"inputs": "AB", "parameters": parameters})
    if path == "/generate":
        whole = response.json()
        sequences = list(zip(whole["output_token_ids"], whole["routed_experts"], strict=True))
    else:
        events = [json.loads(event.removeprefix(b"data:")) for event in response.content.split(b"\n\n")[:-1]]
        sequences = [(e["output_token_ids"], e["routed_experts"]) for e in events if e["finished"]]
    assert len({tuple(output) for output, _ in sequences}) == 4
    for output, payload in sequences:
        assert_dyed({"prompt_token_ids": [65, 66]}, payload, output)


@pytest.mark.parametrize(
    ("stop_sequences", "text"),
    [
        ("EF", "CDEF"),
        (["zz", "EF"], "CDEF"),
        (["FG", [69, 70]], "CDEF"),
        ([[70]], "CDEF"),
        ([[69, 71], [72]], "CDEFGH"),
        (["BC"], "CDEFGHIJ"),
    ],
)
def test_stop_sequences_are_texts_and_runs_of_tokens(client: TestClient, stop_sequences: Any, text: str) -> None:
    response = generate(client, "AB", max_new_tokens=8, stop_sequences=stop_sequences, return_routed_experts=True)
    assert response["generated_text"] == [text]
    assert response["finish_reason"] == ("length" if len(text) == 8 else "stop")
    assert_dyed(response, response["routed_experts"], response["output_token_ids"])


def test_fewest_tokens(client: TestClient) -> None:
    response = generate(client, "AB", max_new_tokens=20, min_new_tokens=4, stop_sequences=[[67], "D", [72]])
    assert response["generated_text"] == ["CDEFGH"]


def test_special_tokens_stay_in_the_text_when_asked(client: TestClient) -> None:
    response = generate(client, [254], max_new_tokens=3, return_details=True)
    assert [token["special"] for token in response["tokens"]] == [False, True, True]
    assert "<" not in response["generated_text"][0]
    kept = generate(client, [254], max_new_tokens=3, skip_special_tokens=False)["generated_text"][0]
    assert kept.endswith("".join(token["text"] for token in response["tokens"][1:]))
    assert "<" in kept


@pytest.mark.parametrize(
    ("layout", "dtype", "start"),
    list(itertools.product(["LTK", "TLK"], ["int32", "int16", "uint16", "uint8"], [0, 2, 4])),
)
def test_routes_come_in_the_order_type_and_from_the_row_asked_for(
    client: TestClient, layout: str, dtype: str, start: int
) -> None:
    response = generate(
        client,
        "ABCD",
        max_new_tokens=3,
        return_routed_experts=True,
        routed_experts_start=start,
        routed_experts_layout=layout,
        routed_experts_dtype=dtype,
    )
    payload = response["routed_experts"]
    sizes = {"T": 4 + 3 - 1 - start, "L": 3, "K": 4}
    assert payload["shape"] == [sizes[axis] for axis in layout]
    assert (payload["layout"], payload["dtype"], payload["start"]) == (layout, dtype, start)
    array = np.frombuffer(base64.b64decode(payload["data"]), dtype).reshape(payload["shape"])
    array_TLK = array.transpose(1, 0, 2) if layout == "LTK" else array
    tokens = response["prompt_token_ids"] + response["output_token_ids"]
    np.testing.assert_array_equal(array_TLK, DYE.routes(tokens[:-1])[start:])
    assert_dyed(response, payload, response["output_token_ids"])


def test_the_turns_of_a_conversation_join_without_a_row_twice(client: TestClient) -> None:
    first = generate(client, "ABC", max_new_tokens=3, return_routed_experts=True)
    said = first["prompt_token_ids"] + first["output_token_ids"]
    trace = from_lightllm(first["routed_experts"], said)
    prompt = [*said, 7, 8]
    options = {"return_routed_experts": True, "routed_experts_start": trace.stop}
    second = generate(client, prompt, max_new_tokens=4, **options)
    tokens = prompt + second["output_token_ids"]
    whole = trace.concat(from_lightllm(second["routed_experts"], tokens))
    np.testing.assert_array_equal(whole.experts_TLK, DYE.routes(tokens[:-1]))


def test_a_type_that_cannot_hold_the_models_ids_is_refused() -> None:
    dye = Dye(vocab=48, num_experts=300, num_layers=2)
    engine = TransformersEngine(dye.model(), EngineConfig(enable_return_routed_experts=True))
    try:
        client = TestClient(create_app(engine))
        parameters = {"return_routed_experts": True, "routed_experts_dtype": "uint8"}
        response = client.post("/generate", json={"inputs": [1], "parameters": parameters})
        assert response.status_code == 400
        assert "do not fit uint8" in response.json()["error"]["message"]
        parameters["routed_experts_dtype"] = "uint16"
        assert client.post("/generate", json={"inputs": [1], "parameters": parameters}).status_code == 200
    finally:
        engine.close()


def test_a_list_with_one_bad_prompt_generates_nothing(client: TestClient) -> None:
    response = client.post("/generate", json={"inputs": ["A", "B" * 600], "parameters": {"max_new_tokens": 4}})
    assert response.status_code == 400
    assert "longer than the model's window" in response.json()["error"]["message"]
