"""A loopback server that fails on purpose, and counts what it generates: `/generate` of a moetrace server, in small.

As the real one it refuses an id that is under way. A plan says, request by request, what happens; after its end
everything is answered. It also keeps blobs, and sends them in ranges, as far as it likes.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Faulty:
    """What happened, and what is to happen.

    Attributes:
        plan: for each POST in turn "unread" (dropped before it is read), "unanswered" (generated, and dropped),
            "halfway" (generated, and half of the answer sent), "lingering" (generated and dropped, its id taken for two
            more requests), a status to refuse with, or "ok".
        asked: ids of the requests that were read, in order.
        generated: ids that were generated, in order; `delivered` those whose answers left whole.
        under_way: ids that are taken, and for how many more requests.
        blobs: what GET finds, by path; `tags` their ETags.
        cuts: after how many bytes each GET of a blob is dropped; those after its end are not.
        ranges: the Range header of each GET of a blob.
    """

    def __init__(self, answer: Answer, plan: list[str | int], knows_ids: bool = True) -> None:
        self.answer, self.plan, self.knows_ids = answer, list(plan), knows_ids
        self.asked: list[str] = []
        self.generated: list[str] = []
        self.delivered: list[str] = []
        self.under_way: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: Faulty

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        faulty = self.faulty
        if self.path == "/health":
            return self._send(200, {"status": "ok"})
        if self.path not in faulty.blobs:
            return self._refuse(404, "StoreError")
        data, tag = faulty.blobs[self.path], faulty.tags[self.path]
        asked = self.headers["Range"]
        faulty.ranges.append(asked)
        first = 0
        if asked is not None and self.headers["If-Range"] == f'"{tag}"':
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
        self._head(206 if first else 200, len(data) - first)
        cut = faulty.cuts.pop(0) if faulty.cuts else len(data)
        self.wfile.write(data[first : first + cut])
        return self._drop() if first + cut < len(data) else None

    def do_POST(self) -> None:
        faulty = self.faulty
        with faulty.lock:
            fate = faulty.plan.pop(0) if faulty.plan else "ok"
        if fate == "unread":
            return self._drop()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request_id = self.headers["X-Request-Id"]
        with faulty.lock:
            faulty.asked.append(request_id)
            if faulty.under_way.get(request_id, 0):
                faulty.under_way[request_id] -= 1
                return self._refuse(409, "DuplicateRequestError")
            if isinstance(fate, int):
                return self._refuse(fate, "OverloadedError" if fate == 429 else "EngineError")
            faulty.generated.append(request_id)
            if fate == "lingering":
                faulty.under_way[request_id] = 2
        answer = faulty.answer(body)
        if fate in ("unanswered", "lingering"):
            return self._drop()
        if fate == "halfway":
            data = json.dumps(answer).encode()
            self._head(200, len(data))
            self.wfile.write(data[: len(data) // 2])
            return self._drop()
        faulty.delivered.append(request_id)
        return self._send(200, answer)

    def _refuse(self, status: int, kind: str) -> None:
        self._send(status, {"error": {"type": kind, "message": "no."}})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self._head(status, len(data))
        self.wfile.write(data)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        if self.faulty.knows_ids:
            self.send_header("X-Request-Id", self.headers["X-Request-Id"])
        self.send_header("Content-Length", str(length))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()

    def _drop(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


@contextmanager
def failing(answer: Answer, plan: list[str | int], *, knows_ids: bool = True) -> Iterator[tuple[str, Faulty]]:
    """Serve by a plan for the length of the context; yields the URL and what happens."""
    faulty = Faulty(answer, plan, knows_ids)
    handler = type("Handler", (_Handler,), {"faulty": faulty})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faulty
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
