"""Payloads of other engines made by hand: from their documented shape, with loops and `struct`, never by the package.

Axes: T rows, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moetrace.layout import MoeLayout

Nested = list[list[list[int]]]
_FORMATS = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "int32": "i", "int64": "q"}


@dataclass(frozen=True)
class Case:
    """A sequence of a model, and what its routers chose: the highest expert occurs, and row, layer and rank show."""

    name: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    num_layers: int
    num_tokens: int
    start: int = 0

    @property
    def layout(self) -> MoeLayout:
        return MoeLayout(self.layers, self.num_experts, self.top_k)

    @property
    def tokens(self) -> list[int]:
        return [100 + 3 * position for position in range(self.num_tokens)]

    @property
    def positions(self) -> range:
        """Every token but the last was an input."""
        return range(self.start, self.num_tokens - 1)

    def route(self, position: int, layer: int) -> list[int]:
        return [
            (self.num_experts - 1 + 5 * position + 3 * layer + rank) % self.num_experts for rank in range(self.top_k)
        ]

    def moe_ids(self) -> Nested:
        """`[T, L, K]`."""
        return [[self.route(position, layer) for layer in self.layers] for position in self.positions]

    def all_ids(self, dense: int = 0) -> Nested:
        """`[T, D, K]`: `dense` in layers that do not route."""
        return [
            [
                self.route(position, layer) if layer in self.layers else [dense] * self.top_k
                for layer in range(self.num_layers)
            ]
            for position in self.positions
        ]


CASES = [
    *(Case(f"{experts} experts", experts, 8, (1, 2), 3, 6) for experts in (127, 128, 129, 255, 256, 257, 512)),
    Case("K 1", 4, 1, (0, 1), 2, 5),
    Case("K 1 of 1", 1, 1, (0,), 1, 4),
    Case("no rows", 8, 2, (0, 1), 2, 1),
    Case("one row", 8, 2, (0, 1), 2, 2),
    Case("all layers", 8, 2, (0, 1, 2), 3, 7),
    Case("dense first", 64, 6, (3, 4, 5), 6, 4),
    Case("interleaved dense", 16, 2, (1, 3, 5), 7, 5),
    Case("dense last", 16, 2, (0, 1), 4, 5),
    Case("start", 256, 4, (1, 2), 3, 9, start=4),
    Case("start at the last row", 300, 4, (1, 2), 3, 9, start=7),
    Case("start behind the last row", 300, 4, (1, 2), 3, 9, start=8),
]


def flat(ids: Any) -> Iterable[int]:
    if isinstance(ids, list):
        for part in ids:
            yield from flat(part)
    else:
        yield ids


def packed(ids: Any, dtype: str, order: str = "<") -> bytes:
    """The ids in C order, one after another."""
    numbers = list(flat(ids))
    return struct.pack(f"{order}{len(numbers)}{_FORMATS[dtype]}", *numbers)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(
    descr: str, shape: Sequence[int] | str, data: bytes, *, fortran: bool = False, version: bytes = b"\x01\x00"
) -> bytes:
    """A `.npy` file as its specification says it: magic, version, length of the header, header, data."""
    shape = shape if isinstance(shape, str) else "(" + ", ".join(map(str, shape)) + ")"
    descr = descr if descr.startswith("[") else f"'{descr}'"
    return npy_of(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}", data, version)


def npy_of(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    """A `.npy` file with any header: 118 bytes, or as many as it needs."""
    length = max(len(header) + 1, 118)
    size = struct.pack("<H" if version[0] == 1 else "<I", length)
    return b"\x93NUMPY" + version + size + (header.ljust(length - 1) + "\n").encode() + data
