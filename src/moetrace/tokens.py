"""Token ids of one sequence: their hash, and where two sequences part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moetrace.errors import InvalidTraceError


def token_sha256(tokens: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) over token ids as little-endian uint32, so that every language computes the same value."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").tobytes()).hexdigest()


def require_token_ids(tokens: np.ndarray) -> np.ndarray:
    """Token ids of one sequence, as the hash can tell them apart."""
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < 1 << 32):
        raise InvalidTraceError(
            "tokens must be the ids of one sequence", expected="1 axis, 0 <= id < 2**32", got=f"shape {tokens.shape}"
        )
    return tokens


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Position of the first unequal id of two 1-D arrays over their common length, or None."""
    n = min(len(a), len(b))
    unequal = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(unequal[0]) if len(unequal) else None
