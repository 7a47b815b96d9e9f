"""A server whose engine computes nothing: tokens come by the clock, and routes of any length are there at once.

    python benchmarks/clockwork.py --port 8000

What remains is the real server, over real HTTP. `benchmarks/server.py long` uses it to see how a very long sequence
leaves, and what others feel of it. `POST /watched` returns what was seen since the last time: when each event of a
stream was sent, when whole answers were finished and sent, and how late the event loop woke up.

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moetrace.engines.base import CaptureState
from moetrace.engines.requests import GenerateResult, Generation, Progress, SamplingParams
from moetrace.layout import MoeLayout
from moetrace.server import ServerConfig, create_app, serve
from moetrace.spans import WeightSpan
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout(tuple(range(48)), 128, 8)
TICK = 0.01
WAKE = 0.001


@dataclass
class Running:
    """A request under way."""

    prompt: list[int]
    sampling: SamplingParams
    return_routes: bool
    on_progress: Progress | None
    future: Future[GenerateResult] = field(default_factory=Future)
    output: list[int] = field(default_factory=list)


class Clockwork:
    """An engine: one token for everybody each tick. Routes are uniform random ones, drawn before."""

    name = "clockwork"
    vocab_size = 151_936
    max_model_len = 65_536
    layout: MoeLayout | None = LAYOUT
    num_layers = LAYOUT.num_layers
    fingerprint: str | None = "clockwork"
    capture = CaptureState(True, 0, 0, 0, 0, 0, 0)
    weight_version = "0"
    is_paused = False

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows_TLK = np.argsort(rng.random((1024, LAYOUT.num_layers, LAYOUT.num_experts)), axis=-1)[..., : LAYOUT.top_k]
        self._rows_TLK = np.tile(rows_TLK.astype(LAYOUT.dtype), (self.max_model_len // 1024, 1, 1))
        self._running: dict[str, Running] = {}
        self._finishing = ThreadPoolExecutor(1, "routes")
        self.finished: list[tuple[float, float]] = []
        """Of sequences with routes: when their rows were there, and when their trace was."""
        threading.Thread(target=self._tick, daemon=True).start()

    def submit(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        return_routes: bool = False,
        on_progress: Progress | None = None,
        **_: Any,
    ) -> Generation:
        """Begin at the next tick."""
        running = Running(list(prompt_tokens), sampling, return_routes, on_progress)
        name = str(id(running))
        self._running[name] = running
        return Generation(name, len(running.prompt), (running.future,))

    def _tick(self) -> None:
        due = time.perf_counter()
        while True:
            due += TICK
            time.sleep(max(due - time.perf_counter(), 0))
            for name, running in list(self._running.items()):
                running.output.append(len(running.output))
                if len(running.output) >= running.sampling.max_new_tokens:
                    self._running.pop(name, None)
                    self._finishing.submit(self._finish, running, "length")
                elif running.on_progress is not None:
                    running.on_progress(0, list(running.output), [0.0] * len(running.output))

    def _finish(self, running: Running, reason: Any) -> None:
        began, trace = time.perf_counter(), None
        if running.return_routes:
            tokens = running.prompt + running.output
            rows_TLK = self._rows_TLK[: len(tokens) - 1]
            trace = RoutingTrace.build(
                rows_TLK, LAYOUT, tokens, weight_spans=[WeightSpan(0, "0")], rows_checked=True
            )  # as the embedded engine, whose commit has looked at them
            self.finished.append((began, time.perf_counter()))
        logprobs = [0.0] * len(running.output)
        running.future.set_result(GenerateResult(running.prompt, running.output, logprobs, reason, "0", trace))

    def abort(self, request_id: str | None = None) -> None:
        """End one or all as they are."""
        for name in [request_id] if request_id is not None else list(self._running):
            running = self._running.pop(name, None)
            if running is not None:
                self._finishing.submit(self._finish, running, "abort")

    def read_routes(self, generation: Generation, sequence: int, output_tokens: Sequence[int], start: int) -> None:
        """No deltas."""

    def pause(self) -> None:
        """Not here."""

    def resume(self) -> None:
        """Not here."""

    def update_weights(self, weights: str | Mapping[str, Any], version: str) -> None:
        """Not here."""

    def is_healthy(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing to do."""


class Watch:
    """ASGI middleware that notes when bodies were handed on, and how late the event loop wakes up."""

    def __init__(self, app: ASGIApp, seen: dict[str, list[Any]]) -> None:
        self._app, self._seen = app, seen
        self._waking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._waking = self._waking or asyncio.create_task(self._wake())
        path, number = scope.get("path"), id(send)

        async def send_noted(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                now = time.perf_counter()
                if path == "/generate_stream" and message.get("body"):
                    self._seen["events"].append((number, now))
                elif path == "/generate":
                    self._seen["sent"].append(now)

        await self._app(scope, receive, send_noted)

    async def _wake(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(WAKE)
            now = time.perf_counter()
            self._seen["late"].append((now, now - before - WAKE))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    engine, config = Clockwork(), ServerConfig(port=args.port, shutdown_seconds=0)
    seen: dict[str, list[Any]] = {"events": [], "sent": [], "late": [], "finished": engine.finished}
    app = create_app(engine, config=config)
    app.add_middleware(Watch, seen=seen)

    @app.post("/watched")
    async def watched() -> dict[str, list[Any]]:
        taken = {name: list(noted) for name, noted in seen.items()}
        for noted in seen.values():
            noted.clear()
        return taken

    serve(app, config)


if __name__ == "__main__":
    main()
