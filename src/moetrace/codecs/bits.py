"""The codec `bits`: ceil(log2 E) bits an id, in the order they came. Axes: N routes, K experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moetrace.codecs.base import Arrays, Codec
from moetrace.codecs.packing import pack, packed_size, unpack
from moetrace.layout import MoeLayout


class Bits(Codec):
    """A block is its N * K ids, packed (see `packing`)."""

    name = "bits"
    order = "rank"

    def block_size(self, routes: int, layout: MoeLayout) -> int:
        return packed_size(routes * layout.top_k, id_bits(layout))

    def encode_block(self, ids_NK: np.ndarray, layout: MoeLayout) -> list[np.ndarray]:
        return [pack(ids_NK.reshape(-1), id_bits(layout))]

    def decode_block(self, packed: Any, out: Any, layout: MoeLayout, arrays: Arrays) -> None:
        ids = out.reshape(*out.shape[:-2], out.shape[-2] * layout.top_k)
        unpack(packed, ids.shape[-1], id_bits(layout), ids)


def id_bits(layout: MoeLayout) -> int:
    """ceil(log2 E)."""
    return (layout.num_experts - 1).bit_length()
