"""Large bodies that hold nobody up: base64 is made while it leaves, in pieces, and others run in between.

The routes of 32k tokens are 17 to 67 MB of base64. To make it at once, to look through it for characters that JSON
escapes, or to write it at once keeps Python's lock or the event loop for a tenth of a second: every stream notices.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

import numpy as np
import pybase64
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

PIECE = 1 << 18
"""Bytes of one write, a fraction of a millisecond."""
_BLOCK = 3 << 18
"""Bytes that are made base64 at a time, in a worker thread. Divisible by 3: only the last block is padded."""


class Readable(Protocol):
    """Bytes that exist when they are read."""

    nbytes: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start <= b < stop`, a uint8 array. Called in worker threads."""
        ...


class Joined:
    """Memory as if it lay side by side.

    Args:
        parts: bytes, or arrays in C order.
    """

    def __init__(self, *parts: bytes | np.ndarray) -> None:
        self._parts = [
            np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part.reshape(-1).view(np.uint8)
            for part in parts
        ]
        self.nbytes = sum(part.nbytes for part in self._parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start <= b < stop`, copied only where parts meet."""
        some, first = [np.empty(0, np.uint8)], 0
        for part in self._parts:
            some.append(part[max(start - first, 0) : max(stop - first, 0)])
            first += part.nbytes
        some = [part for part in some if len(part)] or some[:1]
        return some[0] if len(some) == 1 else np.concatenate(some)


class Base64:
    """The base64 of some memory, in JSON a text. It is made when it is sent.

    Args:
        data: bytes, an array in C order, or what makes its bytes when they are read; not to be changed from now on.
    """

    def __init__(self, data: bytes | np.ndarray | Readable) -> None:
        self._data: Readable = Joined(data) if isinstance(data, bytes | np.ndarray) else data

    def __len__(self) -> int:
        return -(-self._data.nbytes // 3) * 4

    def blocks(self) -> range:
        """Where blocks begin."""
        return range(0, self._data.nbytes, _BLOCK)

    def block(self, start: int) -> bytes:
        """The base64 of one block."""
        return pybase64.b64encode(self._data.read(start, min(start + _BLOCK, self._data.nbytes)).data)


class Body:
    """The bytes of a response, of which the base64 is not made yet."""

    def __init__(self, *parts: bytes | Base64) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __add__(self, other: Body) -> Body:
        return Body(*self._parts, *other._parts)

    def __bytes__(self) -> bytes:
        blocks = ([p] if isinstance(p, bytes) else map(p.block, p.blocks()) for p in self._parts)
        return b"".join(block for of_part in blocks for block in of_part)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes, at most `PIECE` at a time. Everybody else has a turn after each, however fast the client reads."""
        for part in self._parts:
            if isinstance(part, bytes):
                for start in range(0, len(part), PIECE):
                    yield part[start : start + PIECE]
                    if len(part) > PIECE:
                        await asyncio.sleep(0)
            else:
                for at in part.blocks():
                    block = await asyncio.to_thread(part.block, at)
                    for start in range(0, len(block), PIECE):
                        yield block[start : start + PIECE]
                        await asyncio.sleep(0)


def encode_json(value: Any) -> Body:
    """JSON of a value in which `Base64` may stand for texts.

    Raises:
        ValueError: a number is not finite.
    """
    texts: list[Base64] = []
    mark = uuid.uuid4().hex  # no text that a client sent or a model said holds it

    def set_aside(item: Any) -> str:
        if not isinstance(item, Base64):
            raise TypeError(f"{type(item).__name__} has no form in JSON")
        texts.append(item)
        return mark

    first, *others = json.dumps(value, allow_nan=False, default=set_aside).encode().split(mark.encode())
    body = Body(first)
    for text, other in zip(texts, others, strict=True):
        body += Body(text, other)
    return body


class BodyResponse(Response):
    """A response whose body leaves in pieces."""

    def __init__(self, body: Body, media_type: str = "application/json") -> None:
        super().__init__(None, 200, {"Content-Length": str(len(body))}, media_type)
        self._content = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        rest = len(self._content)
        async for piece in self._content.pieces():
            rest -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": rest > 0})
