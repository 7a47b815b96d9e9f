"""`/routing`: capture stopped and started, and the traces that were returned by reference."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from moetrace.engines.base import Engine
from moetrace.errors import RequestError
from moetrace.server.answers import CaptureChange, RoutingFacts
from moetrace.server.archive import Archive
from moetrace.server.errors import error_response
from moetrace.server.openapi import content, errors
from moetrace.server.payloads import TRACES
from moetrace.server.ranges import SourceResponse, is_known, range_of


def routing_routes(engine: Engine, archive: Archive) -> APIRouter:
    """The routes that control capture and hand out what it recorded."""
    router = APIRouter()
    changing = asyncio.Lock()

    @router.get("/routing", summary="Whether routes are captured, what was, and what is kept", responses=errors())
    async def routing() -> RoutingFacts:
        kept: Any = asdict(await asyncio.to_thread(archive.state))
        facts: RoutingFacts = _facts(engine) | {"archive": kept}
        return facts

    @router.post("/routing/start", summary="Capture again from the next step on", responses=errors(400, 503))
    async def start() -> CaptureChange:
        async with changing:
            await asyncio.to_thread(engine.start_capture)
        return {"state": _state(engine)}

    @router.post(
        "/routing/stop",
        summary="Capture nothing from the next step on; requests for routes are refused",
        responses=errors(400, 503),
    )
    async def stop() -> CaptureChange:
        async with changing:
            await asyncio.to_thread(engine.stop_capture)
        return {"state": _state(engine)}

    @router.get(
        f"{TRACES}/{{digest}}",
        summary="The container that a reference stands for, or one range of its bytes",
        response_class=Response,
        responses=_WHOLE
        | {206: {**_WHOLE[200], "description": "The range that was asked for."}}
        | {304: {"description": "The client has it, as its If-None-Match says."}}
        | errors(404, 416, 422),
    )
    async def trace(digest: str, http: Request) -> Response:
        return await _answer(digest, http, fetch=True)

    @router.head(
        f"{TRACES}/{{digest}}",
        summary="As GET, without the bytes, and always of the whole",
        response_class=Response,
        responses=_WHOLE | {304: {"description": "The client has it, as its If-None-Match says."}} | errors(404, 422),
    )
    async def trace_head(digest: str, http: Request) -> Response:
        return await _answer(digest, http, fetch=False)

    @router.delete(
        f"{TRACES}/{{digest}}",
        summary="Give a reference back; with the last one its trace goes",
        status_code=204,
        responses=errors(404, 422, 503),
    )
    async def delete(digest: str) -> None:
        await asyncio.to_thread(archive.delete, digest)

    @router.api_route(f"{TRACES}/{{digest}}", methods=["OPTIONS", "POST", "PUT", "PATCH"], include_in_schema=False)
    async def refuse(digest: str) -> Response:  # Starlette would name the methods of the first route only
        raise HTTPException(405, headers={"Allow": "DELETE, GET, HEAD"})

    async def _answer(digest: str, http: Request, *, fetch: bool) -> Response:
        with ExitStack() as opened:
            kept, source = await asyncio.to_thread(opened.enter_context, archive.open(digest, fetch=fetch))
            etag = f'"{kept.digest}"'
            headers = {"etag": etag, "accept-ranges": "bytes"}
            if is_known(http.headers, etag):
                return Response(status_code=304, headers=headers)
            headers["content-type"] = _CONTAINER
            if not fetch:  # a range of HEAD means nothing
                return Response(headers=headers | {"content-length": str(source.size)})
            part = range_of(http.headers, etag, source.size)
            if part is not None and part[0] >= part[1]:
                error = RequestError("the range begins after the end", expected=f"below {source.size}", got=part[0])
                return error_response(416, error, {"content-range": f"bytes */{source.size}"})
            return SourceResponse(source, part, headers, opened.pop_all())

    return router


_CONTAINER = "application/octet-stream"
_WHOLE = content(_CONTAINER, "A container, see docs/format.md.")


def _state(engine: Engine) -> Literal["on", "off", "never"]:
    capture = engine.capture
    return "never" if capture is None else "on" if capture.is_on else "off"


def _facts(engine: Engine) -> Any:
    capture, layout = engine.capture, engine.layout
    facts: dict[str, Any] = {"state": _state(engine), "layout": None, "capacity": None, "captured": None}
    if layout is not None:
        facts["layout"] = {"layers": list(layout.layers), "num_experts": layout.num_experts, "top_k": layout.top_k}
    if capture is not None:
        facts["capacity"] = {"rows": capture.capacity_rows, "bytes": capture.capacity_bytes}
        counted = ("sequences", "rows", "missing_rows", "errors")
        facts["captured"] = {name: getattr(capture, name) for name in counted}
    return facts
