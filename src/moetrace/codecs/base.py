"""What a codec is, and the arrays it computes with. Axes: V valid rows, L layers, K experts; N = V * L routes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moetrace.errors import FormatError
from moetrace.layout import MAX_EXPERTS, MoeLayout

BLOCK_IDS = 1 << 17
"""Ids of a block: what is worked on at once, so that it stays in a core's cache. Part of the format."""


@dataclass(frozen=True)
class Arrays:
    """The few array operations in which numpy and torch differ.

    Attributes:
        zeros: `zeros(shape, dtype)`; the dtype is numpy's, torch's may be the next wider signed one.
        doubles: an integer array as float64.
        table: a numpy array as an array of this kind, on the right device.
    """

    zeros: Callable[[tuple[int, ...], np.dtype], Any]
    doubles: Callable[[Any], Any]
    table: Callable[[np.ndarray], Any]


NUMPY = Arrays(zeros=np.zeros, doubles=lambda integers: integers.astype(np.float64), table=np.asarray)


class Codec(ABC):
    """Ids of routes as bytes, block by block: `max(1, BLOCK_IDS // K)` routes each, the last block shorter.

    Attributes:
        name: as it stands in a container's header.
        order: "rank" if the ids come back as they were, "set" if they come back ascending.
        max_experts: up to which E the codec can be used.
    """

    name: ClassVar[str]
    order: ClassVar[str]
    max_experts: ClassVar[int] = MAX_EXPERTS

    def check(self, layout: MoeLayout) -> None:
        """Raise `FormatError` if routes of this layout cannot be written."""
        if layout.num_experts > self.max_experts:
            raise FormatError(
                f"the codec {self.name!r} does not go so far",
                expected=f"at most {self.max_experts} experts",
                got=layout.num_experts,
                fix="Use the codec 'bits'.",
            )

    @abstractmethod
    def block_size(self, routes: int, layout: MoeLayout) -> int:
        """Bytes of a block of so many routes."""

    @abstractmethod
    def encode_block(self, ids_NK: np.ndarray, layout: MoeLayout) -> list[np.ndarray]:
        """A block as uint8 arrays to be written one after the other."""

    @abstractmethod
    def decode_block(self, packed: Any, out: Any, layout: MoeLayout, arrays: Arrays) -> None:
        """Fill `out`, `[..., N, K]` zeros, from `packed`, `[..., block_size]` uint8; leading axes are blocks."""

    def size(self, routes: int, layout: MoeLayout) -> int:
        """Bytes of so many routes."""
        self.check(layout)
        block = block_routes(layout)
        full, rest = divmod(routes, block)
        return full * self.block_size(block, layout) + self.block_size(rest, layout)

    def encode(self, experts_VLK: np.ndarray, layout: MoeLayout) -> np.ndarray:
        """`[V, L, K]` ids of `layout.dtype` as `[size]` uint8."""
        self.check(layout)
        ids_NK, block = experts_VLK.reshape(-1, layout.top_k), block_routes(layout)
        parts = [np.empty(0, np.uint8)]
        for first in range(0, len(ids_NK), block):
            parts += self.encode_block(ids_NK[first : first + block], layout)
        return np.concatenate(parts)

    def decode(self, data: np.ndarray, num_rows: int, layout: MoeLayout) -> np.ndarray:
        """The `[V, L, K]` ids of `layout.dtype` that `[size]` uint8 hold; they are not checked to be a trace's.

        Raises:
            FormatError: the bytes are too few or too many, or cannot have been written by this codec.
        """
        out = np.zeros((num_rows, layout.num_layers, layout.top_k), layout.dtype)
        self.decode_into(out.reshape(-1, layout.top_k), data, layout, NUMPY, batched=False)
        return out

    def decode_into(self, out: Any, data: Any, layout: MoeLayout, arrays: Arrays, *, batched: bool) -> None:
        """Fill `out`, `[N, K]` zeros, from `[size]` uint8; `batched` takes all full blocks at once (for a GPU)."""
        if len(data) != self.size(len(out), layout):
            raise FormatError(
                f"the bytes of codec {self.name!r} have a wrong length",
                expected=f"{self.size(len(out), layout)} bytes for {len(out)} routes",
                got=f"{len(data)} bytes",
            )
        block = block_routes(layout)
        size = self.block_size(block, layout)
        full = len(out) // block
        step = max(full, 1) if batched else 1
        for first in range(0, full, step):
            packed = data[first * size : (first + step) * size].reshape(step, size)
            ids = out[first * block : (first + step) * block].reshape(step, block, layout.top_k)
            self.decode_block(packed, ids, layout, arrays)
        if len(out) > full * block:
            self.decode_block(data[full * size :], out[full * block :], layout, arrays)


def block_routes(layout: MoeLayout) -> int:
    """Routes of a full block."""
    return max(1, BLOCK_IDS // layout.top_k)
