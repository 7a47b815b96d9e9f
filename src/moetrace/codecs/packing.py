"""Integers of w bits each as dense bytes, and back: the layout under the codecs `bits` and `set` and the token ids.

Axes: n values that are packed together (a block); leading axes, where there are any, are independent blocks.

A value's low bits go to `w // 8` planes of one byte each, least significant first. What remains (w % 8 bits) is split
into fields of 4, 2 and 1 bits, in this order, each only where w has that binary digit. A field of p bits puts 8 / p
values in a byte: with m = ceil(n * p / 8), byte j holds the values j, m + j, 2m + j, ... from its lowest bits up. So
neighbours in memory are never combined with each other, and every step is one operation on whole arrays.

The functions work on numpy arrays and on torch tensors alike: they use nothing but slices, shifts and masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MAX_WIDTH = 63


def packed_size(n: int, width: int) -> int:
    """Bytes that n values of `width` bits take."""
    return n * (width // 8) + sum(-(-n * bits // 8) for _, bits in _fields(width))


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """Pack a block.

    Args:
        values: `[n]` unsigned integers (or int64), each below `2**width`, little-endian.
        width: bits a value, 0 to 63.

    Returns:
        `[packed_size(n, width)]` uint8.
    """
    values = np.ascontiguousarray(values)
    bytes_ = values.view(np.uint8).reshape(-1, values.dtype.itemsize)
    planes = [bytes_[:, plane] for plane in range(width // 8)]
    if width % 8:
        rest = bytes_[:, width // 8]
        planes += [_pack_field(rest >> shift & (1 << bits) - 1, bits) for shift, bits in _fields(width)]
    return np.concatenate(planes) if planes else np.empty(0, np.uint8)


def unpack(packed: Any, n: int, width: int, out: Any) -> None:
    """Unpack blocks of n values each.

    Args:
        packed: `[..., packed_size(n, width)]` uint8, numpy or torch.
        n: values a block.
        width: bits a value, 0 to 63.
        out: `[..., n]` zeros of a little-endian integer dtype that holds them, C order, filled in place.
    """
    bytes_ = out.view(packed.dtype).reshape(*out.shape, out.dtype.itemsize)
    at = 0
    for plane in range(width // 8):
        bytes_[..., plane] = packed[..., at : at + n]
        at += n
    for shift, bits in _fields(width):
        size, mask = -(-n * bits // 8), ((1 << bits) - 1) << shift
        field = packed[..., at : at + size]
        at += size
        for section in range(8 // bits):
            values = bytes_[..., section * size : (section + 1) * size, width // 8]
            values |= _shifted(field[..., : values.shape[-1]], section * bits - shift) & mask


def _fields(width: int) -> Iterator[tuple[int, int]]:
    """(shift, bits) of the fields that take the bits above the whole bytes."""
    shift = 0
    for bits in (4, 2, 1):
        if width & bits:
            yield shift, bits
            shift += bits


def _pack_field(values: np.ndarray, bits: int) -> np.ndarray:
    size = -(-len(values) * bits // 8)
    packed = values[:size].copy()
    for section in range(1, 8 // bits):
        part = values[section * size : (section + 1) * size]
        packed[: len(part)] |= _shifted(part, -section * bits)
    return packed


def _shifted(bytes_: Any, right: int) -> Any:
    """Bytes shifted right (left where negative); a product, because numpy's left shift of bytes is not vectorised."""
    return bytes_ >> right if right >= 0 else bytes_ * (1 << -right)
