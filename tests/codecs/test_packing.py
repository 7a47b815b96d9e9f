"""Packing equals its slow twin bit for bit, and comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.codecs import slow
from moetrace.codecs.packing import MAX_WIDTH, pack, packed_size, unpack

LENGTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 100)


def unpacked(packed: np.ndarray, n: int, width: int, dtype: type = np.int64) -> list[int]:
    out: np.ndarray = np.zeros(n, dtype)
    unpack(packed, n, width, out)
    return out.tolist()


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_every_width_equals_its_slow_twin_and_comes_back(width: int) -> None:
    rng = np.random.default_rng(width)
    for n in LENGTHS:
        values = rng.integers(0, 1 << width, n, dtype=np.uint64)
        values[: n // 3] = (1 << width) - 1
        packed = pack(values, width)
        assert packed.tobytes() == slow.pack(values.tolist(), width)
        assert len(packed) == packed_size(n, width)
        assert unpacked(packed, n, width) == values.tolist()
        assert slow.unpack(packed.tobytes(), n, width) == values.tolist()


@pytest.mark.parametrize(("dtype", "width"), [(np.uint8, 7), (np.uint8, 8), (np.uint16, 9), (np.uint16, 16)])
def test_narrow_dtypes_are_packed_as_they_are(dtype: type, width: int) -> None:
    values: np.ndarray = np.random.default_rng(0).integers(0, 1 << width, 1000).astype(dtype)
    assert pack(values, width).tobytes() == slow.pack(values.tolist(), width)
    assert unpacked(pack(values, width), 1000, width, dtype) == values.tolist()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_are_unpacked_side_by_side(data: st.DataObject) -> None:
    width, n = data.draw(st.integers(0, MAX_WIDTH)), data.draw(st.integers(0, 40))
    values: np.ndarray = np.random.default_rng(n).integers(0, 1 << width, (3, n), dtype=np.int64)
    out = np.zeros((3, n), np.int64)
    unpack(np.stack([pack(block, width) for block in values]), n, width, out)
    np.testing.assert_array_equal(out, values)


def test_packing_does_not_touch_what_it_packs() -> None:
    values = np.arange(100, dtype=np.uint8)
    values.flags.writeable = False
    assert unpacked(pack(values[::2], 7), 50, 7) == list(range(0, 100, 2))
