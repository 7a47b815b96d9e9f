"""The codec `set`: the rank of each route's set of experts, ceil(log2 C(E, K)) bits. Axes: N routes, K experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moetrace.codecs.base import NUMPY, Arrays, Codec
from moetrace.codecs.packing import pack, packed_size, unpack
from moetrace.codecs.subsets import Subsets, limb_bits
from moetrace.layout import MoeLayout


class Set(Codec):
    """A block is the limbs of its N ranks, least significant first, each limb packed on its own (see `packing`)."""

    name = "set"
    order = "set"
    max_experts = 1024

    def block_size(self, routes: int, layout: MoeLayout) -> int:
        return sum(packed_size(routes, bits) for bits in limb_bits(layout.num_experts, layout.top_k))

    def encode_block(self, ids_NK: np.ndarray, layout: MoeLayout) -> list[np.ndarray]:
        subsets = _subsets(layout)
        return [pack(limb, bits) for limb, bits in zip(subsets.ranks(ids_NK), subsets.limb_bits, strict=True)]

    def decode_block(self, packed: Any, out: Any, layout: MoeLayout, arrays: Arrays) -> None:
        subsets, limbs, at = _subsets(layout), [], 0
        for bits in subsets.limb_bits:
            limb = arrays.zeros(out.shape[:-1], np.dtype(np.int64))
            size = packed_size(limb.shape[-1], bits)
            unpack(packed[..., at : at + size], limb.shape[-1], bits, limb)
            limbs.append(arrays.doubles(limb))
            at += size
        (subsets if arrays is NUMPY else subsets.on(arrays.table)).ids(limbs, out)


def _subsets(layout: MoeLayout) -> Subsets:
    return Subsets.of(layout.num_experts, layout.top_k)
