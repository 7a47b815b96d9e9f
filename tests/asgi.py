"""A client of an ASGI application that can leave in the middle, in the event loop of the test."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Call:
    """One POST under way. `status` and `chunks` grow as the application answers."""

    def __init__(self, app: Any, path: str, body: object, headers: dict[str, str] | None = None) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self._body, self._left = json.dumps(body).encode(), asyncio.Event()
        self._asked = False
        names = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in names.items()],
        }
        self.done = asyncio.ensure_future(app(scope, self._receive, self._send))

    def leave(self) -> None:
        """Disconnect."""
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        if message.get("body"):
            self.chunks.append(message["body"])


async def until(condition: Any) -> None:
    """Wait until `condition()`, 30 seconds at most."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)
