"""A server's errors are here what they were there."""

from __future__ import annotations

import inspect
import json

import pytest

from moetrace import errors
from moetrace.client.refusals import error_of
from moetrace.errors import MissingExtraError, MoetraceError, ServerError
from moetrace.server.errors import error_facts

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not MissingExtraError]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facts", [{}, {"expected": 3, "got": "x"}, {"fix": "Do it."}, {"got": "", "fix": "Do it."}])
def test_an_error_arrives_as_it_was_raised(kind: type[MoetraceError], facts: dict[str, str]) -> None:
    raised = kind("it broke (in 2. of 3 places)", **facts)
    body = json.dumps({"error": error_facts(raised)}).encode()
    came = error_of(418, {"x-request-id": "me"}, body, "/generate")
    assert type(came) is kind
    assert str(came) == str(raised)
    assert came.what == raised.what
    assert came.__notes__ == ["HTTP 418 at /generate, request me"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b"3",
        b'{"error": "no"}',
        b'{"error": {"type": "RequestError"}}',
        b'{"detail": 1}',
    ],
)
def test_what_is_no_error_of_ours_is_told_with_its_status(body: bytes) -> None:
    came = error_of(502, {}, body, "/generate")
    assert type(came) is ServerError
    assert came.status == 502
    assert "status 502" in str(came)


def test_kinds_that_are_not_known_or_not_ours_are_server_errors() -> None:
    for kind in ("ServerError", "FutureError", "MissingExtraError", "ValueError", "annotations"):
        came = error_of(400, {}, json.dumps({"error": {"type": kind, "message": "no."}}).encode(), "/x")
        assert (type(came), str(came)) == (ServerError, "no.")
        assert came.status == 400  # type: ignore[attr-defined]
