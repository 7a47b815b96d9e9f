"""The rows of one sequence while an engine is still producing them.

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

import numpy as np

from moetrace.trace import MoeLayout


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

    def missing(self, start: int, stop: int) -> bool:
        """True if any position in `start <= position < stop` has no row yet."""
        self._reserve(stop)
        return not self._valid_T[start:stop].all()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of `experts_TLK` and `valid_T` for a range of positions; what has no row is zero and not valid."""
        self._reserve(stop)
        return self._experts_TLK[start:stop].copy(), self._valid_T[start:stop].copy()

    def _reserve(self, stop: int) -> None:
        if stop > len(self._valid_T):
            extra = max(stop, 2 * len(self._valid_T)) - len(self._valid_T)
            self._experts_TLK = np.pad(self._experts_TLK, ((0, extra), (0, 0), (0, 0)))
            self._valid_T = np.pad(self._valid_T, (0, extra))
