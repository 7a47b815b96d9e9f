"""Rows while an engine is still producing them: of a sequence (first write wins), of KV pages (last write wins).

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moetrace.layout import MoeLayout


class SequenceRows:
    """A growing, write-once store of one sequence's rows.

    The row that produced a sampled token's log-probability is the row that counts: when an engine computes a position
    again (resuming after preemption), the first row stays.
    """

    def __init__(self, layout: MoeLayout, capacity: int = 64) -> None:
        self._experts_TLK = np.zeros((capacity, layout.num_layers, layout.top_k), layout.dtype)
        self._valid_T = np.zeros(capacity, bool)

    def write(self, start: int, rows_TLK: np.ndarray) -> None:
        """Keep rows for the positions from `start` on, except where a row is already kept."""
        stop = start + len(rows_TLK)
        self._reserve(stop)
        new_T = ~self._valid_T[start:stop]
        self._experts_TLK[start:stop][new_T] = rows_TLK[new_T]
        self._valid_T[start:stop] = True

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of `experts_TLK` and `valid_T` for a range of positions; what has no row is zero and not valid."""
        self._reserve(stop)
        return self._experts_TLK[start:stop].copy(), self._valid_T[start:stop].copy()

    def _reserve(self, stop: int) -> None:
        if stop > len(self._valid_T):
            extra = max(stop, 2 * len(self._valid_T)) - len(self._valid_T)
            self._experts_TLK = np.pad(self._experts_TLK, ((0, extra), (0, 0), (0, 0)))
            self._valid_T = np.pad(self._valid_T, (0, extra))


class PagedRows:
    """The rows behind the keys and values that KV pages hold now.

    A row goes where its key and value go, each time they are computed. When an engine gives a page to another sequence,
    these are the rows that sequence's prefix was routed by. Every row keeps its token: one that was computed for
    another token than expected is not there.
    """

    def __init__(self, layout: MoeLayout, page_size: int) -> None:
        self._layout, self.page_size = layout, page_size
        self._experts: dict[int, np.ndarray] = {}
        self._tokens: dict[int, np.ndarray] = {}

    def write(self, pages: Sequence[int], start: int, tokens: Sequence[int], rows_TLK: np.ndarray) -> None:
        """Set the rows of the positions from `start` on, in a sequence that lies in `pages`."""
        for page, here, offset, count in self._parts(pages, start, len(rows_TLK)):
            if page not in self._experts:
                shape = (self.page_size, self._layout.num_layers, self._layout.top_k)
                self._experts[page] = np.zeros(shape, self._layout.dtype)
                self._tokens[page] = np.full(self.page_size, -1, np.int64)
            self._experts[page][offset : offset + count] = rows_TLK[here : here + count]
            self._tokens[page][offset : offset + count] = tokens[here : here + count]

    def copy_to(self, rows: SequenceRows, pages: Sequence[int], tokens: Sequence[int]) -> int:
        """Give a sequence the rows of its first `len(tokens)` positions, as far as they are here; returns how many."""
        copied = 0
        for page, here, offset, count in self._parts(pages, 0, len(tokens)):
            kept = self._tokens.get(page)
            if kept is not None and (kept[offset : offset + count] == tokens[here : here + count]).all():
                rows.write(here, self._experts[page][offset : offset + count])
                copied += count
        return copied

    def _parts(self, pages: Sequence[int], start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(physical page, index of its first row here, offset in the page, rows) of a run of positions."""
        done = 0
        while done < count and (start + done) // self.page_size < len(pages):
            number, offset = divmod(start + done, self.page_size)
            size = min(count - done, self.page_size - offset)
            yield pages[number], done, offset, size
            done += size
