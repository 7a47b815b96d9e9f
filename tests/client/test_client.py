"""Both clients against the real server, whose tokens and routes are known in closed form."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import httpx
import numpy as np
import pytest
from asking import DYE, Asker, assert_dyed, dyed_engine
from losing import losing
from serving import free_port, serving
from traces import refused

from moetrace import AsyncClient, Client
from moetrace.client import Completion, TraceReference
from moetrace.client.calls import Calls
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import (
    CaptureOffError,
    DuplicateRequestError,
    RequestError,
    UnknownTraceError,
    UnreachableError,
    WeightsError,
)
from moetrace.server import create_app
from moetrace.server.config import ServerConfig

Dyed = tuple[TransformersEngine, Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


@pytest.fixture(scope="module")
def dyed() -> Iterator[Dyed]:
    with dyed_engine() as dyed:
        yield dyed


@pytest.fixture(scope="module")
def url(dyed: Dyed) -> Iterator[str]:
    with serving(create_app(*dyed)) as url:
        yield url


@pytest.mark.parametrize("codec", [None, "bits", "raw+zstd"])
def test_one_prompt(ask: Asker, url: str, codec: str | None) -> None:
    (completion,) = ask(url, "generate", "ABC", max_new_tokens=4, codec=codec)
    assert (completion.text, completion.prompt_tokens, completion.finish_reason) == ("DEFG", [65, 66, 67], "length")
    assert completion.weight_version == "0"
    assert len(completion.logprobs) == 4
    assert all(-1e-3 < logprob <= 0 for logprob in completion.logprobs)
    assert_dyed(completion)


def test_several_prompts_and_sequences(ask: Asker, url: str) -> None:
    prompts = ["AB", [10, 20], np.array([7])]
    completions = ask(url, "generate", prompts, n=2, max_new_tokens=3, logprobs=False)
    assert [(c.prompt_number, c.index) for c in completions] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [c.tokens for c in completions] == [[67, 68, 69]] * 2 + [[21, 22, 23]] * 2 + [[8, 9, 10]] * 2
    for completion in completions:
        assert completion.logprobs is None
        assert_dyed(completion)


def test_turns_join_and_stops_stop(ask: Asker, url: str) -> None:
    (first,) = ask(url, "generate", "AB", max_new_tokens=9, stop="EF")
    assert (first.text, first.finish_reason) == ("CDEF", "stop")
    prompt = [*first.prompt_tokens, *first.tokens, 7]
    (second,) = ask(url, "generate", prompt, start=first.trace.stop, stop_token_ids=[10])
    assert second.tokens == [8, 9, 10]
    assert_dyed(second, start=first.trace.stop)
    whole = first.trace.concat(second.trace)
    np.testing.assert_array_equal(whole.experts_TLK, DYE.routes([*prompt, 8, 9]))


def test_without_routes(ask: Asker, url: str) -> None:
    (completion,) = ask(url, "generate", "A", routes=False, max_new_tokens=2)
    assert (completion.text, completion.trace) == ("BC", None)
    with refused(RequestError, "none were asked for", got=3):
        ask(url, "generate", "A", routes=False, start=3)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize(("prompt", "codec"), [("ABC", "bits"), ([65, 66, 67], None)])
def test_a_stream_brings_tokens_and_ends_with_all_rows(
    ask: Asker, url: str, prompt: Any, codec: str | None, every: int, n: int
) -> None:
    events = ask(url, "stream", prompt, n=n, every=every, start=1, max_new_tokens=40, codec=codec)
    for index in range(n):
        own = [event for event in events if event.index == index]
        assert [event.completion is not None for event in own] == [False] * 39 + [True]
        completion = own[-1].completion
        assert [event.token for event in own] == completion.tokens
        assert "".join(event.text for event in own) == completion.text == "".join(map(chr, range(68, 108)))
        assert [event.logprob for event in own] == completion.logprobs
        assert (completion.index, completion.finish_reason, completion.weight_version) == (index, "length", "0")
        assert_dyed(completion, start=1)


def test_a_stream_has_one_prompt(ask: Asker, url: str) -> None:
    with refused(RequestError, "a stream has one prompt", got=2):
        ask(url, "stream", ["a", "b"])
    for routes in (False, "reference"):
        with refused(RequestError, "every says when to send rows", got=routes):
            ask(url, "stream", "a", routes=routes, every=3)
    with refused(RequestError, "does not fit the model's window"):
        ask(url, "stream", "a", max_new_tokens=10_000)


def test_who_stops_listening_ends_the_request(url: str) -> None:
    with Client(url) as client:
        with closing(client.stream("A", max_new_tokens=400, request_id="leaver")) as events:
            assert next(events).token == 66
        deadline = time.monotonic() + 30
        while client.abort("leaver"):
            assert time.monotonic() < deadline


def test_a_cancelled_call_ends_the_request(url: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(url) as client:
            await client.pause()
            try:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate("A", request_id="cancelled"), 0.3)
            finally:
                await client.resume()
            async with asyncio.timeout(30):
                while await client.abort("cancelled"):
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_control(ask: Asker, url: str, tmp_path: Any) -> None:
    model = ask(url, "model")
    assert (model.layout.layers, model.layout.num_experts, model.layout.top_k) == ((1, 2, 3), 32, 4)
    assert (model.weight_version, model.window, model.vocab_size, model.paused) == ("0", 512, 260, False)
    assert ask(url, "health")
    assert ask(url, "ready")
    assert ask(url, "pause") is None
    assert not ask(url, "ready")
    assert ask(url, "model").paused
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, url, "generate", "A", request_id="waits")
        while not ask(url, "abort", "waits", "nobody"):
            time.sleep(0.01)
        (completion,) = waiting.result(30)
    assert (completion.tokens, completion.finish_reason) == ([], "abort")
    assert ask(url, "resume") is None
    assert ask(url, "abort") == []
    with refused(WeightsError, ""):
        ask(url, "update_weights", str(tmp_path / "nothing"), "1")


@pytest.mark.parametrize("codec", ["bits", "raw+zstd"])
def test_routes_by_reference(ask: Asker, url: str, codec: str) -> None:
    completions = ask(url, "generate", ["AB", [7, 8]], n=2, max_new_tokens=30, routes="reference", codec=codec)
    for completion in completions:
        assert completion.trace is None
        reference = json.loads(json.dumps(asdict(completion.reference)))  # as another process gets it
        assert TraceReference(**reference) == completion.reference
        assert reference["codec"] == codec
        assert_dyed(replace(completion, trace=ask(url, "fetch", reference)))
        assert ask(url, "fetch", reference["id"]) == ask(url, "fetch", completion.reference)
    for completion in completions:
        assert ask(url, "delete", completion.reference) is None
    for method in ("fetch", "delete"):
        with refused(UnknownTraceError, ""):
            ask(url, method, completions[0].reference)
    last = ask(url, "stream", "AB", max_new_tokens=5, routes="reference")[-1].completion
    assert_dyed(replace(last, trace=ask(url, "fetch", last.reference)))


@pytest.mark.parametrize("method", ["fetch", "delete"])
@pytest.mark.parametrize("reference", [None, {"id": "x"}, b"x"], ids=repr)
def test_what_is_no_reference_is_refused(ask: Asker, method: str, reference: Any) -> None:
    with refused(RequestError, "no reference to a trace", expected="a TraceReference, its fields, or its id"):
        ask("http://nobody", method, reference)


def test_a_closed_client_is_refused() -> None:
    async def after_close() -> None:
        client = AsyncClient("http://nobody")
        await client.close()
        await client.model()

    client = Client("http://nobody")
    client.close()
    for call in (client.model, lambda: list(client.stream("A")), lambda: asyncio.run(after_close())):
        with refused(RequestError, "the client is closed"):
            call()


def test_capture_stops_and_starts(ask: Asker, url: str) -> None:
    assert ask(url, "routing")["state"] == "on"
    try:
        assert ask(url, "stop_routing")["state"] == "off"
        with refused(CaptureOffError, ""):
            ask(url, "generate", "A")
    finally:
        assert ask(url, "start_routing")["state"] == "on"
    (completion,) = ask(url, "generate", "A", max_new_tokens=2)
    assert_dyed(completion)


def test_an_id_that_another_request_has_is_refused_at_once(ask: Asker, url: str) -> None:
    with Client(url) as client, closing(client.stream("A", max_new_tokens=400, request_id="mine")) as events:
        next(events)
        with refused(DuplicateRequestError, "'mine' is under way"):
            ask(url, "generate", "A", request_id="mine")


def test_keys_limits_and_addresses(ask: Asker, dyed: Dyed) -> None:
    config = ServerConfig(api_key="secret", max_sequences=2)
    with serving(create_app(*dyed, config)) as url:
        with refused(RequestError, "the API key is missing or wrong"):
            ask(url, "model")
        key: dict[str, Any] = {"api_key": "secret"}
        assert ask(f"{url}/", "model", client=key).window == 512
        assert ask(url, "generate", "A", max_new_tokens=1, client=key)[0].text == "B"
        with refused(RequestError, "asks for more sequences than the server takes"):
            ask(url, "generate", "A", n=3, client=key)
    with refused(UnreachableError, "cannot be reached at GET /model", got="Connect"):
        ask(f"http://127.0.0.1:{free_port()}", "model", client={"retries": 0})
    for wrong in ("localhost:8000", "ftp://x", "", "http://"):
        with refused(RequestError, "the URL cannot be used"):
            ask(wrong, "model")
    with refused(RequestError, "the request id cannot be sent"):
        ask(url, "generate", "A", request_id="a b")


def test_a_request_whose_connection_is_lost_ends_before_it_runs_again(ask: Asker, url: str, dyed: Dyed) -> None:
    engine, began = dyed[0], []
    submit = engine.submit

    def counted(*args: Any, **kwargs: Any) -> Any:
        began.append(submit(*args, **kwargs))
        return began[-1]

    with losing(url, lambda: bool(began)) as lossy, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", counted)
        (completion,) = ask(lossy, "generate", "A", max_new_tokens=400)
    assert_dyed(completion)
    assert [len(one.result(30).output_tokens) for one in began[1:]] == [400]
    first = began[0].result(30)
    assert first.finish_reason == "abort"
    assert len(first.output_tokens) < 400


def test_silence_ends_at_the_timeout(ask: Asker, url: str) -> None:
    ask(url, "pause")
    try:
        began = time.monotonic()
        with refused(UnreachableError, "gave no whole answer", got="ReadTimeout"):
            ask(url, "generate", "A", client={"timeout": 0.5})
        assert 0.4 < time.monotonic() - began < 5
    finally:
        ask(url, "resume")


def test_an_async_client_needs_no_network(dyed: Dyed) -> None:
    async def scenario() -> list[Completion]:
        transport = httpx.ASGITransport(create_app(*dyed))
        async with AsyncClient("http://in.process", transport=transport) as client:
            return await client.generate("A", max_new_tokens=2)

    (completion,) = asyncio.run(scenario())
    assert_dyed(completion)


def test_both_clients_have_every_call_with_its_documentation() -> None:
    calls = {name for name, _ in inspect.getmembers(Calls, inspect.isfunction) if not name.startswith("_")}
    for kind in (Client, AsyncClient):
        assert {name for name in vars(kind) if not name.startswith("_")} == calls | {"close"}
        for name in calls:
            assert inspect.getdoc(getattr(kind, name)) == inspect.getdoc(getattr(Calls, name))
            assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(Calls, name))
