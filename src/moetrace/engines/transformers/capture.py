"""Capture in the embedded engine: rows live beside the keys and values they were computed with, on the device.

    forward       the routers' own top-k writes expert ids to staging
    after it      one kernel narrows them and scatters them to their tokens' slots; both are part of the CUDA graph
    pages freed   the pages of a request that asked for routes are gathered, beside the step that runs and before the
                  next one can write there
    collect       another thread waits for them and puts the sequence together

Capture can be stopped, and started again, between two steps. While it is stopped no step commits and no slot is marked:
a mark always speaks of the key that is in its slot now.

Axes: L MoE layers, K experts per token, T rows of a sequence.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from moetrace.engines.transformers.continuous import BatchLoop
from moetrace.errors import CaptureError
from moetrace.recorder import PulledPages, RowStore, Staging, StepSlots
from moetrace.routers import tap_model
from moetrace.trace import Order, RoutingTrace, WeightSpan

logger = logging.getLogger(__name__)

_PULL_TIMEOUT_S = 60.0


@dataclass
class _Part:
    """Rows of positions `start <= p < start + count`, in pages `first, first + 1, ...` of what was pulled."""

    start: int
    count: int
    pages: list[int]
    pulled: PulledPages | None = None
    first: int = 0


@dataclass
class _History:
    """The parts a request left behind, oldest first; where they overlap, the older one counts."""

    asked: bool = True
    parts: list[_Part] = field(default_factory=list)
    offloaded: _Part | None = None
    complete: threading.Event = field(default_factory=threading.Event)


@dataclass
class CapturedRows:
    """What was captured of one sequence: `[T, L, K]` ids, `[T]` validity, `[T]` int32 numbers of the weights."""

    experts_TLK: np.ndarray
    valid_T: np.ndarray
    versions_T: np.ndarray


@dataclass
class CaptureCounts:
    """What capture did since it started."""

    sequences: int = 0
    rows: int = 0
    missing_rows: int = 0
    errors: int = 0


class StepCapture:
    """Records every token of every request of one loop.

    Attributes:
        num_slots: rows there is room for: one for each token that the cache can hold.
        nbytes: bytes that capture holds on the device.
        is_on: whether steps commit.
        counts: what capture did since it started.

    Raises:
        CaptureError: the model keeps only a window of positions, and sequences may be longer.
    """

    def __init__(self, model: nn.Module, loop: BatchLoop, max_model_len: int) -> None:
        window = loop.pages.window
        if window is not None and max_model_len > window:
            raise CaptureError(
                "this model has sliding-window attention only: the engine forgets positions that left the window, and"
                " their routes with them",
                expected=f"max_model_len <= {window}",
                got=max_model_len,
                fix=f"Pass --max-model-len {window}.",
            )
        self._tap = tap_model(model)
        self._loop = loop
        self.layout = self._tap.layout
        self.fingerprint = self._tap.fingerprint
        self.counts = CaptureCounts()
        self.is_on = True
        self._staging = Staging(self.layout, loop.max_batch_tokens, loop.device)
        self._store = RowStore(self.layout, loop.pages.num_pages, loop.pages.page_size, loop.device)
        self.num_slots = len(self._store.rows_SR)
        self.nbytes: int = self._store.nbytes + self._staging.ids_LNK.nbytes
        self._histories: dict[str, _History] = {}
        self._queued: list[_Part] = []
        self._finished: list[_History] = []
        self._installed = ExitStack()
        self._installed.enter_context(self._tap.installed())  # once: a step must not walk the model's modules
        loop.listen(self)
        logger.info(
            "capture on: %d rows of %d + 8 bytes, %.1f MiB on %s; staging for %d tokens a step, %.1f MiB",
            self.num_slots,
            self.layout.row_bytes,
            self._store.nbytes / 2**20,
            loop.device,
            self._staging.capacity,
            self._staging.ids_LNK.nbytes / 2**20,
        )

    @property
    def order(self) -> Order:
        """Whether the captured ids are in rank order."""
        return self._staging.order

    def close(self) -> None:
        """Leave the model as it was."""
        self._installed.close()

    def watch(self, request_id: str) -> None:
        """Keep this request's rows when it gives its pages back; call `collect` or `drop` for it later."""
        self._histories[request_id] = _History()

    def drop(self, request_id: str) -> None:
        """Keep nothing of this request."""
        self._histories.pop(request_id, None)

    def set_version(self, version: int) -> None:
        """Number the weights of the steps from now on; to be called on the generation thread."""
        self._store.set_version(version)

    def start(self) -> None:
        """Commit from the next step on. Pages that exist now hold no rows: `BatchLoop.forget_prefixes` goes with it. To
        be called on the generation thread."""
        self.is_on = True

    def stop(self) -> None:
        """Commit no more. Watched requests keep the rows they have; those they compute until `start` will be missing.
        To be called on the generation thread, between two steps, on the compute stream."""
        if not self.is_on:
            return
        for request_id, (pages, computed) in self._loop.running().items():
            if request_id in self._histories:
                self._queue(self._histories[request_id], self._part(pages, computed))
        self.settle()
        self._store.forget()
        self.is_on = False

    def collect(self, request_id: str, inputs: Sequence[int] | np.ndarray) -> CapturedRows:
        """Take away the rows of a watched request that is over: one for each token that was an input."""
        history = self._histories[request_id]
        if not history.complete.wait(_PULL_TIMEOUT_S):
            raise CaptureError(f"the rows of {request_id} never left the engine", got=f"{_PULL_TIMEOUT_S:.0f} s")
        del self._histories[request_id]
        rows = self.assemble(history.parts, inputs)
        self.counts.sequences += 1
        self.counts.rows += len(rows.valid_T)
        self.counts.missing_rows += int((~rows.valid_T).sum())
        return rows

    def trace_of(
        self,
        rows: CapturedRows,
        tokens: Sequence[int] | np.ndarray,
        engine: str,
        weight_spans: Sequence[WeightSpan] = (),
    ) -> RoutingTrace:
        """The trace of captured rows, recorded on these tokens."""
        return RoutingTrace.build(
            rows.experts_TLK,
            self.layout,
            tokens,
            valid_T=rows.valid_T,
            weight_spans=weight_spans,
            order=self.order,
            fingerprint=self.fingerprint,
            engine=engine,
            rows_checked=True,  # by the commit
        )

    def peek(self, request_id: str, start: int, stop: int) -> list[_Part] | None:
        """What there is of positions `start <= p < stop` of a watched request that still runs, for `assemble`; None
        when it is over. To be called on the generation thread, on the compute stream."""
        history = self._histories.get(request_id)
        if history is None:
            return None
        self.settle()
        size = self._store.page_size
        pages, computed = self._loop.pages_of(request_id)
        first, stop = start // size, min(stop, computed)
        pages = pages[first : -(-stop // size)]
        here = [_Part(first * size, stop - first * size, pages, self._store.take(pages))] if pages else []
        return [*history.parts, *here]

    def assemble(self, parts: Sequence[_Part], inputs: Sequence[int] | np.ndarray) -> CapturedRows:
        """One row for each token that was an input, from settled parts, oldest first. A row counts only if its slot was
        written for that very token, and a position counts as its oldest part has it: where that has no row, a later
        one is not of the computation that the token was sampled from."""
        num_rows = len(inputs)
        rows = CapturedRows(
            np.zeros((num_rows, self.layout.num_layers, self.layout.top_k), self.layout.dtype),
            np.zeros(num_rows, bool),
            np.zeros(num_rows, np.int32),
        )
        tokens_T = np.asarray(inputs)
        for part in reversed(parts):  # the oldest last: its rows stay
            if part.pulled is None:
                raise CaptureError("the engine stopped before these rows had left it", fix="Send the request again.")
            experts_TLK, marks_T2 = part.pulled.read(part.first, len(part.pages))
            count = max(min(part.count, num_rows - part.start), 0)
            there = slice(part.start, part.start + count)
            valid_T = marks_T2[:count, 0] == tokens_T[there]
            rows.experts_TLK[there] = experts_TLK[:count]
            if not valid_T.all():
                rows.experts_TLK[there][~valid_T] = 0
            rows.versions_T[there] = marks_T2[:count, 1]
            rows.valid_T[there] = valid_T
        rows.experts_TLK.flags.writeable = False  # so that a trace need not copy it
        return rows

    # From here on: what the loop tells (see PageListener), on the generation thread.

    def forwards(self) -> AbstractContextManager[None]:
        return self._tap.active(self._staging)

    def after_forward(self, step: StepSlots) -> None:
        if self.is_on:
            self._store.commit(self._staging, step)

    def settle(self, computed: bool = False) -> None:
        try:
            if self._queued:
                pulled = self._store.take([page for part in self._queued for page in part.pages], computed=computed)
                first = 0
                for part in self._queued:
                    part.pulled, part.first = pulled, first
                    first += len(part.pages)
                self._queued = []
        finally:  # whatever went wrong ends the loop, and nobody may wait for rows that will not come
            for history in self._finished:
                history.complete.set()
            self._finished = []

    def freed(self, request_id: str, pages: list[int], computed: int | None, over: bool) -> None:
        history = self._histories.get(request_id)
        if history is None and self._loop.offloads_to_host and not over:
            history = self._histories[request_id] = _History(asked=False)  # its pages may come back, and be shared
        if history is None:
            return
        part = self._part(pages, computed)
        self._queue(history, part)
        if not over:
            history.offloaded = part if pages else history.offloaded  # some releases give pages back twice
        elif history.asked:
            self._finished.append(history)
        else:
            del self._histories[request_id]

    def replaced(self, request_id: str, index: int, page: int) -> None:
        history = self._histories.get(request_id)
        if history is not None:
            self._queue(history, _Part(index * self._store.page_size, self._store.page_size, [page]))

    def copied(self, sources: list[int], targets: list[int]) -> None:
        self.settle()  # a target may be a page that was given back a moment ago
        if self.is_on:
            self._store.copy(sources, targets)

    def restored(self, request_id: str, pages: list[int]) -> None:
        self.settle()
        history = self._histories.get(request_id)
        part = history.offloaded if history is not None else None
        if part is not None and part.pulled is not None and self.is_on:
            self._store.put_back(pages[: len(part.pages)], part.pulled, part.first)

    def _part(self, pages: list[int], computed: int | None) -> _Part:
        capacity = len(pages) * self._store.page_size
        return _Part(0, capacity if computed is None else min(computed, capacity), pages)

    def _queue(self, history: _History, part: _Part) -> None:
        if part.pages and part.count:
            history.parts.append(part)
            self._queued.append(part)
