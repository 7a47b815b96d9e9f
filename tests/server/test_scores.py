"""Scoring requests, log-probabilities of prompts and seeds, as clients of `/generate` see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from dye import Dye
from fastapi.testclient import TestClient

from moetrace.dialects import from_lightllm
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app

DYE = Dye()
LOG_SUM = float(np.logaddexp(4 * np.sqrt(96), np.log(95)))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    model = DYE.model()
    model.generation_config.eos_token_id = 20
    engine = TransformersEngine(model, EngineConfig(enable_return_routed_experts=True))
    yield TestClient(create_app(engine), raise_server_exceptions=False)
    engine.close()


def generate(client: TestClient, inputs: object, status: int = 200, **parameters: Any) -> Any:
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == status, response.text
    return response.json()


def scores_of(prompt: list[int]) -> list[Any]:
    """The dye's closed form: 4 sqrt(V) for the token that follows, 0 for any other."""
    follows = [after == (token + 1) % 96 for token, after in pairwise(prompt)]
    return [None, *(pytest.approx(4 * np.sqrt(96) * right - LOG_SUM, abs=5e-3) for right in follows)]


@pytest.mark.parametrize("prompt", [[19], [3, 4, 9, 10, 10], [17, 18, 19]])
def test_a_scoring_request_returns_all_rows_and_scores_and_no_token(client: TestClient, prompt: list[int]) -> None:
    for path in ("/generate", "/generate_stream"):
        parameters = {"max_new_tokens": 0, "return_prompt_logprobs": True, "return_routed_experts": True}
        response = client.post(path, json={"inputs": prompt, "parameters": parameters})
        assert response.status_code == 200, response.text
        if path == "/generate":
            body = response.json()
            assert body["count_output_tokens"] == 0
        else:
            (body,) = [json.loads(event.removeprefix(b"data:")) for event in response.content.split(b"\n\n")[:-1]]
            assert (body["token"], body["finished"]) == (None, True)
        assert (body["output_token_ids"], body["finish_reason"]) == ([], "length")
        assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 0, "total_tokens": len(prompt)}
        assert body["prompt_logprobs"] == scores_of(prompt)
        trace = from_lightllm(body["routed_experts"], prompt)
        assert trace.valid_T.all()
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(prompt))


def test_a_scored_list_of_prompts_and_rows_from_a_start(client: TestClient) -> None:
    prompts = [[1, 2, 4], [9, 10, 11, 12, 13]]
    routes = {"return_routed_experts": True, "routed_experts_start": 3}
    responses = generate(client, prompts, max_new_tokens=0, return_prompt_logprobs=True, **routes)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response["prompt_logprobs"] == scores_of(prompt)
        trace = from_lightllm(response["routed_experts"], prompt)
        assert (trace.start, trace.stop) == (3, len(prompt))
        np.testing.assert_array_equal(trace.experts_TLK.reshape(-1, 3, 4), DYE.routes(prompt[3:]).reshape(-1, 3, 4))


def test_a_scored_turn_and_the_next_one_join(client: TestClient) -> None:
    first = generate(client, [5, 6, 7], max_new_tokens=0, return_routed_experts=True)
    trace = from_lightllm(first["routed_experts"], [5, 6, 7])
    options = {"return_routed_experts": True, "routed_experts_start": trace.stop}
    second = generate(client, [5, 6, 7, 30], max_new_tokens=3, **options)
    tokens = [5, 6, 7, 30, 31, 32, 33]
    whole = trace.concat(from_lightllm(second["routed_experts"], tokens))
    np.testing.assert_array_equal(whole.experts_TLK, DYE.routes(tokens[:-1]))


def test_scores_come_with_generation_too_and_once_for_all_sequences(client: TestClient) -> None:
    response = generate(client, [40, 41, 50], n=2, max_new_tokens=3, return_prompt_logprobs=True, return_details=True)
    assert response["prompt_logprobs"] == scores_of([40, 41, 50])
    assert response["output_token_ids"] == [[51, 52, 53]] * 2
    assert "prompt_logprobs" not in generate(client, [40, 41], max_new_tokens=1)


def test_an_end_of_sequence_token_that_was_dropped_stops_nothing(client: TestClient) -> None:
    stops: Any = {"stop_sequences": [[20], [19, 20]]}
    assert generate(client, [19], max_new_tokens=0, return_prompt_logprobs=True, **stops)["finish_reason"] == "length"
    assert generate(client, [19], max_new_tokens=5)["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "nothing is to be generated, and nothing of the prompt to be returned"),
        ({"return_details": True}, "nothing is to be generated"),
        ({"return_prompt_logprobs": True, "n": 2}, "n is out of range: expected 1 where nothing is generated"),
        ({"return_prompt_logprobs": True, "min_new_tokens": 1}, "min_new_tokens is out of range"),
    ],
)
def test_what_makes_no_sense_of_a_score_is_refused(client: TestClient, parameters: Any, message: str) -> None:
    assert message in generate(client, [1, 2], 400, max_new_tokens=0, **parameters)["error"]["message"]


def test_a_seed_repeats_what_it_drew(client: TestClient) -> None:
    drawn: Any = {"do_sample": True, "temperature": 1000.0, "max_new_tokens": 20, "ignore_eos": True}
    first, again, other = (generate(client, [7], **drawn, seed=seed)["output_token_ids"] for seed in (5, 5, 6))
    assert first == again != other
    sequences = generate(client, [7], **drawn, seed=5, n=3)["output_token_ids"]
    assert sequences[0] == first
    assert len({tuple(sequence) for sequence in sequences}) == 3
    for neutral in (-1, None):
        assert generate(client, [7], **drawn, seed=neutral) != generate(client, [7], **drawn, seed=neutral)
