"""Listen, and end well: requests under way are finished or answered as they are, never dropped."""

from __future__ import annotations

import asyncio
import gc
import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

from moetrace.server.config import ServerConfig

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Tells the application of a signal: uvicorn itself only waits."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(uvicorn.Config(app, host=config.host, port=config.port, log_level="info", access_log=False))
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
        _Server(app, config).run()
    finally:
        app.state.archive.close()
