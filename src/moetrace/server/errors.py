"""Every error as a status and `{"error": {"type", "message", "expected", "got", "fix"}}`."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moetrace.errors import (
    DuplicateRequestError,
    EngineError,
    MoetraceError,
    OverloadedError,
    RequestError,
    ShuttingDownError,
    WeightsError,
)


def handle_errors(app: FastAPI) -> None:
    """Answer every error of the library and of parsing in one form."""

    @app.exception_handler(MoetraceError)
    async def refuse(_: Request, error: MoetraceError) -> JSONResponse:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 400)
        later = isinstance(error, OverloadedError | ShuttingDownError)
        return error_response(status, error, {"Retry-After": "1"} if later else None)

    @app.exception_handler(Exception)
    async def own_up(_: Request, error: Exception) -> JSONResponse:  # the server logs it with its traceback
        return error_response(500, MoetraceError("the server has a bug", got=type(error).__name__, fix=_REPORT))

    @app.exception_handler(ClientDisconnect)
    async def ignore(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; logs and metrics do

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(422, _explain(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> JSONResponse:
        refusal = RequestError(f"the request cannot be served ({error.detail})")
        return error_response(error.status_code, refusal, error.headers)


_REPORT = "Its log says where; please report it."
_STATUS: dict[type[MoetraceError], int] = {
    DuplicateRequestError: 409,
    OverloadedError: 429,
    WeightsError: 400,
    EngineError: 503,
}


def error_response(status: int, error: MoetraceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as clients get it."""
    return JSONResponse({"error": error_facts(error)}, status, headers)


def error_facts(error: MoetraceError) -> dict[str, str]:
    """What is known of an error, as text."""
    facts = {"expected": error.expected, "got": error.got, "fix": error.fix}
    body = {"type": type(error).__name__, "message": str(error)}
    return body | {name: str(value) for name, value in facts.items() if value is not None}


def _explain(error: RequestValidationError) -> RequestError:
    """Say of a body that does not parse what pydantic found first."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError(
            "the request body is not JSON",
            expected="a JSON object",
            got=f"{first['ctx']['error']} at character {first['loc'][-1]}",
            fix="Send an object with the fields that /docs lists.",
        )
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the request body"
    expected, value = first["msg"], repr(first.get("input"))
    for union, meaning in _UNIONS.items():
        if place.startswith(f"{union}."):
            place, expected = union, meaning
    return RequestError(
        f"{place} is wrong",
        expected=expected,
        got=value if len(value) <= 80 else f"{value[:77]}...",
        fix="See /docs for the request's fields.",
    )


_UNIONS = {
    "inputs": "text, or a list of token ids, or a list of either",
    "parameters.stop_sequences": "a text, or a list of texts and of lists of token ids",
}
