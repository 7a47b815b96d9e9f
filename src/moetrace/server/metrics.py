"""What Prometheus sees of the server. Every application has metrics of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moetrace.engines.base import Engine
from moetrace.engines.requests import GenerateResult
from moetrace.server.archive import ArchiveState

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one application.

    Args:
        engine: asked for its health when the metrics are.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        facts: dict[str, Any] = {"registry": self._registry, "namespace": "moetrace"}
        self._requests = Counter("requests", "HTTP requests answered", ["path", "status"], **facts)
        self._seconds = Histogram("request_seconds", "From request to response", ["path"], buckets=_LATENCIES, **facts)
        self._sequences = Counter("sequences", "Sequences finished", ["finish_reason"], **facts)
        self._prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished requests", **facts)
        self._output_tokens = Counter("output_tokens", "Output tokens of finished sequences", **facts)
        self._rows = Counter("route_rows", "Rows of routes returned", **facts)
        self._missing = Counter("route_rows_missing", "Rows of routes that were not captured", **facts)
        self._bytes = Counter("route_bytes", "Bytes of routes returned, before encoding", **facts)
        self._first = Histogram("first_token_seconds", "To a stream's first token", buckets=_LATENCIES, **facts)
        self._between = Histogram("between_tokens_seconds", "Between a stream's tokens", buckets=_LATENCIES, **facts)
        self._under_way = Gauge("requests_under_way", "Requests that wait for the engine", **facts)
        self._queued = Gauge("sequences_under_way", "Sequences that run or wait in the engine", **facts)
        healthy = Gauge("engine_healthy", "1 while the engine can serve", **facts)
        healthy.set_function(lambda: float(engine.is_healthy()))
        self._routing = _Routing(engine)
        self._registry.register(self._routing)

    def watch(self, requests: Callable[[], int], sequences: Callable[[], int]) -> None:
        """Where to look for how much is under way."""
        self._under_way.set_function(requests)
        self._queued.set_function(sequences)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; `path` is its route's, so that clients cannot invent labels."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def finished(self, sequences: Sequence[GenerateResult]) -> None:
        """The sequences of one prompt have finished."""
        self._prompt_tokens.inc(len(sequences[0].prompt_tokens))
        for sequence in sequences:
            self._sequences.labels(sequence.finish_reason).inc()
            self._output_tokens.inc(len(sequence.output_tokens))
            if sequence.trace is not None:
                self._rows.inc(sequence.trace.num_rows)
                self._missing.inc(sequence.trace.num_rows - sequence.trace.num_valid)
                self._bytes.inc(sequence.trace.experts_TLK.nbytes)

    def stream(self, began: float) -> Callable[[int], None]:
        """Call the result with their number whenever a sequence of a stream, which began then, has new tokens."""
        last, begun = began, False

        def arrived(count: int) -> None:
            nonlocal last, begun
            now = time.perf_counter()
            if count:
                (self._between if begun else self._first).observe((now - last) / (count if begun else 1))
                last, begun = now, True

        return arrived

    def text(self, archive: ArchiveState) -> bytes:
        """All metrics in Prometheus' text format."""
        self._routing.archive = archive
        return generate_latest(self._registry)


class _Routing:
    """What the engine and the archive count themselves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.archive: ArchiveState | None = None

    def collect(self) -> Iterator[Metric]:
        capture = self._engine.capture
        if capture is not None:
            yield GaugeMetricFamily("moetrace_capture_on", "1 while steps are recorded", float(capture.is_on))
            yield CounterMetricFamily("moetrace_capture_errors", "Sequences whose routes were lost", capture.errors)
        if self.archive is None:
            return
        yield GaugeMetricFamily("moetrace_archive_traces", "Traces kept for references", self.archive.traces)
        yield GaugeMetricFamily("moetrace_archive_bytes", "Bytes of traces kept", self.archive.num_bytes)
        yield GaugeMetricFamily("moetrace_archive_max_bytes", "Most bytes of traces", self.archive.max_bytes)
        for name, what in (
            ("deleted", "Traces that clients deleted"),
            ("expired", "Traces that became too old"),
            ("evicted", "Traces that had to go for newer ones"),
            ("unfetched", "Traces that expired or were evicted before anybody had read them"),
        ):
            yield CounterMetricFamily(f"moetrace_archive_{name}", what, getattr(self.archive, name))
