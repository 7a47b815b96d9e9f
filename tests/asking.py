"""Both clients as one, for tests that hold for either; and the checkpoint that their server has."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from dye import Dye

from moetrace import AsyncClient, Client

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
