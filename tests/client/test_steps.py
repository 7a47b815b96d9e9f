"""What is sent again, and when: the steps of an exchange, answered by hand and without a clock that runs."""

from __future__ import annotations

import json
import math
import time
from email.utils import formatdate
from typing import Any

import pytest
from traces import refused

from moetrace.client.steps import REQUEST_ID, Patience, Reply, Request, Send, Sleep, exchange
from moetrace.errors import (
    DuplicateRequestError,
    EngineError,
    MoetraceError,
    OverloadedError,
    RequestError,
    ServerError,
    UnreachableError,
)

OK = Reply(200, body=b"{}")
UNSENT = Reply(failure="ConnectError: refused", unsent=True)
LOST = Reply(failure="ReadError: reset")
KNOWN = Reply(200, {"x-request-id": "me-known"})
PATIENCE = Patience(timeout=None, retries=3, first=1.0, most=4.0)


def request(repeat: Any = "by id") -> Request:
    return Request("POST", "/generate", {}, {REQUEST_ID: "me"}, repeat)


def refusal(status: int, kind: str, **headers: str) -> Reply:
    body = json.dumps({"error": {"type": kind, "message": "no: expected a, got b. Do c.", "expected": "a", "got": "b"}})
    return Reply(status, headers, body.replace('"got": "b"', '"got": "b", "fix": "Do c."').encode())


BUSY = refusal(429, "OverloadedError", **{"retry-after": "7"})
TAKEN = refusal(409, "DuplicateRequestError")


def play(replies: list[Reply], asked: Request | None = None, patience: Patience = PATIENCE) -> tuple[Any, list[Any]]:
    """What an exchange came to when it is answered so, and its steps: paths that were sent, and seconds slept."""
    steps, answers = exchange(asked or request(), patience, math.inf), iter(replies)
    log: list[Any] = []
    came: Reply | None = None
    try:
        while True:
            step = steps.send(came)
            if isinstance(step, Sleep):
                log.append(step.seconds)
                came = None
            else:
                assert isinstance(step, Send)
                log.append(step.request.path)
                came = next(answers)
    except StopIteration as end:
        return end.value, log
    except MoetraceError as error:
        return error, log
    finally:
        assert next(answers, None) is None


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)


def test_an_answer_is_asked_for_once() -> None:
    assert play([OK]) == (OK, ["/generate"])


@pytest.mark.parametrize("repeat", ["always", "by id", "unsent"])
def test_what_never_left_is_sent_again_each_time_later(repeat: Any) -> None:
    came, log = play([UNSENT, UNSENT, UNSENT, OK], request(repeat))
    assert (came, log) == (OK, ["/generate", 1.0, "/generate", 2.0, "/generate", 4.0, "/generate"])


def test_failures_are_bounded_and_counted_in_a_row() -> None:
    came, log = play([UNSENT] * 4)
    assert isinstance(came, UnreachableError)
    assert log.count("/generate") == 4
    assert play([UNSENT, UNSENT, UNSENT, BUSY, UNSENT, UNSENT, OK])[0] is OK


def test_a_lost_request_is_sent_again_only_to_a_server_that_knows_ids() -> None:
    assert play([LOST, KNOWN, OK]) == (OK, ["/generate", 1.0, "/health", "/generate"])
    came, log = play([LOST, Reply(200)])
    assert isinstance(came, UnreachableError)
    assert "may be generating still" in str(came)
    assert log == ["/generate", 1.0, "/health"]
    stopped = Reply(503, {"x-request-id": "me-known"}, b"{}")  # it is there, and says so
    assert play([LOST, stopped, OK])[0] is OK
    assert play([LOST, UNSENT, KNOWN, OK])[1] == ["/generate", 1.0, "/health", 1.0, "/health", "/generate"]


def test_a_lost_request_that_changes_something_is_not_sent_again() -> None:
    came, log = play([LOST], request("unsent"))
    assert isinstance(came, UnreachableError)
    assert log == ["/generate"]
    assert play([UNSENT, LOST], request("unsent"))[1] == ["/generate", 1.0, "/generate"]


def test_a_lost_request_that_changes_nothing_is() -> None:
    assert play([LOST, LOST, OK], request("always"))[1] == ["/generate", 1.0, "/generate", 2.0, "/generate"]


def test_an_id_that_is_taken_is_an_error_unless_it_is_ones_own_lost_request() -> None:
    came, log = play([TAKEN])
    assert isinstance(came, DuplicateRequestError)
    assert log == ["/generate"]
    assert isinstance(play([UNSENT, TAKEN])[0], DuplicateRequestError)  # it never left: that is another's
    came, log = play([LOST, KNOWN, TAKEN, KNOWN, TAKEN, KNOWN, OK])
    assert came is OK
    assert [step for step in log if step != "/health"] == [
        "/generate",
        1.0,
        "/generate",
        1.0,
        "/generate",
        2.0,
        "/generate",
    ]


def test_a_server_that_says_later_is_asked_later() -> None:
    assert play([BUSY, OK]) == (OK, ["/generate", 8.0, "/generate"])
    assert play([refusal(429, "OverloadedError"), OK])[1] == ["/generate", 1.0, "/generate"]
    assert play([refusal(503, "ShuttingDownError", **{"retry-after": "1"}), OK])[1] == ["/generate", 2.0, "/generate"]
    date = Reply(503, {"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert 28 < play([date, OK])[1][1] < 32
    assert play([Reply(503, {"retry-after": "soon"}), OK])[1] == ["/generate", 1.0, "/generate"]
    assert play([BUSY] * 50 + [OK])[0] is OK  # retries count failures, not answers


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (refusal(400, "RequestError"), RequestError),
        (refusal(503, "EngineError"), EngineError),
        (Reply(500, {"x-request-id": "me"}, b"a bug"), ServerError),
        (Reply(503, {}, b"nobody there"), ServerError),
        (Reply(404, {}, b""), ServerError),
    ],
)
def test_other_errors_are_not_asked_again(reply: Reply, kind: type[MoetraceError]) -> None:
    came, log = play([reply])
    assert type(came) is kind
    assert log == ["/generate"]


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_error_of_a_gateway_is_a_lost_connection(status: int) -> None:
    broken = Reply(status, {}, b"<html>Bad gateway</html>")
    assert play([broken, KNOWN, TAKEN, KNOWN, OK])[0] is OK
    for came, log in (play([broken], request("unsent")), play([broken, Reply(200)])):
        assert isinstance(came, ServerError)
        assert came.status == status
        assert log.count("/generate") == 1


def test_a_wait_that_would_pass_the_deadline_is_not_begun() -> None:
    steps = exchange(request(), PATIENCE, time.monotonic() + 5)
    steps.send(None)
    with refused(OverloadedError, "no", expected="a", got="b", fix="Do c."):
        steps.send(BUSY)


def test_waits_are_spread_so_that_clients_do_not_come_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waits = [Patience().wait(3) for _ in range(200)]
    assert 0.5 <= min(waits) < 0.6 < 0.9 < max(waits) <= 1.0
    assert Patience().wait(10_000) <= 10.0
