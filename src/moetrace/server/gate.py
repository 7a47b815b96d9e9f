"""What happens to every HTTP request before and after its route: an id, a key, a size limit, a log line."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moetrace.errors import RequestError
from moetrace.server.config import ServerConfig
from moetrace.server.errors import REQUEST_ID, error_response
from moetrace.server.metrics import Metrics

logger = logging.getLogger("moetrace.access")

OPEN_PATHS = ("/health", "/ready", "/sglang/health")
"""Paths that need no key: what asks them has none."""


class Gate:
    """ASGI middleware. A request's id is its client's or a new one; its response and its log line repeat it."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, headers = time.perf_counter(), 500, Headers(scope=scope)
        asked = headers.get(REQUEST_ID, "")
        request_id = asked if re.fullmatch(r"[\x21-\x7e]{1,128}", asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            app = self._refusal(scope["path"], headers) or self._app
            await app(scope, self._limited(receive), send_with_id)
        finally:
            seconds = time.perf_counter() - began
            path = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(path, status, seconds)
            facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            logger.info(json.dumps({**facts, "seconds": round(seconds, 6), **scope["state"].get("facts", {})}))

    def _refusal(self, path: str, headers: Headers) -> ASGIApp | None:
        key, length = self._config.api_key, headers.get("content-length", "")
        if key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                error = RequestError("the API key is missing or wrong", expected="Authorization: Bearer KEY")
                return error_response(401, error, {"WWW-Authenticate": "Bearer"}, path=path)
        if length.isdecimal() and int(length) > self._config.max_body_bytes:
            return error_response(413, self._too_large(f"{length} bytes"), path=path)
        return None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._config.max_body_bytes:
                raise HTTPException(413, self._too_large("more").what)
            return message

        return receive_limited

    def _too_large(self, got: str) -> RequestError:
        limit = self._config.max_body_bytes
        return RequestError(f"the request body is larger than {limit} bytes", got=got, fix="Send fewer prompts.")
