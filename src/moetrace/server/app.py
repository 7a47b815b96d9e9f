"""The FastAPI application. It parses, queues, waits and encodes; everything else is the library's."""

from __future__ import annotations

from fastapi import FastAPI

from moetrace import __version__
from moetrace.engines.base import Engine
from moetrace.server.errors import handle_errors
from moetrace.server.generation import generation_routes
from moetrace.server.lifecycle import lifecycle_routes
from moetrace.server.requests import RequestIds, RequestTable
from moetrace.server.texts import Tokenizer


def create_app(engine: Engine, tokenizer: Tokenizer | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        engine: what generates; it is not closed by the application.
        tokenizer: the checkpoint's tokenizer; without one the server takes and returns token ids only.
    """
    app = FastAPI(title="moetrace", version=__version__, summary="Generate, and return the experts that were chosen.")
    handle_errors(app)
    app.add_middleware(RequestIds)
    requests = RequestTable(engine)
    app.include_router(generation_routes(engine, tokenizer, requests))
    app.include_router(lifecycle_routes(engine, requests))
    return app
