"""How the application is run."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import threading
import time
from typing import Any

import pytest
from fastapi import FastAPI, Response

from moetrace.server import ServerConfig, run
from moetrace.server.archive import Archive


class Requests:
    """No requests."""

    def drain(self, seconds: float) -> None:
        """Nothing to end."""


def application() -> Any:
    app = FastAPI()
    app.state.requests, app.state.archive = Requests(), Archive(ServerConfig())
    return app


def test_a_server_does_not_look_again_at_what_was_there_when_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(run._Server, "run", lambda self: frozen.append(gc.get_freeze_count()))
    try:
        run.serve(application(), ServerConfig())
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000


def test_an_idle_connection_is_left_open_for_longer_than_clients_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server closes first, a request on its way is lost."""
    assert run.KEEP_ALIVE > 15
    monkeypatch.setattr(run, "KEEP_ALIVE", 0.75)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = run._Server(application(), ServerConfig(port=port))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            for pause in (0.3, 0):  # still there after a while
                client.sendall(b"HEAD /nowhere HTTP/1.1\r\nHost: here\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 404")
                time.sleep(pause)
            began = time.monotonic()
            while client.recv(4096):
                pass
            assert 0.5 < time.monotonic() - began < 5
    finally:
        server.should_exit = True
        thread.join()


def test_a_client_that_does_not_read_keeps_no_server_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_SECONDS_TO_READ", 0)
    app = application()

    @app.get("/large")
    def large() -> Response:
        return Response(b"x" * (64 << 20))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = run._Server(app, ServerConfig(port=port, shutdown_seconds=0.5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(100)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()


def test_a_signal_ends_the_serving_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    app = application()
    monkeypatch.setattr(app.state.archive, "close", lambda: closed.append(True))
    before = signal.getsignal(signal.SIGTERM)

    def run_and_be_told(self: run._Server) -> None:
        with self.capture_signals():
            self._loop = asyncio.new_event_loop()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run._Server, "run", run_and_be_told)
    try:
        run.serve(app, ServerConfig())
    finally:
        gc.unfreeze()
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before
