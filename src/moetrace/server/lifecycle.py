"""What an RL system does between rollouts: pause, abort, new weights; and what it asks about the server."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from moetrace.engines.base import Engine
from moetrace.errors import RequestError
from moetrace.server.answers import Aborted, Health, ModelFacts, Paused, Readiness, WeightsFacts
from moetrace.server.openapi import answer, errors
from moetrace.server.requests import RequestTable
from moetrace.server.schemas import Listed


class AbortRequest(BaseModel):
    """Which requests to end: some by id, or all."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_ids: Listed[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="ids that the requests had in X-Request-Id"
    )
    all: bool = Field(False, description="all requests")


class WeightsRequest(BaseModel):
    """New weights."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(description="checkpoint folder or safetensors file, as the server sees it", min_length=1)
    version: str = Field(description="name of the weights, recorded with every row", min_length=1, max_length=256)


def lifecycle_routes(engine: Engine, requests: RequestTable) -> APIRouter:
    """The routes that control and describe the engine."""
    router = APIRouter()
    updating = asyncio.Lock()

    @router.get(
        "/health",
        summary="200 while the engine can serve, else 503",
        responses=answer(Health) | {503: answer(Health, "The engine has stopped.")[200]},
    )
    async def health() -> JSONResponse:
        healthy = engine.is_healthy()
        facts = {"status": "ok" if healthy else "stopped", "engine": engine.name, "captures": engine.layout is not None}
        return JSONResponse(facts, 200 if healthy else 503)

    @router.get(
        "/ready",
        summary="200 while a request would be served at once, else 503",
        responses=answer(Readiness) | {503: answer(Readiness, "It would not.")[200]},
    )
    async def ready() -> JSONResponse:
        state = "paused" if engine.is_paused else "ready"
        state = "stopped" if not engine.is_healthy() else "shutting down" if requests.is_draining else state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/model", summary="Which model, with which weights", responses=errors())
    async def model() -> ModelFacts:
        layout = engine.layout
        return {
            "engine": engine.name,
            "fingerprint": engine.fingerprint,
            "layout": None
            if layout is None
            else {"layers": list(layout.layers), "num_experts": layout.num_experts, "top_k": layout.top_k},
            "weight_version": engine.weight_version,
            "window": engine.max_model_len,
            "vocab_size": engine.vocab_size,
            "paused": engine.is_paused,
        }

    @router.post(
        "/pause",
        summary="Launch no step until /resume; requests stay, and new ones wait",
        responses=errors(503),
    )
    async def pause() -> Paused:
        engine.pause()
        return {"paused": engine.is_paused}

    @router.post("/resume", summary="Go on after /pause", responses=errors(503))
    async def resume() -> Paused:
        engine.resume()
        return {"paused": engine.is_paused}

    @router.post(
        "/abort",
        summary="End requests; their clients get what there is, with its rows",
        responses=errors(400, 413, 422),
    )
    async def abort(request: AbortRequest) -> Aborted:
        if request.all == (request.request_ids is not None):
            raise RequestError(
                "it is not clear what to abort",
                expected='either {"request_ids": [...]} or {"all": true}',
                got=request.model_dump_json(),
            )
        if request.request_ids is None:
            return {"aborted": requests.abort_all(), "unknown": []}
        aborted, unknown = requests.abort(request.request_ids)
        return {"aborted": aborted, "unknown": unknown}

    @router.post(
        "/update_weights",
        summary="Replace the weights between two steps, all or none",
        responses=errors(400, 413, 422, 503),
    )
    async def update_weights(request: WeightsRequest) -> WeightsFacts:
        async with updating:
            await asyncio.to_thread(engine.update_weights, request.path, request.version)
        return {"weight_version": engine.weight_version}

    return router
