"""Sorting many routes at once equals sorting each."""

from __future__ import annotations

import numpy as np
import pytest

from moetrace import sorting
from moetrace.sorting import ascending, first_repeat, is_ascending, sorted_columns


@pytest.mark.parametrize("top_k", [*range(1, 36), 64, 200])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_columns_are_the_sorted_routes(top_k: int, dtype: type) -> None:
    rng = np.random.default_rng(top_k)
    ids_NK: np.ndarray = rng.integers(0, 256 if dtype is np.uint8 else 65_536, (300, top_k)).astype(dtype)
    before = ids_NK.copy()
    columns_KN = sorted_columns(ids_NK)
    assert columns_KN.T.tolist() == [sorted(ids) for ids in ids_NK.tolist()]
    assert columns_KN.flags.c_contiguous
    np.testing.assert_array_equal(ids_NK, before)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 40])
def test_the_first_repeat_is_found_wherever_it_is(top_k: int) -> None:
    ids_NK = np.argsort(np.random.default_rng(0).random((50, 60)), axis=1)[:, :top_k].astype(np.uint8)
    assert first_repeat(ids_NK) is None
    assert first_repeat(ids_NK[:0]) is None
    for a, b in [(0, top_k - 1), (top_k - 1, top_k // 2)]:
        broken_NK = ids_NK.copy()
        for route in (49, 31, 0):  # each before the one that was broken last
            broken_NK[route, a] = broken_NK[route, b]
            assert first_repeat(broken_NK) == (None if a == b else route)


@pytest.mark.parametrize("block", [1, 6, 7, 1 << 17])
def test_ascending_is_what_sorting_makes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_BLOCK_IDS", block)
    rng = np.random.default_rng(block)
    experts_TLK = np.argsort(rng.random((9, 2, 30)), axis=-1)[..., :3].astype(np.uint8)
    experts_TLK.flags.writeable = False
    sorted_TLK = ascending(experts_TLK)
    np.testing.assert_array_equal(sorted_TLK, np.sort(experts_TLK, axis=-1))
    assert is_ascending(sorted_TLK)
    assert not is_ascending(experts_TLK)
    for row in range(9):
        broken = sorted_TLK.copy()
        broken[row, 1] = broken[row, 1, ::-1]
        assert not is_ascending(broken)
