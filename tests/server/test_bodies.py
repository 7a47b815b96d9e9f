"""Large bodies: the same bytes as the obvious way makes, in pieces, while others run."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import numpy as np
import pytest
from asgi import Call
from fastapi import FastAPI

from moetrace.server.bodies import PIECE, Base64, Body, BodyResponse, Joined, encode_json

SIZES = [0, 1, 2, 3, 4, PIECE, 3 * PIECE - 1, 3 * PIECE, 3 * PIECE + 1, 7 * PIECE + 5]


def pieces_of(body: Body) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [piece async for piece in body.pieces()]

    return asyncio.run(collect())


def data_of(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_pieces_join_to_what_the_standard_library_says(size: int) -> None:
    data = data_of(size)
    body = encode_json({"a": [1.5, "é"], "data": Base64(data), "after": {"more": Base64(data)}})
    text = base64.b64encode(data).decode()
    expected = json.dumps({"a": [1.5, "é"], "data": text, "after": {"more": text}}).encode()
    assert b"".join(pieces_of(body)) == bytes(body) == expected
    assert len(body) == len(expected)
    assert all(0 < len(piece) <= PIECE for piece in pieces_of(body))


@pytest.mark.parametrize("dtype", ["<i4", "<i2", "<u2", "u1"])
def test_an_array_is_its_memory(dtype: str) -> None:
    array = np.arange(3 * 5 * 7).reshape(3, 5, 7).astype(dtype)
    array.setflags(write=False)  # as a trace's is
    assert json.loads(bytes(encode_json(Base64(array)))) == base64.b64encode(array.tobytes()).decode()
    assert bytes(encode_json(Base64(array[:0]))) == b'""'


@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 7), (3 * PIECE - 1, 2, 6 * PIECE, 1)])
def test_parts_are_sent_as_if_they_lay_side_by_side(sizes: tuple[int, ...]) -> None:
    parts = [data_of(size) for size in sizes]
    joined = Joined(*(np.frombuffer(part, np.uint16) if len(part) % 2 == 0 else part for part in parts))
    assert joined.nbytes == sum(sizes)
    assert joined.read(0, joined.nbytes).tobytes() == b"".join(parts)
    assert b"".join(pieces_of(encode_json(Base64(joined)))) == b'"' + base64.b64encode(b"".join(parts)) + b'"'


def test_bodies_add_up() -> None:
    body = Body(b"data:") + encode_json([Base64(b"ab"), Base64(b"c")]) + Body(b"\n\n")
    assert bytes(body) == b'data:["YWI=", "Yw=="]\n\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": float("nan")}, object(), b"bytes"])
def test_what_json_cannot_say_is_an_error(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode_json([value, Base64(b"abc")])


@pytest.mark.parametrize("size", SIZES)
def test_a_response_is_whole_and_says_its_length(size: int) -> None:
    app = FastAPI()

    @app.post("/")
    async def answer() -> BodyResponse:
        return BodyResponse(encode_json({"data": Base64(data_of(size))}))

    async def scenario() -> Call:
        call = Call(app, "/", {})
        await call.done
        return call

    call = asyncio.run(scenario())
    content = b"".join(call.chunks)
    assert base64.b64decode(json.loads(content)["data"]) == data_of(size)
    assert call.headers["content-length"] == str(len(content))
    assert call.headers["content-type"] == "application/json"


def test_others_run_while_a_large_body_leaves_to_a_client_that_takes_it_at_once() -> None:
    data = bytes(60 << 20)

    async def scenario() -> tuple[float, int]:
        worst, turns, leaving = 0.0, 0, True

        async def watch() -> None:
            nonlocal worst, turns
            last = time.thread_time()  # of this thread: what others on the machine do is not counted
            while leaving:
                await asyncio.sleep(0)
                now = time.thread_time()
                worst, turns, last = max(worst, now - last), turns + 1, now

        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        async for _ in encode_json({"data": Base64(data)}).pieces():
            pass
        leaving = False
        await watching
        return worst, turns

    worst, turns = asyncio.run(scenario())
    assert turns >= len(base64.b64encode(data)) // PIECE
    assert worst < 0.02  # base64 at once takes 0.05 s and more
