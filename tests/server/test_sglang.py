"""SGLang's dialect as its RL clients use it. Tokens and routes are known from the dye checkpoint."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from moetrace.dialects import from_sglang
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import ServerConfig, create_app
from moetrace.server.sglang import routes

DYE = Dye(vocab=260)  # token id = byte; layer 0 of 4 is dense
TOKENIZER: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    model = DYE.model()
    model.generation_config.eos_token_id = 256
    engine = TransformersEngine(model, EngineConfig(enable_return_routed_experts=True, seed=0), TOKENIZER)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: TransformersEngine) -> TestClient:
    return TestClient(create_app(engine, TOKENIZER), raise_server_exceptions=False)


def generate(client: TestClient, sampling: dict[str, Any] | None = None, **body: Any) -> Any:
    body = {"sampling_params": {**GREEDY, "max_new_tokens": 4, **(sampling or {})}, **body}
    response = client.post("/sglang/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, sampling: dict[str, Any] | None = None, **body: Any) -> list[dict[str, Any]]:
    body = {"sampling_params": {**GREEDY, "max_new_tokens": 4, **(sampling or {})}, "stream": True, **body}
    response = client.post("/sglang/generate", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.content)


def events_of(content: bytes) -> list[dict[str, Any]]:
    *events, done, rest = content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def as_a_trainer_reads_it(output: dict[str, Any], prompt: list[int], start: int = 0) -> np.ndarray:
    """`[T, D, K]`, from what slime, miles and verl know: the tokens, the number of decoder layers, K."""
    tokens = prompt + [token for _, token, _ in output["meta_info"]["output_token_logprobs"]]
    data = base64.b64decode(output["meta_info"]["routed_experts"])
    return np.frombuffer(data, np.int32).reshape(len(tokens) - 1 - start, 4, DYE.top_k)


def test_text_comes_back_with_sglangs_fields(client: TestClient) -> None:
    output = generate(client, text="AB", rid="mine")
    assert output["meta_info"].pop("e2e_latency") > 0
    assert output == {
        "text": "CDEF",
        "output_ids": [67, 68, 69, 70],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "weight_version": "0",
        },
    }


def test_log_probabilities_are_triples(client: TestClient) -> None:
    meta = generate(client, input_ids=[65], return_logprob=True)["meta_info"]
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[66 + i, None] for i in range(4)]
    assert all(-1e-3 < logprob <= 0 for logprob, _, _ in meta["output_token_logprobs"])
    assert meta["input_token_logprobs"] == []
    meta = generate(client, input_ids=[65], return_logprob=True, return_text_in_logprobs=True)["meta_info"]
    assert [text for _, _, text in meta["output_token_logprobs"]] == list("BCDE")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_the_prompt_is_scored_from_a_position_on(client: TestClient, streamed: bool, new_tokens: int, start) -> None:
    """On-policy distillation asks a teacher so: no new tokens, log-probabilities from 0 on."""
    prompt = [65, 66, 67, 10]  # the dye expects 66 and 67, and not 10
    body: dict[str, Any] = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": start}
    body["return_routed_experts"] = True
    sampling = {"max_new_tokens": new_tokens}
    output = stream(client, sampling, **body)[-1] if streamed else generate(client, sampling, **body)
    meta = output["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": new_tokens}
    assert output["output_ids"] == [11, 12, 13][:new_tokens]
    likely = [None, True, True, False][start:]
    logprobs = [logprob for logprob, _, _ in meta["input_token_logprobs"]]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == prompt[start:]
    assert [None if logprob is None else logprob > -1e-3 for logprob in logprobs] == likely
    tokens = [*prompt, *output["output_ids"]]
    np.testing.assert_array_equal(as_a_trainer_reads_it(output, prompt)[:, 1:], DYE.routes(tokens[:-1]))


def test_a_seed_draws_the_same_again(client: TestClient) -> None:
    hot = {"temperature": 100.0, "max_new_tokens": 8}
    first, again, other = (
        generate(client, {**hot, "sampling_seed": seed}, input_ids=[65])["output_ids"] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_every_row_is_where_a_trainer_looks_for_it(client: TestClient, streamed: bool, start: int) -> None:
    prompt = [7, 200, 65]
    body: dict[str, Any] = {"input_ids": prompt, "return_logprob": True, "return_routed_experts": True}
    body |= {"routed_experts_start_len": start} if start else {}
    events = (
        stream(client, {"max_new_tokens": 30}, **body)
        if streamed
        else [generate(client, {"max_new_tokens": 30}, **body)]
    )
    output = events[-1]
    tokens = [*prompt, *DYE.continuation(65, 30)]
    ids_TDK = as_a_trainer_reads_it(output, prompt, start)
    np.testing.assert_array_equal(ids_TDK[:, 1:], DYE.routes(tokens[:-1])[start:])
    assert not ids_TDK[:, 0].any()
    assert output["meta_info"]["routed_experts_start_len"] == start
    assert not any("routed_experts" in event["meta_info"] for event in events[:-1])


def test_the_reader_makes_a_trace_of_it(client: TestClient, engine: TransformersEngine) -> None:
    output = generate(client, input_ids=[9, 8], return_routed_experts=True)
    assert engine.layout
    trace = from_sglang(
        output["meta_info"]["routed_experts"], [9, 8, *output["output_ids"]], engine.layout, engine.num_layers
    )
    np.testing.assert_array_equal(trace.experts_TLK, DYE.routes([9, 8, 9, 10, 11]))


def test_a_list_of_prompts_and_n_give_a_list(client: TestClient) -> None:
    outputs = generate(client, {"n": 2}, text=["A", "a"], rid="x", return_routed_experts=True, return_logprob=True)
    assert [output["text"] for output in outputs] == ["BCDE", "BCDE", "bcde", "bcde"]
    assert [output["meta_info"]["id"] for output in outputs] == ["x_0", "x_0", "x_1", "x_1"]
    for output, first in zip(outputs, [65, 65, 97, 97], strict=True):
        ids_TDK = as_a_trainer_reads_it(output, [first])
        np.testing.assert_array_equal(ids_TDK[:, 1:], DYE.routes([first, *DYE.continuation(first, 3)]))
    assert len(generate(client, input_ids=[[65]])) == 1
    assert len(generate(client, {"n": 3}, input_ids=[65])) == 3


def test_a_stream_brings_all_so_far_each_time(client: TestClient) -> None:
    events = stream(client, {"max_new_tokens": 3}, text="A", rid="s", return_logprob=True)
    assert [event["text"] for event in events] == ["B", "BC", "BCD"]
    assert [event["output_ids"] for event in events] == [[66], [66, 67], [66, 67, 68]]
    assert [len(event["meta_info"]["output_token_logprobs"]) for event in events] == [1, 2, 3]
    reasons = [event["meta_info"]["finish_reason"] for event in events]
    assert reasons == [None, None, {"type": "length", "length": 3}]
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert {event["meta_info"]["id"] for event in events} == {"s"}
    assert not any("index" in event for event in events)
    sparse = stream(client, {"max_new_tokens": 9, "stream_interval": 4}, text="A")
    assert [len(event["output_ids"]) for event in sparse] == [4, 8, 9]


def test_streams_of_several_sequences_say_which(client: TestClient) -> None:
    events = stream(client, {"n": 2}, text=["A", "a"], rid="s", return_routed_experts=True, return_logprob=True)
    assert {(event["index"], event["meta_info"]["id"]) for event in events} == {
        (0, "s_0"),
        (1, "s_0"),
        (2, "s_1"),
        (3, "s_1"),
    }
    last = {event["index"]: event for event in events}
    sizes = stream(client, text=["A", "abc"])
    assert {(event["index"], event["meta_info"]["prompt_tokens"]) for event in sizes} == {(0, 1), (1, 3)}
    assert [last[index]["text"] for index in range(4)] == ["BCDE", "BCDE", "bcde", "bcde"]
    for index in range(4):
        first = b"AAaa"[index]
        ids_TDK = as_a_trainer_reads_it(last[index], [first])
        np.testing.assert_array_equal(ids_TDK[:, 1:], DYE.routes([first, *DYE.continuation(first, 3)]))


@pytest.mark.parametrize(
    ("prompt", "sampling", "text", "matched"),
    [
        ([65], {"stop": "DE"}, "BC", "DE"),
        ([65], {"stop": ["X", "E"], "no_stop_trim": True}, "BCDE", "E"),
        ([65], {"stop_token_ids": [69]}, "BCD", 69),
        ([65], {"stop_token_ids": [69], "no_stop_trim": True}, "BCDE", 69),
        ([65], {"stop": "C", "min_new_tokens": 5, "stop_token_ids": [74]}, "BCDEFGHI", 74),
        ([48], {"max_new_tokens": 400}, None, 256),
        ([255], {}, "", 256),
        ([255], {"skip_special_tokens": False, "no_stop_trim": True}, "<|endoftext|>", 256),
        ([255], {"skip_special_tokens": False}, "", 256),
    ],
)
def test_what_ended_a_sequence_is_said_and_trimmed_as_asked(
    client: TestClient, prompt: list[int], sampling: dict[str, Any], text: str | None, matched: int | str
) -> None:
    sampling = {"max_new_tokens": 20, **sampling}
    whole = generate(client, sampling, input_ids=prompt)
    assert whole["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    assert text is None or whole["text"] == text
    last = whole["output_ids"][-1]
    assert last == (ord(matched[-1]) if isinstance(matched, str) else matched)
    *parts, end = stream(client, sampling, input_ids=prompt)
    assert (end["text"], end["output_ids"]) == (whole["text"], whole["output_ids"])
    texts = [part["text"] for part in [*parts, end]]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert all(whole["output_ids"][: len(part["output_ids"])] == part["output_ids"] for part in parts)


def test_defaults_are_sglangs(client: TestClient) -> None:
    response = client.post("/sglang/generate", json={"input_ids": [0]})
    assert response.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 128}
    response = client.post(
        "/sglang/generate", json={"input_ids": [0] * 400, "sampling_params": {"max_new_tokens": None}}
    )
    assert response.json()["meta_info"]["completion_tokens"] == 112  # the rest of the window
    hot = {"temperature": 100.0}
    assert generate(client, hot, input_ids=[65])["output_ids"] != generate(client, hot, input_ids=[65])["output_ids"]
    assert generate(client, {"temperature": 1e-7}, input_ids=[65])["output_ids"] == [66, 67, 68, 69]
    assert generate(client, {"temperature": 100.0, "top_k": 1}, input_ids=[65])["output_ids"] == [66, 67, 68, 69]


def test_what_slime_sends_is_accepted(client: TestClient) -> None:
    sampling = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 4,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    body = {"sampling_params": sampling, "return_logprob": True, "return_routed_experts": True, "input_ids": [65]}
    output = client.post("/sglang/generate", json=body, headers={"X-SMG-Routing-Key": "k"}).json()
    assert output["text"] == "BCDE"
    np.testing.assert_array_equal(as_a_trainer_reads_it(output, [65])[:, 1:], DYE.routes([65, 66, 67, 68]))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "it is not clear what the prompt is: expected either text or input_ids, got neither"),
        ({"text": "A", "input_ids": [1]}, 400, "got both"),
        ({"text": 3}, 422, "text is wrong: expected a text, or a list of texts"),
        ({"input_ids": "A"}, 422, "input_ids is wrong: expected a list of token ids, or a list of such lists"),
        ({"input_ids": [[1], 2]}, 422, "input_ids is wrong"),
        ({"input_ids": []}, 400, "the prompt is empty"),
        ({"text": []}, 400, "the prompt is empty"),
        ({"input_ids": [260]}, 400, "token id at position 0 is out of range"),
        ({"text": "A", "top_logprobs_num": 2}, 400, "'top_logprobs_num' is not supported by this server"),
        (
            {"text": "A", "return_logprob": True, "logprob_start_len": 2},
            400,
            "logprob_start_len is out of range: expected 0 <= start <= 1 prompt tokens, got 2",
        ),
        ({"text": "A", "sampling_params": {"max_new_tokens": 0}}, 400, "nothing is to be generated"),
        ({"text": "A", "image_data": ["x"]}, 400, "'image_data' is not supported"),
        ({"text": "A", "lora_path": "x"}, 400, "'lora_path' is not supported"),
        ({"text": "A", "return_hidden_states": True}, 400, "'return_hidden_states' is not supported"),
        ({"text": "A", "return_routes": True}, 400, "parameter 'return_routes' is unknown"),
        ({"text": "A", "rid": ["a"]}, 422, "rid is wrong"),
        ({"text": "A", "routed_experts_start_len": 1}, 400, "routes that were not asked for"),
        (
            {"text": "A", "return_routed_experts": True, "routed_experts_start_len": 2},
            400,
            "routed_experts_start_len is out of range: expected 0 <= start <= 1 prompt tokens, got 2",
        ),
        ({"text": "A", "return_routed_experts": True, "routed_experts_start_len": -1}, 400, "out of range"),
        *(
            ({"text": "A", "sampling_params": sampling}, status, message)
            for sampling, status, message in [
                ({"temperature": -1}, 400, "expected 0 (greedy), or 0.001 to 1000000"),
                ({"max_new_tokens": 512}, 400, "max_new_tokens does not fit the model's window"),
                ({"max_new_tokens": "4"}, 422, "sampling_params.max_new_tokens is wrong"),
                ({"min_new_tokens": 999}, 400, "min_new_tokens is out of range"),
                ({"top_k": 0}, 400, "top_k is out of range"),
                ({"top_p": 1.5}, 400, "top_p is out of range"),
                ({"n": 0}, 400, "n is out of range"),
                ({"stop": [1]}, 422, "sampling_params.stop is wrong: expected a text, or a list of texts"),
                ({"stop_token_ids": [260]}, 400, "stop token at position 0 is out of range"),
                ({"stream_interval": 0}, 422, "stream_interval is wrong"),
                ({"min_p": 0.1}, 400, "'min_p' is not supported"),
                ({"repetition_penalty": 1.1}, 400, "'repetition_penalty' is not supported"),
                ({"sampling_seed": 2**63}, 400, "seed is out of range"),
                ({"json_schema": "{}"}, 400, "'json_schema' is not supported"),
                ({"custom_params": {"return_top_p_token_ids": True}}, 400, "'custom_params' is not supported"),
                ({"max_tokens": 3}, 400, "parameter 'max_tokens' is unknown: expected custom_params, ebnf"),
            ]
        ),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_served_is_refused_by_name(client: TestClient, body, status, message, streamed: bool) -> None:
    for _ in range(2):  # the id is free again
        response = client.post("/sglang/generate", json={"rid": "same", "stream": streamed, **body})
        assert response.status_code == status
        assert message in response.json()["error"]["message"]


def test_without_capture_or_tokenizer(client: TestClient) -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    bare = TestClient(create_app(engine))
    output = generate(bare, input_ids=[65])
    assert "text" not in output
    assert output["output_ids"] == [66, 67, 68, 69]
    assert all("text" not in event for event in stream(bare, input_ids=[65]))
    response = bare.post("/sglang/generate", json={"input_ids": [65], "return_routed_experts": True})
    assert response.status_code == 400
    assert "--enable-return-routed-experts" in response.json()["error"]["message"]
    assert bare.get("/sglang/get_model_info").json()["model_path"] is None
    engine.close()


# --- aborts and rows that are missing ---


def test_an_abort_by_rid_returns_what_there_is_with_its_rows(engine: TransformersEngine) -> None:
    app = create_app(engine, TOKENIZER)
    sampling = {"temperature": 0, "max_new_tokens": 400}
    routed = {"input_ids": [7, 0], "sampling_params": sampling, "return_routed_experts": True, "return_logprob": True}

    async def scenario() -> list[dict[str, Any]]:
        calls = [
            Call(app, "/sglang/generate", {**routed, "rid": "whole"}),
            Call(app, "/sglang/generate", {**routed, "rid": "stream", "stream": True}),
        ]
        await until(lambda: len(calls[1].chunks) > 5)
        for rid in ("whole", "unknown", "stream"):
            abort = Call(app, "/sglang/abort_request", {"rid": rid})
            await abort.done
            assert abort.status == 200
        for call in calls:
            await call.done
        return [json.loads(b"".join(calls[0].chunks)), events_of(b"".join(calls[1].chunks))[-1]]

    for output in asyncio.run(scenario()):
        assert output["meta_info"]["finish_reason"]["type"] == "abort"
        tokens = [7, 0, *output["output_ids"]]
        assert 3 < len(tokens) < 256
        np.testing.assert_array_equal(as_a_trainer_reads_it(output, [7, 0])[:, 1:], DYE.routes(tokens[:-1]))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_abort_before_the_prompt_was_computed_has_no_rows_and_says_so(engine: TransformersEngine, streamed) -> None:
    app = create_app(engine, TOKENIZER)

    async def scenario() -> bytes:
        engine.pause()
        body = {"input_ids": [7, 8, 9], "return_routed_experts": True, "return_logprob": True, "stream": streamed}
        call = Call(app, "/sglang/generate", body)
        await until(lambda: engine._delivery.pending)
        abort = Call(app, "/sglang/abort_request", {"abort_all": True})
        await abort.done
        await call.done
        engine.resume()
        return b"".join(call.chunks)

    content = asyncio.run(scenario())
    output = events_of(content)[-1] if streamed else json.loads(content)
    assert output["meta_info"]["finish_reason"]["type"] == "abort"
    assert (output["text"], output["output_ids"]) == ("", [])
    assert output["meta_info"]["output_token_logprobs"] == []
    assert output["meta_info"]["routed_experts"] is None


@pytest.mark.parametrize("streamed", [False, True])
def test_a_finished_sequence_with_a_missing_row_is_an_error(engine: TransformersEngine, monkeypatch, streamed) -> None:
    assert engine._capture
    assemble = engine._capture.collect

    def lose_a_row(name: str, tokens: list[int]) -> Any:
        rows = assemble(name, tokens)
        rows.valid_T[1] = False
        return rows

    monkeypatch.setattr(engine._capture, "collect", lose_a_row)
    client = TestClient(create_app(engine, TOKENIZER), raise_server_exceptions=False)
    body = {"input_ids": [7, 8, 9], "return_routed_experts": True, "stream": streamed}
    response = client.post("/sglang/generate", json=body)
    assert response.status_code == (200 if streamed else 500)
    error = (events_of(response.content)[-1] if streamed else response.json())["error"]
    assert error["type"] == "MissingRowError"
    assert "the first at position 1" in error["message"]
    later = {**body, "routed_experts_start_len": 2}  # the row is not among those that were asked for
    response = client.post("/sglang/generate", json=later)
    assert response.status_code == 200
    output = events_of(response.content)[-1] if streamed else response.json()
    assert output["meta_info"]["routed_experts"]


# --- the server ---


def test_the_paths_that_watch_a_server(client: TestClient, engine: TransformersEngine) -> None:
    assert client.get("/sglang/health").status_code == 200
    assert client.get("/sglang/health_generate").status_code == 200
    info = client.get("/sglang/get_model_info").json()
    path = TOKENIZER.name_or_path
    assert info == client.get("/sglang/model_info").json()
    assert info == {
        "model_path": path,
        "tokenizer_path": path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "0",
    }
    assert client.get("/sglang/get_weight_version").json() == {"weight_version": "0"}
    engine.pause()
    assert client.get("/sglang/health").status_code == 200
    assert client.get("/sglang/health_generate").status_code == 503
    engine.resume()


def test_health_generate_gives_up_and_leaves_nothing_behind(engine: TransformersEngine, monkeypatch) -> None:
    client = TestClient(create_app(engine))
    monkeypatch.setattr(routes, "_HEALTH_SECONDS", 0.05)
    monkeypatch.setattr(TransformersEngine, "is_paused", False)
    engine.pause()
    assert client.get("/sglang/health_generate").status_code == 503
    for pending in list(engine._delivery.pending.values()):
        pending.future.result(30)
    engine.resume()
    assert not engine._delivery.pending


def test_a_dead_engine_and_a_server_that_ends_are_not_healthy() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    app = create_app(engine)
    client = TestClient(app)
    app.state.requests.is_draining = True
    for path in ("health", "health_generate"):
        assert client.get(f"/sglang/{path}").status_code == 503
    assert client.post("/sglang/generate", json={"input_ids": [1]}).status_code == 503
    app.state.requests.is_draining = False
    engine.close()
    for path in ("health", "health_generate"):
        assert client.get(f"/sglang/{path}").status_code == 503


def test_an_id_under_way_is_taken_and_a_client_that_leaves_ends_its_request(engine: TransformersEngine) -> None:
    app = create_app(engine, TOKENIZER)

    async def scenario() -> None:
        body = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 500}, "rid": "a"}
        call = Call(app, "/sglang/generate", {**body, "stream": True})
        await until(lambda: len(call.chunks) > 2)
        again = Call(app, "/sglang/generate", body)
        await again.done
        assert again.status == 409
        call.leave()
        await call.done
        await until(lambda: not engine._delivery.pending)

    asyncio.run(scenario())


def test_an_engine_that_dies_says_so_in_the_stream() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())

    def die(*_: object) -> None:
        raise RuntimeError("out of luck")

    engine._manager.batch_processor.update_batch = die
    (event,) = stream(TestClient(create_app(engine)), input_ids=[1])
    assert event["error"]["type"] == "EngineError"
    engine.close()


def test_keys_limits_and_metrics_hold_here_too(engine: TransformersEngine) -> None:
    config = ServerConfig(api_key="secret", max_sequences=3, max_prompt_tokens=5)
    client = TestClient(create_app(engine, TOKENIZER, config))
    assert client.get("/sglang/health").status_code == 200
    assert client.get("/sglang/health_generate").status_code == 401
    assert client.post("/sglang/generate", json={"input_ids": [1]}).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    assert client.post("/sglang/generate", json={"input_ids": [1] * 6}).status_code == 400
    assert client.post("/sglang/generate", json={"input_ids": [[1]] * 4}).status_code == 400
    generate(client, {"n": 2}, input_ids=[1, 2], return_routed_experts=True)
    stream(client, input_ids=[1])
    families = text_string_to_metric_families(client.get("/metrics").text)
    counted = {sample.name: sample.value for family in families for sample in family.samples}
    assert counted["moetrace_output_tokens_total"] == 12
    assert counted["moetrace_route_rows_total"] == 2 * 5
    assert counted["moetrace_first_token_seconds_count"] == 1
    assert counted["moetrace_between_tokens_seconds_count"] == 3
