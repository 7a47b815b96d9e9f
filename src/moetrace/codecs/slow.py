"""Slow twins: what `packing`, `subsets` and the codecs do, one value at a time, in Python's whole numbers.

Not used by anything but tests and readers of docs/format.md. Axes as in the fast modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

from moetrace.codecs.base import BLOCK_IDS
from moetrace.layout import MoeLayout

LIMB_BITS = 53


def pack(values: Sequence[int], width: int) -> bytes:
    """The twin of `packing.pack`."""
    packed, shift = b"", 0
    while width - shift >= 8:
        packed += bytes(value >> shift & 255 for value in values)
        shift += 8
    for bits in (4, 2, 1):
        if width & bits:
            size = -(-len(values) * bits // 8)
            field = [0] * size
            for i, value in enumerate(values):
                field[i % size] |= (value >> shift & (1 << bits) - 1) << i // size * bits
            packed += bytes(field)
            shift += bits
    return packed


def unpack(packed: bytes, n: int, width: int) -> list[int]:
    """The twin of `packing.unpack`."""
    values, shift, at = [0] * n, 0, 0
    while width - shift >= 8:
        values = [value | packed[at + i] << shift for i, value in enumerate(values)]
        shift, at = shift + 8, at + n
    for bits in (4, 2, 1):
        if width & bits:
            size = -(-n * bits // 8)
            for i in range(n):
                values[i] |= (packed[at + i % size] >> i // size * bits & (1 << bits) - 1) << shift
            shift, at = shift + bits, at + size
    return values


def rank(ids: Sequence[int]) -> int:
    """The rank of a set of ids: the sum of C(c_k, k) over the ids in ascending order, k from 1."""
    return sum(comb(c, k) for k, c in enumerate(sorted(ids), start=1))


def ids_of(rank: int, top_k: int) -> list[int]:
    """The set of `top_k` ids with this rank, ascending: the largest c with C(c, k) <= rest, from the highest k down."""
    ids = []
    for k in range(top_k, 0, -1):
        c = k - 1
        while comb(c + 1, k) <= rank:
            c += 1
        rank -= comb(c, k)
        ids.append(c)
    return ids[::-1]


def encode(name: str, ids_NK: Sequence[Sequence[int]], layout: MoeLayout) -> bytes:
    """The twin of `codecs.encode` for `raw`, `bits` and `set`, over the routes one after the other."""
    itemsize = 1 if layout.num_experts <= 256 else 2
    if name == "raw":
        return b"".join(expert.to_bytes(itemsize, "little") for route in ids_NK for expert in route)
    packed, block = b"", max(1, BLOCK_IDS // layout.top_k)
    for first in range(0, len(ids_NK), block):
        routes = ids_NK[first : first + block]
        if name == "bits":
            width = (layout.num_experts - 1).bit_length()
            packed += pack([expert for route in routes for expert in route], width)
        else:
            ranks = [rank(route) for route in routes]
            for shift, bits in _limbs(layout):
                packed += pack([value >> shift & (1 << bits) - 1 for value in ranks], bits)
    return packed


def _limbs(layout: MoeLayout) -> Iterator[tuple[int, int]]:
    """(shift, bits) of each limb of a rank."""
    width = (comb(layout.num_experts, layout.top_k) - 1).bit_length()
    for shift in range(0, width, LIMB_BITS):
        yield shift, min(LIMB_BITS, width - shift)
