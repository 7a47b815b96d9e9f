"""The FastAPI application. It parses, queues, waits and encodes; everything else is the library's.

Tokenising and encoding run in worker threads, never on the event loop: one long sequence must not delay the others.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from moetrace import __version__
from moetrace.dialects import to_lightllm
from moetrace.engines.base import Engine, GenerateResult
from moetrace.errors import EngineError, MoetraceError, RequestError
from moetrace.server.schemas import GenerateParameters, GenerateRequest


class Tokenizer(Protocol):
    """What the server needs of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


def create_app(engine: Engine, tokenizer: Tokenizer | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        engine: what generates; it is not closed by the application.
        tokenizer: the checkpoint's tokenizer; without one the server takes and returns token ids only.
    """
    app = FastAPI(title="moetrace", version=__version__, summary="Generate, and return the experts that were chosen.")

    @app.exception_handler(MoetraceError)
    async def refuse(_: Request, error: MoetraceError) -> JSONResponse:
        return _error(503 if isinstance(error, EngineError) else 400, error)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, _explain(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, RequestError(f"the request cannot be served ({error.detail})"))

    @app.get("/health", summary="200 while the engine can serve, else 503")
    async def health() -> JSONResponse:
        healthy = engine.is_healthy()
        facts = {"status": "ok" if healthy else "stopped", "engine": engine.name, "captures": engine.layout is not None}
        return JSONResponse(facts, 200 if healthy else 503)

    @app.post("/generate", summary="Generate from one prompt (LightLLM's contract)")
    async def generate(request: GenerateRequest) -> Response:
        parameters = request.parameters
        sampling = parameters.sampling()
        prompt = await asyncio.to_thread(_prompt_tokens, request, tokenizer)
        generation = engine.submit(prompt, sampling, return_routes=parameters.return_routed_experts)
        result = await asyncio.wrap_future(generation.futures[0])
        body = await asyncio.to_thread(_encode, result, parameters, tokenizer)
        return Response(body, media_type="application/json")

    return app


def _prompt_tokens(request: GenerateRequest, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(request.inputs, list):
        return request.inputs
    if tokenizer is None:
        raise RequestError(
            "this checkpoint has no tokenizer",
            expected="inputs as a list of token ids",
            got="text",
            fix="Send token ids.",
        )
    try:
        request.inputs.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "inputs is not valid Unicode", expected="text that UTF-8 can hold", got=str(error)
        ) from error
    return tokenizer.encode(request.inputs, add_special_tokens=request.parameters.add_special_tokens)


def _encode(result: GenerateResult, parameters: GenerateParameters, tokenizer: Tokenizer | None) -> bytes:
    def text_of(tokens: list[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    response: dict[str, Any] = {
        "generated_text": None if tokenizer is None else [text_of(result.output_tokens)],
        "count_output_tokens": len(result.output_tokens),
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_tokens),
        "prompt_token_ids": result.prompt_tokens,
        "output_token_ids": result.output_tokens,
    }
    if parameters.return_details:
        response["tokens"] = [
            {"id": token, "text": text_of([token]), "logprob": logprob}
            for token, logprob in zip(result.output_tokens, result.logprobs, strict=True)
        ]
    if result.trace is not None:
        response["routed_experts"] = to_lightllm(result.trace)
    return json.dumps(response, allow_nan=False).encode()


def _error(status: int, error: MoetraceError) -> JSONResponse:
    facts = {"expected": error.expected, "got": error.got, "fix": error.fix}
    body = {"type": type(error).__name__, "message": str(error)}
    body |= {name: str(value) for name, value in facts.items() if value is not None}
    return JSONResponse({"error": body}, status)


def _explain(error: RequestValidationError) -> RequestError:
    """Say of a body that does not parse what pydantic found first."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError(
            "the request body is not JSON",
            expected="a JSON object",
            got=f"{first['ctx']['error']} at character {first['loc'][-1]}",
            fix='Send {"inputs": "text or token ids", "parameters": {...}}.',
        )
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the request body"
    expected, value = first["msg"], repr(first.get("input"))
    if place.startswith("inputs."):
        place, expected = "inputs", "text, or a list of token ids"
    return RequestError(
        f"{place} is wrong",
        expected=expected,
        got=value if len(value) <= 80 else f"{value[:77]}...",
        fix="See /docs for the request's fields.",
    )
