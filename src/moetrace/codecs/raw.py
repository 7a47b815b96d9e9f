"""The codec `raw`: the ids as a trace holds them, uint8 or little-endian uint16, in the order they came."""

from __future__ import annotations

from typing import Any

import numpy as np

from moetrace.codecs.base import Arrays, Codec
from moetrace.layout import MoeLayout


class Raw(Codec):
    """A block is the memory of its ids; so are all blocks together."""

    name = "raw"
    order = "rank"

    def block_size(self, routes: int, layout: MoeLayout) -> int:
        return routes * layout.top_k * layout.dtype.itemsize

    def encode_block(self, ids_NK: np.ndarray, layout: MoeLayout) -> list[np.ndarray]:
        return [np.ascontiguousarray(ids_NK).view(np.uint8).reshape(-1)]

    def encode(self, experts_VLK: np.ndarray, layout: MoeLayout) -> np.ndarray:
        self.check(layout)
        return np.ascontiguousarray(experts_VLK).reshape(-1).view(np.uint8)

    def decode_block(self, packed: Any, out: Any, layout: MoeLayout, arrays: Arrays) -> None:
        bytes_ = out.view(packed.dtype).reshape(*out.shape, out.dtype.itemsize)
        width = layout.dtype.itemsize
        bytes_[..., :width] = packed.reshape(*out.shape, width)
