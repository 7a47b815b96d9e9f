"""Requests by the ids their clients know, so that they can be aborted while somebody waits for them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moetrace.engines.base import Engine, Generation
from moetrace.errors import DuplicateRequestError

HEADER = "X-Request-Id"


class RequestIds:
    """ASGI middleware: every request has an id, its client's or a new one, and every response repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = Headers(scope=scope).get(HEADER, "")
        request_id = asked if re.fullmatch(r"[\x21-\x7e]{1,128}", asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        return await self._app(scope, receive, send_with_id)


@dataclass
class Running:
    """A request under way: what the engine generates for it."""

    request_id: str
    generations: list[Generation] = field(default_factory=list)


class RequestTable:
    """The requests under way. Used from the event loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def open(self, request_id: str) -> Iterator[Running]:
        """A place for a request. What it still generates when it leaves early is aborted.

        Raises:
            DuplicateRequestError: the id is taken by a request under way.
        """
        if request_id in self._running:
            raise DuplicateRequestError(
                f"request {request_id!r} is under way",
                expected=f"an id in {HEADER} that no running request has",
                got=request_id,
                fix="Wait for it, or abort it first: a retry would generate twice.",
            )
        running = self._running[request_id] = Running(request_id)
        try:
            yield running
        finally:
            del self._running[request_id]
            self._abort(running)

    def abort(self, request_ids: Iterable[str]) -> tuple[list[str], list[str]]:
        """End requests; their clients get what there is. Returns the ids that were under way, and the others."""
        known: list[str] = []
        unknown: list[str] = []
        for request_id in dict.fromkeys(request_ids):
            running = self._running.get(request_id)
            (unknown if running is None else known).append(request_id)
            if running is not None:
                self._abort(running)
        return known, unknown

    def abort_all(self) -> list[str]:
        """End all requests, also those that came by other ways than this server. Returns the ids of this server's."""
        self._engine.abort()
        return list(self._running)

    def _abort(self, running: Running) -> None:
        for generation in running.generations:
            if not all(future.done() for future in generation.futures):
                self._engine.abort(generation.request_id)
