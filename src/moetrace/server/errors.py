"""Every error as a status and `{"error": {"type", "message", "expected", "got", "fix"}}`; /v1 has OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moetrace.errors import (
    ArchiveError,
    DuplicateRequestError,
    EngineError,
    MissingRowError,
    MoetraceError,
    OverloadedError,
    RequestError,
    ShuttingDownError,
    UnknownModelError,
    UnknownTraceError,
    WeightsError,
)

REQUEST_ID = "X-Request-Id"


def handle_errors(app: FastAPI) -> None:
    """Answer every error of the library and of parsing in one form."""

    @app.exception_handler(MoetraceError)
    async def refuse(request: Request, error: MoetraceError) -> JSONResponse:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 400)
        later = isinstance(error, OverloadedError | ShuttingDownError)
        headers = {"Retry-After": "1"} if later else None
        return error_response(status, error, headers, path=request.url.path)

    @app.exception_handler(Exception)
    async def own_up(request: Request, error: Exception) -> JSONResponse:  # the server logs it with its traceback
        bug = MoetraceError("the server has a bug", got=type(error).__name__, fix=_REPORT)
        name = getattr(request.state, "request_id", None)  # this answer does not come by the gate, which adds it
        return error_response(500, bug, {REQUEST_ID: name} if name else None, path=request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def ignore(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; logs and metrics do

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(422, _explain(error), path=request.url.path)

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's own, of JSON that Python cannot hold: text that is not UTF-8, too deep
            unreadable = RequestError(
                "the request body is not JSON", expected="a JSON object, in UTF-8", fix=_SEND_FIELDS
            )
            return error_response(422, unreadable, path=request.url.path)
        refusal = RequestError(
            f"the request cannot be served ({error.detail})",
            got=f"{request.method} {request.url.path}",
            fix=_NO_PATH if error.status_code in (404, 405) else None,
        )
        return error_response(error.status_code, refusal, error.headers, path=request.url.path)


_REPORT = "Its log says where; please report it."
_NO_PATH = "See /docs for the paths; a client's URL ends before them, as http://HOST:PORT does."
_SEND_FIELDS = "Send an object with the fields that /docs lists."
_STATUS: dict[type[MoetraceError], int] = {
    MissingRowError: 500,
    UnknownModelError: 404,
    UnknownTraceError: 404,
    DuplicateRequestError: 409,
    OverloadedError: 429,
    WeightsError: 400,
    ArchiveError: 503,
    EngineError: 503,
}


def error_response(
    status: int, error: MoetraceError, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> JSONResponse:
    """An error as clients of `path` get it."""
    if path.startswith("/v1/"):
        status = 400 if status == 422 else status  # OpenAI knows no 422
        return _Escaped({"error": openai_facts(status, error)}, status, headers)
    return _Escaped({"error": error_facts(error)}, status, headers)


class _Escaped(JSONResponse):
    """JSON in ASCII: an error may quote what a client sent, and UTF-8 cannot hold all that JSON can say."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def openai_facts(status: int, error: MoetraceError) -> dict[str, str | None]:
    """An error in OpenAI's form, its message in OpenAI's words."""
    message = str(error).replace("max_new_tokens", "max_tokens")
    kind, code = _OPENAI.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    code = "model_not_found" if isinstance(error, UnknownModelError) else code
    return {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}


_OPENAI: dict[int, tuple[str, str | None]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    429: ("requests", "rate_limit_exceeded"),
}
"""OpenAI's `type` and `code` of an error, by its status."""


def error_facts(error: MoetraceError) -> dict[str, str]:
    """What is known of an error, as text."""
    facts = {"expected": error.expected, "got": error.got, "fix": error.fix}
    body = {"type": type(error).__name__, "message": str(error)}
    return body | {name: str(value) for name, value in facts.items() if value is not None}


def _explain(error: RequestValidationError) -> RequestError:
    """Say of a body that does not parse what pydantic found first."""
    first = error.errors()[0]
    if isinstance(first.get("input"), bytes):
        return RequestError(
            "the request body is of no type that is known",
            expected="Content-Type: application/json",
            fix="Send it with that header.",
        )
    if first["type"] == "json_invalid":
        return RequestError(
            "the request body is not JSON",
            expected="a JSON object",
            got=f"{first['ctx']['error']} at character {first['loc'][-1]}",
            fix=_SEND_FIELDS,
        )
    parts = [str(part) for part in first["loc"] if part != "body"]
    place = ".".join(parts) or "the request body"
    kind, value = first["type"], repr(first.get("input"))
    expected = None if kind in _WORDS else re.sub(r"^\w+ should (be|have) ", "", first["msg"])
    for union, meaning in _UNIONS.items():
        if place.startswith(f"{union}."):
            place, expected = union, meaning
    return RequestError(
        f"{place} is {_WORDS.get(kind, 'wrong')}",
        expected=expected,
        got=None if kind == "missing" else value if len(value) <= 80 else f"{value[:77]}...",
        fix="See /docs for the request's fields.",
        param=parts[0] if parts else None,
    )


_WORDS = {"missing": "missing", "extra_forbidden": "unknown"}
"""What pydantic says of a field, rather than of its value."""
_UNIONS = {
    "inputs": "text, or a list of token ids, or a list of either",
    "prompt": "text, or a list of token ids, or a list of either",
    "stop": "a text, or a list of texts",
    "text": "a text, or a list of texts",
    "input_ids": "a list of token ids, or a list of such lists",
    "sampling_params.stop": "a text, or a list of texts",
    "parameters.stop_sequences": "a text, or a list of texts and of lists of token ids",
}
