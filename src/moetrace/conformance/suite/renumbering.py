"""Physical ids: whether one renumbering of the experts explains what nothing else does, over all answers together.

Axes: T rows, L MoE layers, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST_PAIRS = 3
"""Times that each expert must have been seen on average: fewer pairs fit too many renumberings."""
_LEAST_FIT = 0.95


def renumbering(
    wants: Sequence[np.ndarray], gots: Sequence[np.ndarray], num_experts: int
) -> tuple[list[dict[int, int]], str] | None:
    """For each layer the number that each expert has instead, and what that is in words; None if there is none.

    Args:
        wants, gots: `[T, L, K]` rows as they should be and as they came, of wrong answers.
        num_experts: E.
    """
    if not wants:
        return None
    want_TLK, got_TLK = np.concatenate(wants).astype(np.int64), np.concatenate(gots).astype(np.int64)
    maps = []
    for layer in range(want_TLK.shape[1]):
        experts, numbers = want_TLK[:, layer].ravel(), got_TLK[:, layer].ravel()
        pairs, counts = np.unique(np.stack([experts, numbers], 1), axis=0, return_counts=True)
        renumbered: dict[int, int] = {}
        for which in np.argsort(-counts):
            renumbered.setdefault(int(pairs[which, 0]), int(pairs[which, 1]))
        fit = np.array([renumbered[int(expert)] for expert in experts]) == numbers
        if fit.mean() < _LEAST_FIT or len(set(renumbered.values())) < len(renumbered):
            return None
        if len(experts) < _LEAST_PAIRS * len(renumbered):
            return None
        maps.append(renumbered)
    if all(number == expert for renumbered in maps for expert, number in renumbered.items()):
        return None
    return maps, _words(maps, num_experts)


def fits(want_TLK: np.ndarray, got_TLK: np.ndarray, maps: list[dict[int, int]]) -> bool:
    """Whether a renumbering explains these rows."""
    return all(
        maps[layer].get(int(expert)) == int(number)
        for layer in range(want_TLK.shape[1])
        for expert, number in zip(want_TLK[:, layer].ravel(), got_TLK[:, layer].ravel(), strict=True)
    )


def _words(maps: list[dict[int, int]], num_experts: int) -> str:
    offsets = {number - expert for renumbered in maps for expert, number in renumbered.items()}
    if len(offsets) == 1:
        return f"every id is {offsets.pop():+d}"
    joint: dict[int, int] = {}
    one = all(
        joint.setdefault(expert, number) == number for renumbered in maps for expert, number in renumbered.items()
    )
    top = max(number for renumbered in maps for number in renumbered.values())
    return ("one renumbering for all layers" if one else "a renumbering in each layer") + (
        f", up to {top} of {num_experts} experts" if top >= num_experts else ""
    )
