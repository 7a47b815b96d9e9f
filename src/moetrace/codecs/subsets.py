"""The rank of a set among all sets of its size: the combinatorial number system, for many sets at once.

The ids c_1 < c_2 < ... < c_K of a route have the rank C(c_1, 1) + C(c_2, 2) + ... + C(c_K, K), a number from 0 to
C(E, K) - 1, each of which belongs to exactly one set (Knuth, TAOCP 7.2.1.3, theorem L). The bits of the largest rank
are what a set costs: the information-theoretic size for uniform routing, rounded up to whole bits.

Axes: N sets (any leading axes when unranking), K ids each, W limbs. A rank is W limbs of 53 bits, least significant
first: whole numbers that float64 holds exactly, and of which 1024 can be summed in an int64. The way back finds, from
the highest id down, the largest c with C(c, k) <= what is left of the rank. The leading bits of that rest, read off its
float64 representation, index a table that knows c up to one; one exact comparison decides.

`Subsets.ids` works on numpy arrays and, once `on` a device, on torch tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np

from moetrace.errors import FormatError
from moetrace.sorting import sorted_columns

LIMB_BITS = 53
_BASE = 1 << LIMB_BITS
_ONE = int(np.float64(1).view(np.int64))
_SLACK = 2.0**-45
"""How far, relatively, the float64 of several limbs may be from their value, and then some."""


@dataclass(frozen=True)
class _Step:
    """How the k-th lowest id (k from 0) is written and found; its digit is d = id - k, 0 to E - K.

    Attributes:
        weights_WD: C(k + d, k + 1) as limbs, float64.
        shift: bits of a float64, counted from the right, that the lookup ignores.
        guesses: for each value of the other bits, the digit or the one below it, int64.
    """

    weights_WD: Any
    shift: int
    guesses: Any


@dataclass(frozen=True)
class Subsets:
    """All sets of `top_k` out of `num_experts`; make one with `Subsets.of`.

    Attributes:
        num_experts: E.
        top_k: K.
        limb_bits: bits of each limb of a rank, see `limb_bits`.
    """

    num_experts: int
    top_k: int
    limb_bits: tuple[int, ...]
    _steps: tuple[_Step, ...]

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, num_experts: int, top_k: int) -> Subsets:
        """Tables for 1 <= K <= E; a few milliseconds for usual shapes, seconds for thousand-bit ranks."""
        steps = tuple(_make_step(k, num_experts - top_k + 1) for k in range(top_k))
        return cls(num_experts, top_k, limb_bits(num_experts, top_k), steps)

    def on(self, table: Callable[[np.ndarray], Any]) -> Subsets:
        """These tables with every array replaced by `table(array)`."""
        steps = (_Step(table(step.weights_WD), step.shift, table(step.guesses)) for step in self._steps)
        return Subsets(self.num_experts, self.top_k, self.limb_bits, tuple(steps))

    def ranks(self, ids_NK: np.ndarray) -> list[np.ndarray]:
        """The rank of each set, as W limbs `[N]` int64.

        Args:
            ids_NK: `[N, K]` uint8 or uint16, K distinct ids below E, in any order.
        """
        limbs = [np.zeros(len(ids_NK), np.int64) for _ in self.limb_bits]
        for k, ids_N in enumerate(sorted_columns(ids_NK)):
            digits_N = ids_N.astype(np.int64) - k
            for limb, weights_D in zip(limbs, self._steps[k].weights_WD, strict=False):
                limb += weights_D.take(digits_N).astype(np.int64)
        for lower, higher in pairwise(limbs):
            higher += lower >> LIMB_BITS
            lower &= _BASE - 1
        return limbs

    def ids(self, limbs: list[Any], out: Any) -> None:
        """The sets that have these ranks, their ids ascending.

        Args:
            limbs: W limbs `[..., N]` float64, whole numbers; overwritten.
            out: `[..., N, K]` of any integer dtype, filled in place.

        Raises:
            FormatError: a rank is not below C(E, K).
        """
        if not limbs:  # K = E: there is one set only
            for k in range(self.top_k):
                out[..., k] = k
            return
        limit = _limbs([comb(self.num_experts, self.top_k)], len(limbs))[:, 0].tolist()
        if _at_least(limbs, limit).any():
            raise FormatError(
                "a rank belongs to no set of experts",
                expected=f"less than C({self.num_experts}, {self.top_k})",
                fix="The bytes were not written by this codec; write them again.",
            )
        for k in range(self.top_k - 1, 0, -1):
            step = self._steps[k]
            rest = limbs[: len(step.weights_WD)]
            leading = _approximate(rest) + 1
            digits = step.guesses.take((leading.view(step.guesses.dtype) - _ONE) >> step.shift)
            digits += _at_least(rest, [weights_D.take(digits + 1) for weights_D in step.weights_WD])
            _subtract(rest, [weights_D.take(digits) for weights_D in step.weights_WD])
            out[..., k] = digits + k
        out[..., 0] = limbs[0]


@lru_cache(maxsize=1024)
def limb_bits(num_experts: int, top_k: int) -> tuple[int, ...]:
    """Bits of each limb of the largest rank, C(E, K) - 1, least significant first; empty where K = E."""
    width = (comb(num_experts, top_k) - 1).bit_length()
    return tuple(min(LIMB_BITS, width - at) for at in range(0, width, LIMB_BITS))


def _make_step(k: int, num_digits: int) -> _Step:
    """Tables of the k-th lowest id; one more digit than there is, so that the next one can always be looked at."""
    weights = [0, 1]
    for d in range(1, num_digits):
        weights.append(weights[-1] * (k + d + 1) // d)  # C(k + d + 1, k + 1)
    num_limbs = max(-(-(weights[-1] - 1).bit_length() // LIMB_BITS), 1)
    floats_D = np.array([float(weight) for weight in weights])
    slack = _SLACK if num_limbs > 1 else 0.0
    for shift in reversed(range(LIMB_BITS)):
        bins = (int(np.float64(floats_D[-1] + 1).view(np.int64)) - _ONE >> shift) + 1
        edges = ((np.arange(bins + 1) << shift) + _ONE).view(np.float64)
        lowest = np.searchsorted(floats_D, edges[:-1] * (1 - slack) - 1, "right") - 1
        highest = np.searchsorted(floats_D, edges[1:] * (1 + slack) - 1, "left") - 1
        guesses = lowest.clip(0, num_digits - 1)
        if (highest.clip(0, num_digits - 1) - guesses).max() <= 1:
            return _Step(_limbs(weights, num_limbs), shift, guesses)
    raise AssertionError("some digit has two neighbours within one float64")


def _limbs(numbers: list[int], num_limbs: int) -> np.ndarray:
    """Numbers as `[W, len(numbers)]` float64 limbs."""
    limbs = [[number >> at * LIMB_BITS & _BASE - 1 for number in numbers] for at in range(num_limbs)]
    return np.array(limbs, np.float64)


def _approximate(limbs: list[Any]) -> Any:
    """The float64 nearest to a number, but for a few units in its last place; exact for a single limb."""
    value = limbs[-1]
    for limb in reversed(limbs[:-1]):
        value = value * _BASE + limb
    return value


def _at_least(limbs: list[Any], other: list[Any]) -> Any:
    """Whether each number is >= the other, compared exactly."""
    result = limbs[0] >= other[0]
    for mine, theirs in zip(limbs[1:], other[1:], strict=True):
        result = (mine > theirs) | (mine == theirs) & result
    return result


def _subtract(limbs: list[Any], other: list[Any]) -> None:
    """Take the other from each number, which must be at least as large, in place."""
    for at, theirs in enumerate(other):
        limbs[at] -= theirs
        if at + 1 < len(limbs):
            borrow = limbs[at] < 0
            limbs[at] += borrow * float(_BASE)
            limbs[at + 1] -= borrow * 1.0
