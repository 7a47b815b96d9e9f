"""How a request is sent until it is answered: what may be sent again, and when. Does no input and output itself.

A call is a generator. It yields steps and is sent what came of each; `Client` and `AsyncClient` carry out the same
steps, one blocking, one in an event loop. What the caller gets leaves the generator as `Emit`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, Literal, TypeVar

from moetrace.client.refusals import error_of
from moetrace.errors import MoetraceError, RequestError, UnreachableError

T = TypeVar("T")
REQUEST_ID = "X-Request-Id"

Repeat = Literal["always", "by id", "unsent"]
"""When a request may be sent again after its connection was lost: always, because it changes nothing; to a server that
refuses an id which is under way; or never, unless it surely did not leave."""


@dataclass(frozen=True)
class Request:
    """One HTTP request. `body` is sent as JSON."""

    method: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeat: Repeat = "unsent"
    streamed: bool = False


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        status, headers: of the response, header names in lower case; 0 and none where there was no response.
        body: what came of it; nothing yet if it is streamed, unless the status is an error's.
        failure: why there is no whole response, or None.
        unsent: whether surely nothing of the request left.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    failure: str | None = None
    unsent: bool = False


@dataclass(frozen=True)
class Send:
    """Send a request, until a moment of `time.monotonic`; its result is a `Reply`."""

    request: Request
    deadline: float


@dataclass(frozen=True)
class Read:
    """More of the response that is streamed; its result is a `Reply` with a body, empty at the end, or a failure."""

    deadline: float


@dataclass(frozen=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call something that takes the processor a while; its result is what that returned."""

    do: Callable[[], Any]


@dataclass(frozen=True)
class Emit(Generic[T]):
    """Give the caller a value."""

    value: T


Do = Send | Read | Sleep | Work
Part = Generator[Do, Any, T]
"""Steps that come to a value inside a call."""
Steps = Generator[Do | Emit[T], Any, None]
"""A whole call."""


@dataclass(frozen=True)
class Patience:
    """How long, and how often, a request is tried.

    Attributes:
        timeout: seconds for a call with all that is tried again; None for no bound.
        retries: connections that may fail one after the other. A server that answers "later" is asked until `timeout`.
        first, most: seconds to wait after the first failure, doubled for each further one up to `most`; a random part
            of up to half is taken off, so that clients do not come back together.
    """

    timeout: float | None = 600.0
    retries: int = 10
    first: float = 0.25
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout >= 0:  # nor is NaN
            raise RequestError("timeout is out of range", expected="seconds, or None", got=self.timeout)

    def deadline(self) -> float:
        """When a call that begins now must have ended."""
        return math.inf if self.timeout is None else time.monotonic() + self.timeout

    def wait(self, times: int) -> float:
        """Seconds to wait after `times` failures."""
        whole = min(self.first * 2.0 ** min(times - 1, 60), self.most)
        return whole * (1 - random.random() / 2)


def exchange(
    request: Request,
    patience: Patience,
    deadline: float,
    accept: Callable[[Reply], bool] = lambda reply: reply.status < 400,
) -> Part[Reply]:
    """Send a request until it is answered with what `accept` takes.

    A failed connection is tried again if nothing of the request left, or as `request.repeat` allows; so is what the
    server refused for now (429, or 503 with Retry-After). Where a request was lost and is under way still (409), the
    server has not noticed yet that its client went away: it is waited for. A gateway's 500, 502 or 504 is a connection
    that was lost behind it.

    Raises:
        UnreachableError: there is no whole answer, and the request must not, or not any more, be sent again.
        MoetraceError: the answer is an error, see `error_of`; also one that said "later" until the deadline.
    """
    failures = refusals = 0
    lost = False
    while True:
        reply: Reply = yield Send(request, deadline)
        if reply.failure is None and accept(reply):
            return reply
        error = (
            unreachable(request, reply)
            if reply.failure is not None
            else error_of(reply.status, reply.headers, reply.body, request.path)
        )
        if reply.failure is not None or _is_a_gateways(reply):
            failures, refusals = failures + 1, 0
            lost |= not reply.unsent
            again = failures <= patience.retries and (reply.unsent or request.repeat != "unsent")
            pause = patience.wait(failures)
        else:
            failures, refusals = 0, refusals + 1
            again = _is_for_now(reply, lost)
            pause = patience.wait(refusals) + _retry_after(reply)
        if not again or time.monotonic() + pause >= deadline:
            raise error
        yield Sleep(pause)
        if lost and request.repeat == "by id":
            yield from _require_ids(request, patience, deadline, error)


def more(request: Request, deadline: float) -> Part[bytes]:
    """The next piece of the response to a streamed request that was answered; nothing at its end.

    Raises:
        UnreachableError: it broke off. What came of it cannot be asked for again.
    """
    reply: Reply = yield Read(deadline)
    if reply.failure is not None:
        raise unreachable(request, reply)
    return reply.body


def _is_for_now(reply: Reply, lost: bool) -> bool:
    return (
        reply.status == 429
        or (reply.status == 503 and "retry-after" in reply.headers)
        or (reply.status == 409 and lost)
    )


def _is_a_gateways(reply: Reply) -> bool:
    """Whether an error is not the server's own: that repeats the request's id whatever it answers."""
    return reply.status in (500, 502, 504) and REQUEST_ID.lower() not in reply.headers


def _retry_after(reply: Reply) -> float:
    """Seconds that a server asks to wait: a number, or a date."""
    text = reply.headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _require_ids(request: Request, patience: Patience, deadline: float, error: MoetraceError) -> Part[None]:
    """Make sure that the server knows request ids: it repeats them. Another one might run a request twice at once."""
    headers = {REQUEST_ID: f"{request.headers[REQUEST_ID]}-known"}
    probe = Request("GET", "/health", headers=headers, repeat="always")
    reply = yield from exchange(probe, patience, deadline, accept=lambda _: True)
    if reply.headers.get(REQUEST_ID.lower()) != headers[REQUEST_ID]:
        if not isinstance(error, UnreachableError):
            raise error
        raise UnreachableError(
            f"{error.what}, and the server does not know {REQUEST_ID}: it may be generating still",
            expected="a server that repeats the id of a request and refuses one that is under way",
            got=error.got,
            fix="Send the request again only if it may be generated twice.",
        ) from error


def unreachable(request: Request, reply: Reply) -> UnreachableError:
    """The error of a reply that is not whole."""
    what = "cannot be reached" if reply.unsent else "gave no whole answer"
    return UnreachableError(
        f"the server {what} at {request.method} {request.path}",
        got=reply.failure,
        fix="Is it running, at this URL?" if reply.unsent else "Its log says what became of the request.",
    )
