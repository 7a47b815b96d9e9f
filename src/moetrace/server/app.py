"""The FastAPI application. It parses, queues, waits and encodes; everything else is the library's."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from moetrace import __version__
from moetrace.engines.base import Engine
from moetrace.server.errors import handle_errors
from moetrace.server.generation import generation_routes
from moetrace.server.texts import Tokenizer


def create_app(engine: Engine, tokenizer: Tokenizer | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        engine: what generates; it is not closed by the application.
        tokenizer: the checkpoint's tokenizer; without one the server takes and returns token ids only.
    """
    app = FastAPI(title="moetrace", version=__version__, summary="Generate, and return the experts that were chosen.")
    handle_errors(app)
    app.include_router(generation_routes(engine, tokenizer))

    @app.get("/health", summary="200 while the engine can serve, else 503")
    async def health() -> JSONResponse:
        healthy = engine.is_healthy()
        facts = {"status": "ok" if healthy else "stopped", "engine": engine.name, "captures": engine.layout is not None}
        return JSONResponse(facts, 200 if healthy else 503)

    return app
