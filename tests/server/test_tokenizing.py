"""Few threads ever ask the tokenizer, whatever the path and however many ask at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from dye import Dye
from fastapi import FastAPI
from transformers import AutoTokenizer

from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app

DYE = Dye(vocab=260)  # the tiny model's tokenizer: token id = byte

BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "A", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "A", "parameters": {"max_new_tokens": 1}},
    "/sglang/generate": {"text": "A", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"model": "model", "prompt": "A", "max_tokens": 1},
    "/v1/chat/completions": {"model": "model", "messages": [{"role": "user", "content": "A"}], "max_tokens": 1},
}


class Watched:
    """A tokenizer that does something before it encodes."""

    def __init__(self, before: Callable[[], object]) -> None:
        self._own: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
        self._own.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self._before()
        return self._own.encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(seed=0))
    yield engine
    engine.close()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("path", BODIES)
def test_sixteen_requests_at_once_are_tokenised_on_two_threads(path: str, engine: TransformersEngine) -> None:
    threads: list[int] = []

    def note() -> None:
        threads.append(threading.get_ident())
        time.sleep(0.02)  # so that a pool that may start more threads does

    async def scenario() -> None:
        async with client_of(create_app(engine, Watched(note))) as http:
            answers = await asyncio.gather(*(http.post(path, json=BODIES[path]) for _ in range(16)))
        assert {answer.status_code for answer in answers} == {200}

    asyncio.run(scenario())
    assert len(threads) == 16
    assert len(set(threads)) == 2
    assert threading.get_ident() not in threads


def test_prompts_of_ids_do_not_wait_for_texts(engine: TransformersEngine) -> None:
    reading, goes_on = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        reading.release()
        assert goes_on.wait(30)

    async def scenario() -> None:
        async with client_of(create_app(engine, Watched(wait))) as http:
            texts = [asyncio.create_task(http.post("/generate", json=BODIES["/generate"])) for _ in range(3)]
            for _ in range(2):  # both threads
                await asyncio.to_thread(reading.acquire)
            try:
                body = {"inputs": [65], "parameters": {"max_new_tokens": 1}}
                answer = await asyncio.wait_for(http.post("/generate", json=body), 20)
                assert not any(text.done() for text in texts)
            finally:
                goes_on.set()
            assert [(await text).json() for text in texts] == 3 * [answer.json()]

    asyncio.run(scenario())
