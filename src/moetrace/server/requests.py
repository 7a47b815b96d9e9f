"""Requests by the ids their clients know, so that they can be aborted while somebody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moetrace.engines.base import Engine
from moetrace.engines.requests import Generation
from moetrace.errors import DuplicateRequestError, OverloadedError, RequestError, ShuttingDownError
from moetrace.server.config import ServerConfig


@dataclass
class Running:
    """A request under way: what the engine generates for it, and whether that is to end as soon as it is queued."""

    request_id: str
    sequences: int
    generations: list[Generation] = field(default_factory=list)
    is_aborted: bool = False


class RequestTable:
    """The requests under way. Used from the event loop only."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self._running: dict[str, Running] = {}
        self.is_draining = False
        """Whether the server is shutting down."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def sequences(self) -> int:
        """Sequences that the requests under way asked for."""
        return sum(running.sequences for running in self._running.values())

    @contextmanager
    def open(self, request_id: str, sequences: int) -> Iterator[Running]:
        """A place for a request. What it still generates when it leaves early is aborted.

        Raises:
            DuplicateRequestError: the id is taken by a request under way.
            OverloadedError: there is no place now.
            RequestError: there never will be.
            ShuttingDownError: the server is being shut down.
        """
        if self.is_draining:
            raise ShuttingDownError("the server is shutting down", fix="Send the request to another one.")
        if sequences > self._config.max_sequences:
            raise RequestError(
                "the request asks for more sequences than the server takes at once",
                expected=f"prompts * n <= {self._config.max_sequences}",
                got=sequences,
                fix="Split it.",
            )
        for what, limit, now in (
            ("requests", self._config.max_requests, len(self) + 1),
            ("sequences", self._config.max_sequences, self.sequences + sequences),
        ):
            if now > limit:
                raise OverloadedError(
                    f"too many {what} are under way", expected=f"at most {limit}", got=now, fix=_LATER
                )
        if request_id in self._running:
            raise DuplicateRequestError(
                f"request {request_id!r} is under way",
                expected="an X-Request-Id that no running request has",
                got=request_id,
                fix="Wait for it, or abort it first: a retry would generate twice.",
            )
        running = self._running[request_id] = Running(request_id, sequences)
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
                running.is_aborted = True  # its prompts may be in the tokenizer still
                self._abort(running)
        return known, unknown

    def abort_all(self) -> list[str]:
        """End all requests, also those that came by other ways than this server. Returns the ids of this server's."""
        self._engine.abort()
        return self.abort(list(self._running))[0]

    def drain(self, seconds: float) -> None:
        """Take no more requests; after `seconds`, answer those under way as they are."""
        self.is_draining = True
        asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        """Abort what runs, and again what a request that was being read may still have queued."""
        self.abort_all()
        asyncio.get_running_loop().call_later(0.5, self._end)

    def _abort(self, running: Running) -> None:
        for generation in running.generations:
            if not all(future.done() for future in generation.futures):
                self._engine.abort(generation.request_id)


_LATER = "Send it again later, as Retry-After says."
