"""The FastAPI application. It parses, queues, waits and encodes; everything else is the library's."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from fastapi.responses import Response

from moetrace import __version__
from moetrace.engines.base import Engine
from moetrace.server.archive import Archive
from moetrace.server.config import ServerConfig
from moetrace.server.errors import handle_errors
from moetrace.server.gate import OPEN_PATHS, Gate
from moetrace.server.generation import Generator, generation_routes
from moetrace.server.lifecycle import lifecycle_routes
from moetrace.server.metrics import Metrics
from moetrace.server.openai.routes import openai_routes
from moetrace.server.openapi import content, describe, errors
from moetrace.server.requests import RequestTable
from moetrace.server.routing import routing_routes
from moetrace.server.sglang.routes import sglang_routes
from moetrace.server.texts import Tokenizer


def create_app(engine: Engine, tokenizer: Tokenizer | None = None, config: ServerConfig | None = None) -> FastAPI:
    """The server of one engine.

    Args:
        engine: what generates; it is not closed by the application.
        tokenizer: the checkpoint's tokenizer; without one the server takes and returns token ids only.
        config: who may ask, how much at once, and what is kept for later.

    Raises:
        StoreError: the store that traces are to be kept in cannot be opened.
    """
    config = config or ServerConfig()
    app = FastAPI(title="moetrace", version=__version__, summary="Generate, and return the experts that were chosen.")
    metrics, requests, archive = Metrics(engine), RequestTable(engine, config), Archive(config)
    metrics.watch(lambda: len(requests), lambda: requests.sequences)
    app.state.requests, app.state.archive = requests, archive
    handle_errors(app)
    app.add_middleware(Gate, config=config, metrics=metrics)
    generator = Generator(engine, tokenizer, requests, config, metrics, archive)
    app.include_router(generation_routes(generator))
    app.include_router(openai_routes(generator, config.served_model_name or "model"))
    app.include_router(sglang_routes(generator))
    app.include_router(lifecycle_routes(engine, requests))
    app.include_router(routing_routes(engine, archive))

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses=content("text/plain", "Prometheus' text format") | errors(),
    )
    async def prometheus() -> Response:
        kept = await asyncio.to_thread(archive.state)
        return Response(metrics.text(kept), media_type="text/plain; version=0.0.4")

    describe(app, config, OPEN_PATHS)
    return app
