"""`RowStore`: the rows behind the keys and values that an engine's KV cache holds now.

Axes: S slots (one for each token the cache can hold), G pages, N tokens of a step, L MoE layers, K experts per token.
A slot is a page times its size plus an offset; a sequence's position p lies in page `table[p // page_size]`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from moetrace.layout import MoeLayout
from moetrace.recorder.commit import NO_TOKEN, StepSlots, commit_rows
from moetrace.recorder.staging import Staging


class RowStore:
    """Rows `[S, L * K]` on the engine's device, each with the token it was computed for and its weights' version.

    Attributes:
        nbytes: bytes on the device.

    A row goes where its key and value go, in the step that computes them. So whoever is given a page, by a shared
    prefix or a fork, finds the rows that the page was computed with. Nothing here waits for the device.
    """

    def __init__(self, layout: MoeLayout, num_pages: int, page_size: int, device: torch.device) -> None:
        self.layout, self.page_size = layout, page_size
        row = layout.num_layers * layout.top_k
        dtype = torch.uint8 if layout.dtype == np.uint8 else torch.int16  # the bits are those of uint16
        self.rows_SR = torch.zeros(num_pages * page_size, row, dtype=dtype, device=device)
        self.marks_S2 = torch.full((num_pages * page_size, 2), NO_TOKEN, dtype=torch.int32, device=device)
        self.version_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self.nbytes: int = self.rows_SR.nbytes + self.marks_S2.nbytes
        # Streams for good: torch has 32 and hands them out in turn, so among many one would be the engine's own.
        on_gpu = device.type == "cuda"
        self._beside_steps, self._leaving = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def commit(self, staging: Staging, step: StepSlots) -> None:
        """Put the rows of a step's tokens into their slots: one kernel on the current stream, no padding token."""
        staging.require_room(len(step.tokens_N))
        commit_rows(staging.ids_LNK, step, self)

    def set_version(self, version: int) -> None:
        """Number the weights that rows are computed with from now on (in the order of the current stream)."""
        self.version_1.fill_(version)

    def forget(self) -> None:
        """Mark every slot as holding no row (in the order of the current stream)."""
        self.marks_S2.fill_(NO_TOKEN)

    def take(self, pages: Sequence[int], *, computed: bool = False) -> PulledPages:
        """Start to bring pages to the host, as they are now in the order of the current stream.

        Args:
            pages: which.
            computed: the host has seen the end of every step whose rows are wanted. They are gathered at once then,
                beside a step that may be running; what the current stream is given later waits for that.
        """
        beside = self._beside_steps if computed else None
        with torch.cuda.stream(beside) if beside else nullcontext():
            index_G = _index(pages, self.rows_SR.device)
            rows = self._by_page(self.rows_SR).index_select(0, index_G)
            pulled = PulledPages(self.layout, rows, self._marks().index_select(0, index_G), self._leaving)
        if beside:
            torch.cuda.current_stream(beside.device).wait_stream(beside)
        return pulled

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages, as the engine does when a request is forked."""
        source_G, target_G = (_index(pages, self.rows_SR.device) for pages in (sources, targets))
        for data in (self._by_page(self.rows_SR), self._marks()):
            data.index_copy_(0, target_G, data.index_select(0, source_G))

    def put_back(self, pages: Sequence[int], pulled: PulledPages, first: int) -> None:
        """Put pages `first`, `first + 1`, ... of what was taken into other pages, as the engine does with keys that it
        had moved to the host."""
        target_G, part = _index(pages, self.rows_SR.device), slice(first, first + len(pages))
        for data, source in ((self._by_page(self.rows_SR), pulled.rows), (self._marks(), pulled.marks)):
            if source.is_cuda:  # of another stream: it must stay when its reader has it on the host, until this is done
                source.record_stream(torch.cuda.current_stream(source.device))
            data.index_copy_(0, target_G, source[part].to(data.device, non_blocking=True))

    def _by_page(self, rows_SR: torch.Tensor) -> torch.Tensor:
        return rows_SR.view(-1, self.page_size * rows_SR.shape[1])

    def _marks(self) -> torch.Tensor:
        return self._by_page(self.marks_S2)


class PulledPages:
    """Pages on their way to the host. Whoever needs them first brings them over, on its own thread and on a stream for
    that (None on a CPU)."""

    def __init__(
        self, layout: MoeLayout, rows: torch.Tensor, marks: torch.Tensor, leaving: torch.cuda.Stream | None
    ) -> None:
        self._layout, self.rows, self.marks, self._leaving = layout, rows, marks, leaving
        self._lock = threading.Lock()
        self._arrived: tuple[np.ndarray, np.ndarray] | None = None
        self._computed = torch.cuda.current_stream(rows.device).record_event() if leaving else None

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[count * page_size, L, K]` of some pages and their marks `[count * page_size, 2]` (token, version);
        waits for the device."""
        with self._lock:
            if self._arrived is None:
                if self._leaving is not None:
                    self._arrive(self._leaving)
                self._arrived = self.rows.numpy().view(self._layout.dtype), self.marks.numpy()
        rows, marks = (pages[first : first + count] for pages in self._arrived)
        return rows.reshape(-1, self._layout.num_layers, self._layout.top_k), marks.reshape(-1, 2)

    def _arrive(self, leaving: torch.cuda.Stream) -> None:
        assert self._computed is not None
        self._computed.synchronize()  # here, not on the stream, where pages that are ready would wait behind these
        with torch.cuda.stream(leaving):
            arrived = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (self.rows, self.marks)]
            for host, device in zip(arrived, (self.rows, self.marks), strict=True):
                host.copy_(device, non_blocking=True)
        leaving.synchronize()
        self.rows, self.marks = arrived


def _index(pages: Sequence[int], device: torch.device) -> torch.Tensor:
    """Page numbers on the device, without waiting for it."""
    index_G = torch.tensor(pages, dtype=torch.int64)
    return index_G.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index_G
