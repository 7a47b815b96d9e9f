"""A server's errors, as the exceptions they were there."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from moetrace import errors
from moetrace.errors import MoetraceError, ServerError

_KINDS: dict[str, type[MoetraceError]] = dict(inspect.getmembers(errors, inspect.isclass))
del _KINDS["MissingExtraError"]
"""An extra that the server lacks is not missing here."""


def error_of(status: int, headers: Mapping[str, str], body: bytes, path: str) -> MoetraceError:
    """The error that a response is, with a note of where it came from.

    Args:
        status, headers, body: of the response, header names in lower case.
        path: what was asked.

    Returns:
        an exception of the kind that the body names, or a `ServerError` with the status.
    """
    try:
        error = error_from(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = body[:200].decode("utf-8", "replace")
        error = ServerError(f"the server answered with status {status}", got=text or "an empty body")
    if isinstance(error, ServerError):
        error.status = status
    error.add_note(f"HTTP {status} at {path}, request {headers.get('x-request-id', 'without an id')}")
    return error


def error_from(facts: Mapping[str, Any]) -> MoetraceError:
    """The error that `{"type", "message", "expected", "got", "fix"}` tell of, as responses and streams have it.

    Raises:
        KeyError, TypeError, AttributeError: they are something else.
    """
    parts = {name: facts.get(name) for name in ("expected", "got", "fix")}
    said = str(MoetraceError("", **parts))  # what the message adds to the sentence that the error began with
    kind = _KINDS.get(facts["type"], ServerError)
    return kind(facts["message"].removesuffix(said).removesuffix("."), **parts)
