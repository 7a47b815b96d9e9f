"""Ranks of sets equal their slow twin for every shape, and every rank is exactly one set's."""

from __future__ import annotations

from itertools import combinations
from math import comb, log2

import numpy as np
import pytest
from traces import refused

from moetrace.codecs import slow
from moetrace.codecs.subsets import LIMB_BITS, Subsets, limb_bits
from moetrace.errors import FormatError

SHAPES = [(8, 2), (32, 4), (128, 8), (256, 8), (257, 9), (384, 8), (512, 10), (512, 22), (1024, 1), (1024, 2)]
ODD_SHAPES = [
    (1024, 40),
    (64, 32),
    (300, 150),
    (1023, 511),
    (1024, 512),
    (1024, 1000),
    (1024, 1023),
    (1024, 1024),
    (1, 1),
]


def random_sets(num_experts: int, top_k: int, n: int) -> np.ndarray:
    """`[n, K]` in random order; the first and the last set of all are among them."""
    rng = np.random.default_rng(num_experts * 1025 + top_k)
    ids = np.argsort(rng.random((n, num_experts)), axis=1)[:, :top_k]
    ids[0], ids[1] = np.arange(top_k), np.arange(num_experts - top_k, num_experts)[::-1]
    return ids.astype(np.uint8 if num_experts <= 256 else np.uint16)


def whole(limbs: list[np.ndarray], n: int) -> list[int]:
    return [sum(int(limb[i]) << LIMB_BITS * at for at, limb in enumerate(limbs)) for i in range(n)]


def ids_from(subsets: Subsets, ranks: list[int]) -> np.ndarray:
    mask = (1 << LIMB_BITS) - 1
    limbs = [np.array([rank >> LIMB_BITS * at & mask for rank in ranks], float) for at in range(len(subsets.limb_bits))]
    out = np.full((len(ranks), subsets.top_k), -1)
    subsets.ids(limbs, out)
    return out


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES + ODD_SHAPES)
def test_ranks_equal_their_slow_twin_and_come_back(num_experts: int, top_k: int) -> None:
    subsets = Subsets.of(num_experts, top_k)
    ids_NK = random_sets(num_experts, top_k, 60 if top_k > 100 else 400)
    ranks = whole(subsets.ranks(ids_NK), len(ids_NK))
    assert ranks == [slow.rank(ids) for ids in ids_NK.tolist()]
    assert ranks[:2] == [0, comb(num_experts, top_k) - 1]
    np.testing.assert_array_equal(ids_from(subsets, ranks), np.sort(ids_NK, axis=1))


@pytest.mark.parametrize("num_experts", range(1, 13))
def test_every_rank_is_exactly_one_set(num_experts: int) -> None:
    for top_k in range(1, num_experts + 1):
        expected = sorted(combinations(range(num_experts), top_k), key=lambda ids: ids[::-1])
        subsets = Subsets.of(num_experts, top_k)
        assert [tuple(ids) for ids in ids_from(subsets, list(range(len(expected)))).tolist()] == expected
        assert whole(subsets.ranks(np.array(expected, np.uint8)), len(expected)) == list(range(len(expected)))


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (384, 8), (512, 10), (1024, 40)])
def test_ranks_beside_every_power_and_weight_come_back(num_experts: int, top_k: int) -> None:
    """Where a float64 or a lookup could be off by one: around powers of two and around C(c, k)."""
    total = comb(num_experts, top_k)
    interesting = [1 << bit for bit in range(total.bit_length())]
    interesting += [comb(c, k) for k in {1, 2, 3, top_k - 1, top_k} for c in range(num_experts)]
    ranks = sorted({rank + by for rank in interesting for by in (-1, 0, 1) if 0 <= rank + by < total})
    subsets = Subsets.of(num_experts, top_k)
    out = ids_from(subsets, ranks)
    assert (np.diff(out, axis=1) > 0).all()
    assert [slow.rank(ids) for ids in out.tolist()] == ranks
    assert [slow.ids_of(rank, top_k) for rank in ranks[::100]] == out[::100].tolist()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (384, 8), (512, 10), (1024, 300)])
def test_a_rank_of_no_set_is_refused(num_experts: int, top_k: int) -> None:
    subsets, total = Subsets.of(num_experts, top_k), comb(num_experts, top_k)
    assert ids_from(subsets, [total - 1]).tolist() == [list(range(num_experts - top_k, num_experts))]
    for rank in (total, (1 << sum(subsets.limb_bits)) - 1):
        with refused(FormatError, "belongs to no set", expected=f"less than C({num_experts}, {top_k})", fix="again"):
            ids_from(subsets, [0, rank])


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_a_set_costs_its_information_rounded_up_to_bits(num_experts: int, top_k: int) -> None:
    width = sum(limb_bits(num_experts, top_k))
    assert width - 1 < log2(comb(num_experts, top_k)) <= width
    assert max(limb_bits(num_experts, top_k)) <= LIMB_BITS
