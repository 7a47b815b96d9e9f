"""Sort the K ids of many routes at once. Axes: N routes, K experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_BLOCK_IDS = 1 << 17
_NETWORK_LIMIT = 32
"""Up to this K a network of whole-column comparisons is faster than sorting row by row."""


def sorted_columns(ids_NK: np.ndarray) -> np.ndarray:
    """The ids of each route in ascending order, one column after the other: `[K, N]`, C order, same dtype."""
    top_k = ids_NK.shape[1]
    if top_k > _NETWORK_LIMIT:
        return np.ascontiguousarray(np.sort(ids_NK, axis=1).T)
    columns_KN = np.array(ids_NK.T, order="C")
    lower = np.empty_like(columns_KN[0])
    for i, j in _network(top_k):
        np.minimum(columns_KN[i], columns_KN[j], out=lower)
        np.maximum(columns_KN[i], columns_KN[j], out=columns_KN[j])
        columns_KN[i] = lower
    return columns_KN


def first_repeat(ids_NK: np.ndarray) -> int | None:
    """The first route that names an id twice, or None."""
    columns_KN = sorted_columns(ids_NK)
    repeats_N = (columns_KN[1:] == columns_KN[:-1]).any(axis=0)
    return int(repeats_N.argmax()) if repeats_N.any() else None


def ascending(experts_TLK: np.ndarray) -> np.ndarray:
    """A copy in which the ids of every route ascend."""
    result = np.array(experts_TLK, order="C")
    for block_NK in _blocks(result):
        block_NK[:] = sorted_columns(block_NK).T
    return result


def is_ascending(experts_TLK: np.ndarray) -> bool:
    """Whether the ids of every route ascend (or repeat)."""
    top_k = experts_TLK.shape[-1]
    for block_NK in _blocks(experts_TLK):
        ids = block_NK.reshape(-1)
        rises = ids[1:] >= ids[:-1]
        rises[top_k - 1 :: top_k] = True  # from one route to the next
        if not rises.all():
            return False
    return True


def _blocks(experts_TLK: np.ndarray) -> Iterator[np.ndarray]:
    """`[N, K]` views of so few routes that work on them stays in a core's cache."""
    top_k = experts_TLK.shape[-1]
    ids_NK, step = experts_TLK.reshape(-1, top_k), max(1, _BLOCK_IDS // top_k)
    return (ids_NK[first : first + step] for first in range(0, len(ids_NK), step))


@lru_cache
def _network(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs to compare and exchange, in order: Batcher's merge exchange (Knuth, TAOCP 5.2.2, algorithm M)."""
    return tuple(_merge_exchange(n))


def _merge_exchange(n: int) -> Iterator[tuple[int, int]]:
    top = 1 << max((n - 1).bit_length() - 1, 0)
    p = top if n > 1 else 0
    while p:
        q, r, distance = top, 0, p
        while True:
            yield from ((i, i + distance) for i in range(n - distance) if i & p == r)
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
