"""Both clients as one, for tests that hold for either; and the checkpoint that their server has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
from dye import Dye
from transformers import AutoTokenizer

from moetrace import AsyncClient, Client
from moetrace.client import Completion
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine

DYE = Dye(vocab=260)  # the tiny model's tokenizer: token id = byte


class Asker:
    """Calls a method of `Client`, or of `AsyncClient`: `asker(url, "generate", ...)`; a stream comes as a list."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, url: str, method: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if self.kind == "sync":
            with Client(url, **(client or {})) as ours:
                came = getattr(ours, method)(*args, **kwargs)
                return list(came) if method == "stream" else came
        return asyncio.run(self._ask(url, method, args, client or {}, kwargs))

    async def _ask(self, url: str, method: str, args: Any, client: dict[str, Any], kwargs: Any) -> Any:
        async with AsyncClient(url, **client) as ours:
            call = getattr(ours, method)(*args, **kwargs)
            if method != "stream":
                return await call
            async with aclosing(call):
                return [event async for event in call]


@contextmanager
def dyed_engine() -> Iterator[tuple[TransformersEngine, Any]]:
    """An engine with the checkpoint, and its tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, seed=0), tokenizer)
    yield engine, tokenizer
    engine.close()


def assert_dyed(completion: Completion, start: int = 0) -> None:
    """Tokens and rows are those of the closed form."""
    assert completion.tokens == DYE.continuation(completion.prompt_tokens[-1], len(completion.tokens))
    assert completion.trace is not None
    tokens = completion.prompt_tokens + completion.tokens
    np.testing.assert_array_equal(completion.trace.experts_TLK, DYE.routes(tokens[:-1])[start:])
    assert completion.trace.valid_T.all()
    np.testing.assert_array_equal(completion.trace.tokens, tokens)
