"""A source of bytes as an HTTP answer: whole or one range, whole again where nothing changed (RFC 9110, 13 and 14)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack

from fastapi.responses import StreamingResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from moetrace.container import Source

_PIECE = 1 << 20
_RANGE = re.compile(r"bytes=[ \t]*(?P<first>[0-9]{0,99})-(?P<last>[0-9]{0,99})[ \t]*", re.IGNORECASE)


def range_of(headers: Headers, etag: str, size: int) -> tuple[int, int] | None:
    """The part `start <= byte < stop` that a request asks for; None for all of it.

    Several ranges, those of another unit and those of an `If-Range` that does not hold are ignored, as they may be. A
    range without any byte that is there is empty: it cannot be satisfied.
    """
    found = _RANGE.fullmatch(headers.get("range", ""))
    if found is None or not (found["first"] or found["last"]) or headers.get("if-range", etag) != etag:
        return None
    if not found["first"]:
        return max(size - int(found["last"]), 0), size
    first, last = int(found["first"]), int(found["last"] or size)
    if found["last"] and last < first:
        return None
    return min(first, size), max(min(last + 1, size), min(first, size))


def is_known(headers: Headers, etag: str) -> bool:
    """Whether the client has this already, as its `If-None-Match` says."""
    known = headers.get("if-none-match")
    if known is None:
        return False
    return known.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]


class SourceResponse(StreamingResponse):
    """An answer with a part of a source, read piece by piece in worker threads.

    Args:
        source: what to read from.
        part: from where to where; None for all of it.
        headers: beside those of length and range.
        opened: closed at the end, whatever happened.
    """

    def __init__(
        self, source: Source, part: tuple[int, int] | None, headers: dict[str, str], opened: ExitStack
    ) -> None:
        start, stop = part or (0, source.size)
        headers = {**headers, "content-length": str(stop - start)}
        if part is not None:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{source.size}"
        super().__init__(_pieces(source, start, stop), 200 if part is None else 206, headers)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:  # also where the client goes away: the server then takes the rest, and drops it
            await self.stream_response(send)


async def _pieces(source: Source, start: int, stop: int) -> AsyncIterator[bytes]:
    for first in range(start, stop, _PIECE):
        yield bytes(await asyncio.to_thread(source.read, first, min(first + _PIECE, stop)))
