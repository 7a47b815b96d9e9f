"""From what continuous batching says of its requests to the futures of those who wait, off the generation thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrace.engines.requests import FinishReason, GenerateResult
from moetrace.engines.transformers.capture import CapturedRows, StepCapture
from moetrace.engines.transformers.pending import NewWeights, Pending
from moetrace.engines.transformers.prompt_scores import PromptScorer
from moetrace.errors import EngineError
from moetrace.trace import RoutingTrace, WeightSpan

logger = logging.getLogger(__name__)

_MOST_PATIENCE_S = 0.05
"""More than the host needs for a step of hundreds of sequences; less than a CUDA graph takes to be captured."""


class Delivery:
    """Who waits for which sequence, and the thread that answers them.

    Args:
        manager: a `ContinuousBatchingManager`.
        capture: where rows come from, or None.
        scorer: where log-probabilities of prompts come from.
        versions: names of the weights so far, by their number; the engine appends to it.
        engine_name: as traces carry it.
        at_rest: set while the generation thread would not miss Python's lock. Traces are put together then, if that
            comes soon: dozens of numpy calls each, which take the lock from it and give it back one by one.

    Attributes:
        pending: sequences that somebody waits for, by the name that continuous batching gives them.
        lock: held while `pending` changes.
    """

    def __init__(
        self,
        manager: Any,
        capture: StepCapture | None,
        scorer: PromptScorer,
        versions: list[str],
        engine_name: str,
        at_rest: threading.Event,
    ) -> None:
        self._manager, self._capture, self._scorer = manager, capture, scorer
        self._versions, self._engine_name, self._at_rest = versions, engine_name, at_rest
        self.pending: dict[str, Pending] = {}
        self.lock = threading.Lock()
        self._is_over = False
        self._thread = threading.Thread(target=self._deliver, name="moetrace-deliver", daemon=True)
        self._thread.start()

    def is_healthy(self) -> bool:
        """True while the generation thread and this one live."""
        running = self._manager.is_running() and self._manager.background_thread_status.fatal_error is None
        return running and not self._is_over

    def join(self) -> None:
        """Wait until the engine has stopped and everybody was answered."""
        self._thread.join()

    def trace_of(self, rows: CapturedRows, tokens: Sequence[int] | np.ndarray) -> RoutingTrace:
        """The trace of captured rows, recorded on these tokens."""
        assert self._capture is not None
        return self._capture.trace_of(rows, tokens, self._engine_name, self._weight_spans(rows))

    def _deliver(self) -> None:
        try:
            self._deliver_all()
        finally:  # whatever ended this, nobody may wait for ever
            self._fail_pending(EngineError("the engine stopped before this request was done", fix="Send it again."))

    def _deliver_all(self) -> None:
        version, due = self._versions[0], 0.0
        traced: list[tuple[Any, str]] = []  # finished, and the weights then
        while True:
            healthy = self.is_healthy()  # asked first: what an engine delivered before it stopped is there then
            output = self._manager.get_result(timeout=0 if traced else 0.05)
            if isinstance(output, NewWeights):
                version = output.version
            elif output is not None and not output.is_finished():
                self._proceed(output)
            elif output is not None and self._has_trace(output):
                due = due if traced else time.monotonic() + _MOST_PATIENCE_S
                traced.append((output, version))
            elif output is not None:
                self._finish(output, version)
            elif not traced and not healthy:
                break
            if traced and (output is None or time.monotonic() >= due):
                self._at_rest.wait(max(due - time.monotonic(), 0))
                for finished in traced:
                    self._finish(*finished)
                traced = []

    def _has_trace(self, output: Any) -> bool:
        pending = self.pending.get(output.request_id)
        return self._capture is not None and pending is not None and pending.return_routes

    def _proceed(self, output: Any) -> None:
        """A sequence has a new token: end it if that completes a stop, else tell who wants to know."""
        pending = self.pending.get(output.request_id)
        if pending is None or pending.failure is not None:
            return
        try:
            is_over = pending.stops.found(output.generated_tokens)
        except Exception as error:  # one request's tokenizer must not end the delivery of others
            pending.failure, is_over = error, True
        if is_over:
            self._manager.cancel_request(output.request_id)
        elif pending.on_progress is not None:
            try:
                pending.on_progress(output.generated_tokens, output.logprobs)
            except Exception:  # one request's listener must not end the delivery of others
                logger.exception("%s: its listener failed and is told no more", output.request_id)
                pending.on_progress = None

    def _finish(self, output: Any, version: str) -> None:
        with self.lock:
            pending = self.pending.pop(output.request_id, None)
            if pending is None:
                return
        try:
            if pending.failure is not None:
                raise pending.failure
            if output.error is not None:
                raise EngineError(f"the engine failed this request ({output.error})", fix="Send it again.")
            pending.future.set_result(self._result(output, pending, version))
        except Exception as error:  # one request's failure must reach its client, and no other
            pending.future.set_exception(error)
        finally:
            self._scorer.drop(output.request_id)
            if self._capture:
                self._capture.drop(output.request_id)

    def _result(self, output: Any, pending: Pending, version: str) -> GenerateResult:
        most = pending.sampling.max_new_tokens
        was_cut = pending.aborted and len(output.generated_tokens) < max(most, 1)
        generated = list(output.generated_tokens)[:most]
        reason: FinishReason = "length"
        if pending.stops.found(generated):
            generated, reason = generated[: pending.stops.length], "stop"
        elif generated and generated[-1] in pending.stop_ids:
            reason = "stop"
        elif was_cut:
            reason = "abort"
        trace = None
        if self._capture and pending.return_routes:
            tokens = np.array(pending.prompt + generated)
            inputs = tokens if pending.sampling.is_scoring else tokens[:-1]
            try:
                trace = self.trace_of(self._capture.collect(output.request_id, inputs), tokens)
            except Exception:
                self._capture.counts.errors += 1
                raise
            version = trace.weight_spans[-1].version if trace.weight_spans else version
        logprobs = list(output.logprobs)[: len(generated)]
        prompt_logprobs = self._prompt_logprobs(pending, reason)
        return GenerateResult(pending.prompt, generated, logprobs, reason, version, trace, prompt_logprobs)

    def _prompt_logprobs(self, pending: Pending, reason: FinishReason) -> list[float | None] | None:
        if pending.scores is None:
            return None
        if reason != "abort" and not pending.scores.is_complete:
            raise EngineError("log-probabilities of the prompt are missing", fix="Open an issue with the model's name.")
        return pending.scores.values()

    def _weight_spans(self, rows: CapturedRows) -> list[WeightSpan]:
        """Runs of equal weights; a row that is missing goes with the one before it."""
        valid = np.flatnonzero(rows.valid_T)
        versions = rows.versions_T[valid]
        if not len(valid):
            return []
        changes = np.flatnonzero(versions[1:] != versions[:-1]) + 1
        return [
            WeightSpan(0, self._versions[int(versions[0])]),
            *(WeightSpan(int(valid[change]), self._versions[int(versions[change])]) for change in changes),
        ]

    def _fail_pending(self, error: EngineError) -> None:
        with self.lock:  # under which requests come in: none does after this
            self._is_over = True
            pending, self.pending = self.pending, {}
        for request in pending.values():
            request.future.set_exception(error)
