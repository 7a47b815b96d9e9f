"""Which rows are wrong, in words."""

from __future__ import annotations

import numpy as np

_CHUNKS = [1 << power for power in range(13, 3, -1)]


def place_of(rows_T: np.ndarray, start: int, prompt_length: int, cached: int) -> str:
    """Say which of the rows of a sequence are meant.

    Args:
        rows_T: `[T]` bool.
        start: position of row 0.
        prompt_length: P.
        cached: how many first tokens may have come from a cache.
    """
    positions = start + np.flatnonzero(rows_T)
    rows, count, end = len(rows_T), len(positions), start + len(rows_T)
    first, last = int(positions[0]), int(positions[-1])
    if count == rows:
        return "in all rows" if rows > 1 else "in the only row"
    if count == 1:
        if first == end - 1:
            return "in the last row"
        if first == prompt_length - 1:
            return "in the last prompt row"
    if start == 0 and cached > 1 and first == 0 and last == count - 1 and cached - 16 < count <= cached:
        return f"in the {count} rows of a prefix asked before"
    if first == start and last == min(prompt_length, end) - 1 and count == last - start + 1:
        return "in all prompt rows"
    if first == prompt_length and last == end - 1 and count == end - prompt_length:
        return "in all generated rows"
    chunk = _chunk(positions)
    if chunk:
        return f"at multiples of {chunk}" if count > 1 else f"at position {first}, a multiple of {chunk}"
    if count == 1:
        return ""
    if last - first == count - 1:
        return f"at positions {first} to {last}"
    return f"in {count} of {rows} rows, positions {first} to {last}"


def _chunk(positions: np.ndarray) -> int | None:
    """The largest power of two, 16 at least, of which all positions are multiples."""
    if positions[0] == 0:
        return None
    return next((chunk for chunk in _CHUNKS if not (positions % chunk).any()), None)
