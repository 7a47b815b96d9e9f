"""Listen, and end well: requests under way are finished or answered as they are, never dropped."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from moetrace.server.config import ServerConfig

logger = logging.getLogger(__name__)


KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx 5, aiohttp 15), since a request
that is sent while the server closes is lost, and its client cannot know whether it may send it again."""
_SECONDS_TO_READ = 30
"""What clients have to take their answers, after the last has been made, from a server that ends."""


class _Server(uvicorn.Server):
    """Tells the application of a signal: uvicorn itself only waits."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        options: dict[str, Any] = {
            "log_level": "info",
            "access_log": False,
            "timeout_keep_alive": KEEP_ALIVE,
            "timeout_graceful_shutdown": math.ceil(config.shutdown_seconds) + _SECONDS_TO_READ,
        }
        super().__init__(uvicorn.Config(app, host=config.host, port=config.port, **options))
        self._requests, self._seconds = app.state.requests, config.shutdown_seconds

    async def startup(self, *args: object, **kwargs: object) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(*args, **kwargs)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._requests.drain, self._seconds)
        super().handle_exit(sig, frame)


def serve(app: FastAPI, config: ServerConfig) -> None:
    """Serve until a signal; returns when the last response has left."""
    if config.is_exposed:
        logger.warning(
            "%s is open to other machines and needs no key: whoever reaches it can generate and replace weights. "
            "Set MOETRACE_API_KEY, or bind 127.0.0.1.",
            config.host,
        )
    gc.collect()
    gc.freeze()  # a full collection that looks at all that torch loaded stops every stream for some tenths of a second
    try:
        with _returning_from_signals():
            _Server(app, config).run()
    finally:
        app.state.archive.close()


@contextmanager
def _returning_from_signals() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for whoever had a handler before: by default Python would die
    of it, with stores open and engines running."""
    if threading.current_thread() is not threading.main_thread():  # where uvicorn listens to none
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
