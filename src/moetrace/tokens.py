"""Token ids of one sequence: their hash, and where two sequences part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moetrace.errors import InvalidTraceError


def token_sha256(tokens: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) over token ids as little-endian uint32, so that every language computes the same value.

    Raises:
        InvalidTraceError: they are not the ids of one sequence.
    """
    return sha256_of_ids(require_token_ids(as_token_ids(tokens)))


def sha256_of_ids(tokens: np.ndarray) -> str:
    """`token_sha256` of an array that `require_token_ids` has seen, or will see before the hash is used."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u4").tobytes()).hexdigest()


def as_token_ids(tokens: Sequence[int] | np.ndarray, *, copy: bool = False) -> np.ndarray:
    """Whole numbers as a 1-D int64 array; what is none is refused, not rounded.

    Args:
        copy: share no memory with the caller's array.

    Raises:
        InvalidTraceError: they are no whole numbers, or have other axes. Their range is not looked at.
    """
    try:
        ids = np.asarray(tokens)
    except (TypeError, ValueError) as error:
        raise InvalidTraceError(f"tokens must be the ids of one sequence ({error})", expected=_EXPECTED) from error
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):  # an empty list has no type of its own
        raise _wrong(ids)
    return ids.astype(np.int64, copy=copy and not isinstance(tokens, list | tuple))


def require_token_ids(tokens: np.ndarray) -> np.ndarray:
    """Token ids of one sequence, as the hash can tell them apart."""
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < 1 << 32):
        raise _wrong(tokens)
    return tokens


_EXPECTED = "1 axis of whole numbers, 0 <= id < 2**32"


def _wrong(tokens: np.ndarray) -> InvalidTraceError:
    got = f"shape {tokens.shape}, dtype {tokens.dtype}"
    return InvalidTraceError("tokens must be the ids of one sequence", expected=_EXPECTED, got=got)


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Position of the first unequal id of two 1-D arrays over their common length, or None."""
    n = min(len(a), len(b))
    unequal = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(unequal[0]) if len(unequal) else None
