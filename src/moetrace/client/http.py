"""`Client` and `AsyncClient`: the same calls (`calls.py`), carried out by httpx, blocking or in an event loop."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from moetrace.client.calls import Calls
from moetrace.client.steps import Emit, Patience, Read, Reply, Request, Send, Sleep, Steps, Work
from moetrace.errors import MissingExtraError, RequestError
from moetrace.layout import MoeLayout

try:
    import httpx
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error, "client") from error

P = ParamSpec("P")
T = TypeVar("T")
CONNECT_SECONDS = 10.0
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"([\x21-\x7e]([\t\x20-\x7e]*[\x21-\x7e])?)?")


def _sync(make: Callable[Concatenate[Calls, P], Steps[T]]) -> Callable[Concatenate[Client, P], T]:
    @wraps(make)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (value,) = self._carry_out(make(self._calls, *args, **kwargs))
        return value

    return call


def _iterator(
    make: Callable[Concatenate[Calls, P], Steps[T]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    @wraps(make)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return self._carry_out(make(self._calls, *args, **kwargs))

    return call


def _async(make: Callable[Concatenate[Calls, P], Steps[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @wraps(make)
    async def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (value,) = [value async for value in self._carry_out(make(self._calls, *args, **kwargs))]
        return value

    return call


def _async_iterator(
    make: Callable[Concatenate[Calls, P], Steps[T]],
) -> Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]]:
    @wraps(make)
    def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        return self._carry_out(make(self._calls, *args, **kwargs))

    return call


class Client:
    """A client of a moetrace server, or, for plain payloads, of LightLLM's `/generate`. Safe to use from any thread.

    Args:
        url: of the server, such as "http://localhost:8000".
        api_key: sent as `Authorization: Bearer KEY`.
        timeout: seconds for a call with all that is tried again; None for no bound.
        retries: connections that may fail one after the other.
        headers: sent with every request.
        layout: of the model, needed for routes of servers that do not say it (LightLLM's own).
        transport: an httpx transport to use instead of the network.

    Raises:
        RequestError: the URL is none, or the key or a header cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = 600.0,
        retries: int = 10,
        headers: Mapping[str, str] | None = None,
        layout: MoeLayout | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._calls = Calls(Patience(timeout, retries), layout)
        self._http = httpx.Client(
            base_url=checked_url(url), headers=_headers(api_key, headers), limits=_LIMITS, transport=transport
        )

    generate = _sync(Calls.generate)
    stream = _iterator(Calls.stream)
    fetch = _sync(Calls.fetch)
    delete = _sync(Calls.delete)
    routing = _sync(Calls.routing)
    start_routing = _sync(Calls.start_routing)
    stop_routing = _sync(Calls.stop_routing)
    pause = _sync(Calls.pause)
    resume = _sync(Calls.resume)
    abort = _sync(Calls.abort)
    update_weights = _sync(Calls.update_weights)
    model = _sync(Calls.model)
    health = _sync(Calls.health)
    ready = _sync(Calls.ready)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _carry_out(self, steps: Steps[T]) -> Generator[T, None, None]:
        came: Any = None
        with ExitStack() as opened:
            while True:
                try:
                    step = steps.send(came)
                except StopIteration:
                    return
                came = None
                if isinstance(step, Emit):
                    yield step.value
                elif isinstance(step, Sleep):
                    time.sleep(step.seconds)
                elif isinstance(step, Work):
                    came = step.do()
                elif isinstance(step, Send):
                    opened.close()
                    came, pieces = self._send(step, opened)
                else:
                    came = self._read(step, pieces)

    def _send(self, step: Send, opened: ExitStack) -> tuple[Reply, Iterator[bytes]]:
        try:
            response = opened.enter_context(self._http.stream(**_arguments(self._http, step)))
            pieces = response.iter_bytes()
            if _is_left_open(step.request, response):
                return _reply(response), pieces
            body = bytearray()
            for piece in pieces:
                body += piece
                _require_time(step.deadline)
            return _reply(response, body), pieces
        except httpx.RequestError as error:
            return _failure(error), iter(())

    def _read(self, step: Read, pieces: Iterator[bytes]) -> Reply:
        try:
            _require_time(step.deadline)
            return Reply(body=next(pieces, b""))
        except httpx.RequestError as error:
            return _failure(error)


class AsyncClient:
    """`Client` for an event loop of asyncio: the same calls, awaited; `stream` is an asynchronous iterator.

    Args:
        url, api_key, timeout, retries, headers, layout: as of `Client`.
        transport: an asynchronous httpx transport to use instead of the network.

    Raises:
        RequestError: the URL is none, or the key or a header cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = 600.0,
        retries: int = 10,
        headers: Mapping[str, str] | None = None,
        layout: MoeLayout | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._calls = Calls(Patience(timeout, retries), layout)
        self._http = httpx.AsyncClient(
            base_url=checked_url(url), headers=_headers(api_key, headers), limits=_LIMITS, transport=transport
        )

    generate = _async(Calls.generate)
    stream = _async_iterator(Calls.stream)
    fetch = _async(Calls.fetch)
    delete = _async(Calls.delete)
    routing = _async(Calls.routing)
    start_routing = _async(Calls.start_routing)
    stop_routing = _async(Calls.stop_routing)
    pause = _async(Calls.pause)
    resume = _async(Calls.resume)
    abort = _async(Calls.abort)
    update_weights = _async(Calls.update_weights)
    model = _async(Calls.model)
    health = _async(Calls.health)
    ready = _async(Calls.ready)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _carry_out(self, steps: Steps[T]) -> AsyncGenerator[T, None]:
        came: Any = None
        async with AsyncExitStack() as opened:
            while True:
                try:
                    step = steps.send(came)
                except StopIteration:
                    return
                came = None
                if isinstance(step, Emit):
                    yield step.value
                elif isinstance(step, Sleep):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, Work):
                    came = await asyncio.to_thread(step.do)
                elif isinstance(step, Send):
                    await opened.aclose()
                    came, pieces = await self._send(step, opened)
                else:
                    came = await self._read(step, pieces)

    async def _send(self, step: Send, opened: AsyncExitStack) -> tuple[Reply, AsyncIterator[bytes]]:
        try:
            response = await opened.enter_async_context(self._http.stream(**_arguments(self._http, step)))
            pieces = response.aiter_bytes()
            if _is_left_open(step.request, response):
                return _reply(response), pieces
            body = bytearray()
            async for piece in pieces:
                body += piece
                _require_time(step.deadline)
            return _reply(response, body), pieces
        except httpx.RequestError as error:
            return _failure(error), _none()

    async def _read(self, step: Read, pieces: AsyncIterator[bytes]) -> Reply:
        try:
            _require_time(step.deadline)
            return Reply(body=await anext(pieces, b""))
        except httpx.RequestError as error:
            return _failure(error)


async def _none() -> AsyncIterator[bytes]:
    return
    yield b""


def checked_url(url: str) -> httpx.URL:
    """A server's URL; raises `RequestError` for what is none."""
    try:
        checked = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise RequestError(f"the URL cannot be used ({error})", got=repr(url)) from error
    if checked.scheme not in ("http", "https") or not checked.host:
        raise RequestError("the URL cannot be used", expected="http://HOST:PORT or https://HOST", got=repr(url))
    return checked


def _headers(api_key: str | None, headers: Mapping[str, str] | None) -> dict[str, str]:
    both = {**(headers or {}), **({} if api_key is None else {"Authorization": f"Bearer {api_key}"})}
    for name, value in both.items():
        if not (_HEADER_NAME.fullmatch(name) and isinstance(value, str) and _HEADER_VALUE.fullmatch(value)):
            raise RequestError(  # without the value, which may be a secret
                f"the header {name!r} cannot be sent",
                expected="printable ASCII, without spaces at its ends",
                fix="A key that was read from a file may end with a newline.",
            )
    return both


def _arguments(http: httpx.Client | httpx.AsyncClient, step: Send) -> dict[str, Any]:
    """What httpx needs to send a request.

    Raises:
        RequestError: it cannot be sent.
    """
    if http.is_closed:
        raise RequestError("the client is closed", fix="Make a new one, or close it later.")
    request = step.request
    left = max(step.deadline - time.monotonic(), 0.001)
    timeout = httpx.Timeout(None if math.isinf(left) else left, connect=min(left, CONNECT_SECONDS))
    arguments = {"method": request.method, "headers": request.headers, "timeout": timeout}
    try:
        arguments["url"] = httpx.URL(request.path)
        if request.body is not None:
            text = json.dumps(request.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            arguments["content"] = text.encode()
            arguments["headers"] = {**request.headers, "Content-Type": "application/json"}
    except (httpx.InvalidURL, TypeError, ValueError) as error:  # half a surrogate pair is text, but not UTF-8
        raise RequestError(f"the request to {request.path!r} cannot be sent", got=str(error)) from error
    return arguments


def _is_left_open(request: Request, response: httpx.Response) -> bool:
    return request.streamed and response.status_code < 400


def _reply(response: httpx.Response, body: bytes | bytearray = b"") -> Reply:
    return Reply(response.status_code, {name.lower(): text for name, text in response.headers.items()}, bytes(body))


def _failure(error: httpx.RequestError) -> Reply:
    return Reply(failure=f"{type(error).__name__}: {error}".removesuffix(": "), unsent=isinstance(error, _UNSENT))


def _require_time(deadline: float) -> None:
    """httpx bounds each read; this bounds them together."""
    if time.monotonic() >= deadline:
        raise httpx.ReadTimeout("the response took too long")
