"""OpenAI's endpoints through OpenAI's own client, over loopback. Every answer is known from the dye checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import openai
import pytest
from asgi import Call, until
from dye import Dye
from fastapi.testclient import TestClient
from loopback import serving
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from transformers import AutoTokenizer

from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import ServerConfig, create_app

DYE = Dye(vocab=260)  # token id = byte, and the next one follows: "AB" goes on as "CDE..."
TOKENIZER: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
CHAT: Any = deepcopy(TOKENIZER)
CHAT.chat_template = (
    "{% for m in messages %}{% if m.content == '!' %}{{ raise_exception('no shouting') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }};{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)
CONFIG = ServerConfig(served_model_name="dyed", max_sequences=8)
USER: Any = [{"role": "user", "content": "hi"}]
PROMPT = "uhi;A"


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    model = DYE.model()
    model.generation_config.eos_token_id = 256
    engine = TransformersEngine(model, EngineConfig(enable_return_routed_experts=True, seed=0), TOKENIZER)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine) -> Iterator[str]:
    with serving(create_app(engine, CHAT, CONFIG)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def raw(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/{path}", json={"model": "dyed", "temperature": 0, **body}, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def chunks_of(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    body = {"model": "dyed", "temperature": 0, "stream": True, **body}
    response = httpx.post(f"{url}/v1/{path}", json=body, timeout=30)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def assert_shape(kind: type[BaseModel], facts: dict[str, Any]) -> None:
    """`facts` has every field that OpenAI's type needs, of the right type, and none that it does not know."""
    parsed = kind.model_validate(facts, strict=True)
    stack: list[Any] = [parsed]
    while stack:
        item = stack.pop()
        if isinstance(item, BaseModel):
            assert not item.model_extra, f"{type(item).__name__} does not know {item.model_extra}"
            stack += [getattr(item, name) for name in type(item).model_fields]
        elif isinstance(item, list):
            stack += item


# --- shapes ---


def test_completions_have_openais_shape_and_nothing_else(url: str) -> None:
    facts = raw(url, "completions", {"prompt": "AB", "max_tokens": 3, "logprobs": 0})
    assert_shape(Completion, facts)
    assert facts.pop("id").startswith("cmpl-")
    assert abs(facts.pop("created") - httpx.get(f"{url}/v1/models").json()["data"][0]["created"]) < 600
    logprobs = facts["choices"][0].pop("logprobs")
    assert all(-1e-3 < each <= 0 for each in logprobs.pop("token_logprobs"))
    assert logprobs == {"tokens": ["C", "D", "E"], "text_offset": [0, 1, 2], "top_logprobs": None}
    assert facts == {
        "object": "text_completion",
        "model": "dyed",
        "choices": [{"index": 0, "text": "CDE", "finish_reason": "length"}],
        "system_fingerprint": None,
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    assert raw(url, "completions", {"prompt": "AB", "max_tokens": 3})["choices"][0]["logprobs"] is None


def test_chat_completions_have_openais_shape_and_nothing_else(url: str) -> None:
    facts = raw(url, "chat/completions", {"messages": USER, "max_tokens": 2, "logprobs": True})
    assert_shape(ChatCompletion, facts)
    assert facts.pop("id").startswith("chatcmpl-")
    assert facts.pop("created") > 0
    logprobs = facts["choices"][0].pop("logprobs")
    for token, text in zip(logprobs["content"], "BC", strict=True):
        assert -1e-3 < token.pop("logprob") <= 0
        assert token == {"token": text, "bytes": [ord(text)], "top_logprobs": []}
    assert logprobs["refusal"] is None
    message = {"role": "assistant", "content": "BC", "refusal": None}
    assert facts == {
        "object": "chat.completion",
        "model": "dyed",
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "system_fingerprint": None,
        "usage": {"prompt_tokens": len(PROMPT), "completion_tokens": 2, "total_tokens": len(PROMPT) + 2},
    }
    assert raw(url, "chat/completions", {"messages": USER, "max_tokens": 2})["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("usage", [True, False])
def test_chunks_of_completions_have_openais_shape(url: str, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = chunks_of(url, "completions", {"prompt": "AB", "max_tokens": 3, "logprobs": 0, **options})
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.get("usage", "none") == (None if usage else "none")
        chunk["choices"][0]["finish_reason"] = "length"  # the type has a reason in every chunk; the API has not
        assert_shape(Completion, chunk)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["C", "D", "E"]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2]]


@pytest.mark.parametrize("usage", [True, False])
def test_chunks_of_chat_completions_have_openais_shape(url: str, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = chunks_of(url, "chat/completions", {"messages": USER, "max_tokens": 3, "logprobs": True, **options})
    for chunk in chunks:
        assert_shape(ChatCompletionChunk, chunk)
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 3
    assert all(chunk.get("usage", "none") == (None if usage else "none") for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[1:] == [{"content": "B"}, {"content": "C"}, {"content": "D"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 3 + ["length"]
    shown = [token["token"] for chunk in chunks[1:] for token in chunk["choices"][0]["logprobs"]["content"]]
    assert shown == ["B", "C", "D"]


def test_models_are_listed_and_found_by_name(client: openai.OpenAI, url: str) -> None:
    (model,) = client.models.list()
    assert (model.id, client.models.retrieve("dyed").id) == ("dyed", "dyed")
    assert_shape(Model, httpx.get(f"{url}/v1/models/dyed").json())
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


# --- what is generated ---


@pytest.mark.parametrize(
    ("prompt", "tokens", "texts"),
    [
        ("AB", 2, ["CD"]),
        ([65, 66], 2, ["CD"]),
        (["AB", "ab"], 4, ["CD", "cd"]),
        ([[65], [97, 98], [48]], 4, ["BC", "cd", "12"]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_every_form_of_prompt_with_its_choices_in_order(
    client: openai.OpenAI, prompt: Any, tokens: int, texts: list[str], n: int
) -> None:
    options: Any = {"model": "dyed", "prompt": prompt, "max_tokens": 2, "temperature": 0, "n": n}
    response = client.completions.create(**options)
    expected = [text for text in texts for _ in range(n)]
    assert [choice.index for choice in response.choices] == list(range(len(expected)))
    assert [choice.text for choice in response.choices] == expected
    assert response.usage
    assert response.usage.completion_tokens == 2 * len(expected)
    assert response.usage.prompt_tokens == tokens  # each prompt counts once
    streamed = [""] * len(expected)
    *chunks, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected
    assert last.usage == response.usage


def test_the_chat_template_makes_the_prompt(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "y", "name": "z"},
    ]
    options: Any = {"model": "dyed", "messages": messages, "temperature": 0}
    response = client.chat.completions.create(**options, max_completion_tokens=3)
    assert response.choices[0].message.content == "BCD"
    assert response.usage
    assert response.usage.prompt_tokens == len("sbe!;ax;uy;A")
    stream = client.chat.completions.create(**options, max_tokens=3, stream=True, n=2)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["BCD", "BCD"]


def test_by_default_completions_end_after_16_tokens_and_chats_with_the_window(client: openai.OpenAI) -> None:
    ids = [0] * 300  # goes on as 1, 2, ...: never to 256, the end of a sequence
    completion = client.completions.create(model="dyed", prompt=ids, temperature=0)
    assert completion.usage
    assert completion.usage.completion_tokens == 16
    content = "b" * 350
    chat = client.chat.completions.create(model="dyed", messages=[{"role": "user", "content": content}], temperature=0)
    assert chat.usage
    assert chat.usage.prompt_tokens + chat.usage.completion_tokens == 512
    assert chat.choices[0].finish_reason == "length"


@pytest.mark.parametrize("logprobs", [None, 0])
def test_the_end_of_sequence_token_is_counted_and_not_shown(client: openai.OpenAI, logprobs: int | None) -> None:
    options: Any = {"model": "dyed", "prompt": [250], "max_tokens": 50, "temperature": 0, "logprobs": logprobs}
    choice = client.completions.create(**options).choices[0]
    assert choice.finish_reason == "stop"
    assert len(choice.text) == 5
    assert choice.logprobs is None or len(choice.logprobs.tokens or []) == 5
    *_, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert last.usage
    assert last.usage.completion_tokens == 6  # 251 to 256


def test_sampling_follows_the_temperature(client: openai.OpenAI) -> None:
    options: Any = {"model": "dyed", "prompt": "A", "max_tokens": 16}
    assert client.completions.create(**options, temperature=0).choices[0].text == "BCDEFGHIJKLMNOPQ"
    drawn = client.completions.create(**options, temperature=100.0, n=4)
    assert len({choice.text for choice in drawn.choices}) > 1
    narrow = client.completions.create(**options, temperature=1.0, top_p=0.01)
    assert narrow.choices[0].text == "BCDEFGHIJKLMNOPQ"


def test_a_seed_draws_the_same_again(client: openai.OpenAI) -> None:
    options: Any = {"model": "dyed", "temperature": 100.0, "max_tokens": 8}
    first, again, other = (
        client.completions.create(**options, prompt="A", seed=seed).choices[0].text for seed in (1, 1, 2)
    )
    assert first == again != other
    chats = [client.chat.completions.create(**options, messages=USER, seed=7) for _ in range(2)]
    assert chats[0].choices[0].message.content == chats[1].choices[0].message.content


# --- stop texts: not in the output, whole or streamed ---


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("EF", "BCD", "stop"),
        (["XX", "EFG"], "BCD", "stop"),
        (["B"], "", "stop"),
        (["EF", "DEF"], "BC", "stop"),  # both are complete with F
        (["DEX", "EFX", "F"], "BCDE", "stop"),  # what was held back turns out to be text
        (["QR"], "BCDEFGHIJKLMNOPQ", "length"),  # held back until the end
        (["a", "b", "c", "d", "e", "E"], "BCD", "stop"),  # more than OpenAI's four
        ([], "BCDEFGHIJKLMNOPQ", "length"),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_stop_text_ends_the_output_and_is_not_in_it(
    client: openai.OpenAI, url: str, stop: Any, text: str, reason: str, logprobs: int | None
) -> None:
    options: Any = {"model": "dyed", "prompt": "A", "temperature": 0, "stop": stop, "logprobs": logprobs}
    choice = client.completions.create(**options).choices[0]
    assert (choice.text, choice.finish_reason) == (text, reason)
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == reason
    if logprobs is not None:
        assert choice.logprobs
        assert choice.logprobs.tokens == list(text)
        assert choice.logprobs.text_offset == list(range(len(text)))
        streamed = [chunk.choices[0].logprobs for chunk in chunks]
        assert [token for each in streamed if each for token in each.tokens or []] == list(text)
    chat: Any = {"model": "dyed", "messages": USER, "temperature": 0, "stop": stop, "max_tokens": 16}
    assert client.chat.completions.create(**chat).choices[0].message.content == text
    deltas = client.chat.completions.create(**chat, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == text


# --- refusals ---

BODIES: dict[str, dict[str, Any]] = {
    "completions": {"model": "dyed", "prompt": "A"},
    "chat/completions": {"model": "dyed", "messages": USER},
}
Refused = list[tuple[dict[str, Any], str | None, str]]
COMPLETIONS: Refused = [
    ({"return_routed_experts": True}, "return_routed_experts", "Send the prompt to /generate with"),
    ({"routed_experts_start": 0}, "routed_experts_start", "OpenAI's responses have no place for them"),
    ({"routed_experts_codec": "raw"}, "routed_experts_codec", "/generate"),
    ({"routed_experts_start_len": 0}, "routed_experts_start_len", "/generate"),
    ({"prompt": 3}, "prompt", "prompt is wrong: expected text, or a list of token ids, or a list"),
    ({"prompt": [[1], "a", 2]}, "prompt", "prompt is wrong"),
    ({"prompt": ""}, None, "the prompt is empty"),
    ({"prompt": [260]}, None, "token id at position 0 is out of range: expected 0 <= id < 260"),
    ({"max_tokens": 0}, None, "max_tokens is out of range: expected an integer >= 1, got 0"),
    ({"max_tokens": 512}, None, "max_tokens does not fit the model's window"),
    ({"max_tokens": "9"}, "max_tokens", "max_tokens is wrong"),
    ({"temperature": -1}, "temperature", "expected 0 (greedy), or 0.001 to 1000000, got -1"),
    ({"top_p": 0}, None, "top_p is out of range"),
    ({"n": 0}, None, "n is out of range"),
    ({"n": 9}, None, "more sequences than the server takes"),
    ({"best_of": 2}, "best_of", "this server ranks no sequences: expected best_of absent, or 1, got 2"),
    ({"logprobs": 1}, "logprobs", "chosen tokens only: expected logprobs absent, or 0, got 1"),
    ({"echo": True}, "echo", "'echo' is not supported by this server: expected it absent or False"),
    ({"suffix": "x"}, "suffix", "'suffix' is not supported"),
    ({"seed": 2**63}, None, "seed is out of range"),
    ({"presence_penalty": 0.1}, "presence_penalty", "'presence_penalty' is not supported"),
    ({"presence_penalty": False}, "presence_penalty", "'presence_penalty' is not supported"),
    ({"frequency_penalty": -1}, "frequency_penalty", "'frequency_penalty' is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "'logit_bias' is not supported"),
    ({"stop": ""}, None, "stop is out of range: expected texts that are not empty"),
    ({"stop": [3]}, "stop", "stop is wrong: expected a text, or a list of texts"),
    ({"messages": USER}, "messages", "parameter 'messages' is unknown"),
    ({"top_k": 5}, "top_k", "parameter 'top_k' is unknown: expected best_of"),
]
CHATS: Refused = [
    ({"return_routed_experts": True}, "return_routed_experts", "/generate"),
    ({"messages": []}, "messages", "messages is wrong: expected at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role is not supported"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content is wrong"),
    ({"messages": [*USER, {"role": "user", "content": "!"}]}, "messages", "no shouting"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "messages.0.content.0 is not text, and this server takes nothing else",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages",
        "messages.0.tool_calls is not supported",
    ),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, None, "longer than the model's window"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradict each other"),
    ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "'tool_choice' is not supported"),
    ({"functions": [{"name": "f"}]}, "functions", "'functions' is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "'response_format' is not supp"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "'top_logprobs' is not supported"),
    ({"logprobs": 1}, "logprobs", "logprobs is wrong"),
    ({"store": True}, "store", "'store' is not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "'reasoning_effort' is not supported"),
    ({"prompt": "x"}, "prompt", "parameter 'prompt' is unknown"),
]


@pytest.mark.parametrize(
    ("path", "extra", "param", "message"),
    [*(("completions", *case) for case in COMPLETIONS), *(("chat/completions", *case) for case in CHATS)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_a_bad_request_that_says_why(
    client: openai.OpenAI, path: str, extra: dict[str, Any], param: str | None, message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(f"/{path}", body={**BODIES[path], **extra, "stream": stream}, cast_to=object)
    assert caught.value.status_code == 400
    assert message in caught.value.message
    facts: Any = caught.value.body
    assert set(facts) == {"message", "type", "param", "code"}
    assert (facts["type"], facts["param"], facts["code"]) == ("invalid_request_error", param, None)


def test_routes_are_refused_through_extra_body_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/generate"):
        client.chat.completions.create(model="dyed", messages=USER, extra_body={"return_routed_experts": True})


def test_what_makes_no_difference_is_accepted(client: openai.OpenAI) -> None:
    common: Any = {"model": "dyed", "user": "me", "seed": None, "logit_bias": {}, "presence_penalty": 0.0}
    completion = client.completions.create(**common, prompt="A", temperature=0, max_tokens=1, best_of=1, echo=False)
    assert completion.choices[0].text == "B"
    chat = client.chat.completions.create(
        **common,
        messages=USER,
        temperature=0,
        max_tokens=1,
        tools=[],
        response_format={"type": "text"},
        top_logprobs=0,
        metadata={"a": "b"},
        service_tier="auto",
    )
    assert chat.choices[0].message.content == "B"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", b"{", "not JSON"),
        ("completions", b'{"model": "dyed", "prompt": "A", "stream_options": {}}', "stream_options are for streams"),
        ("completions", b'{"prompt": "A"}', "model is missing. See /docs"),
        ("completions", b'{"model": "dyed", "prompt": "\\ud800"}', "not valid Unicode"),
        ("chat/completions", b'{"model": "dyed", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates"),
    ],
)
def test_what_the_client_itself_would_not_send_is_a_bad_request_too(
    url: str, path: str, body: bytes, message: str
) -> None:
    response = httpx.post(f"{url}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for create in (
        lambda: client.completions.create(model="gpt", prompt="A"),
        lambda: client.chat.completions.create(model="gpt", messages=USER),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            create()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert "expected dyed, got gpt" in caught.value.message


def test_a_wrong_key_an_overload_and_a_shutdown_raise_the_clients_own_exceptions(engine: TransformersEngine) -> None:
    app = create_app(engine, CHAT, ServerConfig(api_key="secret", served_model_name="dyed", max_body_bytes=500))
    with serving(app) as url:
        clients = {key: openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("secret", "wrong")}
        create = clients["secret"].completions.create
        assert create(model="dyed", prompt="A", max_tokens=1, temperature=0).choices[0].text == "B"
        with pytest.raises(openai.AuthenticationError) as unknown:
            clients["wrong"].models.list()
        assert unknown.value.code == "invalid_api_key"
        with pytest.raises(openai.APIStatusError) as large:
            create(model="dyed", prompt="A" * 600)
        assert (large.value.status_code, large.value.type) == (413, "invalid_request_error")
        app.state.requests.is_draining = True
        with pytest.raises(openai.InternalServerError) as over:
            create(model="dyed", prompt="A")
        assert (over.value.status_code, over.value.type) == (503, "server_error")
        for client in clients.values():
            client.close()


def test_more_than_the_server_takes_is_a_rate_limit(engine: TransformersEngine) -> None:
    app = create_app(engine, CHAT, ServerConfig(max_requests=1))

    async def scenario() -> None:
        engine.pause()
        first = Call(app, "/v1/completions", {"model": "model", "prompt": "A", "temperature": 0})
        await until(lambda: engine._delivery.pending)
        second = Call(app, "/v1/chat/completions", {"model": "model", "messages": USER, "stream": True})
        await second.done
        assert (second.status, second.headers["retry-after"]) == (429, "1")
        error = json.loads(second.chunks[0])["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        engine.resume()
        await first.done
        assert json.loads(first.chunks[0])["choices"][0]["text"].startswith("BCD")

    asyncio.run(scenario())


def test_a_checkpoint_without_a_template_or_tokenizer_says_so(engine: TransformersEngine) -> None:
    client = TestClient(create_app(engine, TOKENIZER))
    response = client.post("/v1/chat/completions", json={"model": "model", "messages": USER})
    assert response.status_code == 400
    assert "this checkpoint has no chat template" in response.json()["error"]["message"]
    client = TestClient(create_app(engine))
    for path, body in (("completions", {"prompt": [65]}), ("chat/completions", {"messages": USER})):
        response = client.post(f"/v1/{path}", json={"model": "model", **body})
        assert response.status_code == 400
        assert "has no tokenizer" in response.json()["error"]["message"]


# --- streams that end early ---


def test_a_client_that_leaves_ends_its_request(engine: TransformersEngine) -> None:
    app = create_app(engine, CHAT)

    async def scenario() -> None:
        body = {"model": "model", "messages": USER, "temperature": 100.0, "stream": True, "n": 2}
        call = Call(app, "/v1/chat/completions", body)
        await until(lambda: len(call.chunks) > 4)
        assert len(engine._delivery.pending) == 2
        call.leave()
        await call.done
        await until(lambda: not engine._delivery.pending)
        assert len(app.state.requests) == 0
        assert not any(b"[DONE]" in chunk for chunk in call.chunks)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_cuts_the_text_and_says_length(engine: TransformersEngine, stream: bool) -> None:
    app = create_app(engine, CHAT)

    async def scenario() -> bytes:
        body = {"model": "model", "messages": USER, "temperature": 0, "stream": stream, "stop": ["~~"]}
        engine.pause()
        call = Call(app, "/v1/chat/completions", body, {"X-Request-Id": "me"})
        await until(lambda: engine._delivery.pending)
        abort = Call(app, "/abort", {"request_ids": ["me"]})
        await abort.done
        assert json.loads(abort.chunks[0])["aborted"] == ["me"]
        await call.done
        engine.resume()
        return b"".join(call.chunks)

    content = asyncio.run(scenario())
    last = json.loads(content.split(b"\n\n")[-3].removeprefix(b"data: ") if stream else content)
    assert last["choices"][0]["finish_reason"] == "length"


def test_an_engine_that_dies_raises_in_the_clients_stream() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig(), TOKENIZER)

    def die(*_: object) -> None:
        raise RuntimeError("out of luck")

    engine._manager.batch_processor.update_batch = die
    with serving(create_app(engine, CHAT)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with pytest.raises(openai.APIError) as caught:
            list(client.completions.create(model="model", prompt="A", stream=True))
        assert not isinstance(caught.value, openai.APIStatusError)
        assert caught.value.type == "server_error"
    engine.close()
