"""Decode straight to torch, on any device, without the ids ever being numpy's. Axes: V rows, L layers, K experts."""

from __future__ import annotations

import numpy as np

from moetrace.codecs.base import Arrays, Codec
from moetrace.errors import MissingExtraError
from moetrace.layout import MoeLayout

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error, "transformers") from error

_DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.int64): torch.int64}


def decode_tensor(
    codec: Codec, data: np.ndarray, num_rows: int, layout: MoeLayout, device: torch.device | str
) -> torch.Tensor:
    """What `Codec.decode` gives, as a tensor `[V, L, K]`: uint8 up to 256 experts, int16 up to 32768, int32 above.

    Only the encoded bytes are copied to the device; its workspace is a few int64 for each route.

    Raises:
        FormatError: as `Codec.decode`.
    """

    def zeros(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=_DTYPES[dtype], device=device)

    def table(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    arrays = Arrays(zeros, torch.Tensor.double, table)
    shape = (num_rows, layout.num_layers, layout.top_k)
    experts_VLK = torch.zeros(shape, dtype=tensor_dtype(layout), device=device)
    packed = torch.from_numpy(np.require(data, requirements="W")).to(device)
    on_cpu = experts_VLK.device.type == "cpu"
    codec.decode_into(experts_VLK.view(-1, layout.top_k), packed, layout, arrays, batched=not on_cpu)
    return experts_VLK


def tensor_dtype(layout: MoeLayout) -> torch.dtype:
    """The narrowest dtype that holds E - 1 and with which torch computes everywhere (it lacks that for uint16)."""
    if layout.num_experts <= 256:
        return torch.uint8
    return torch.int16 if layout.num_experts <= 1 << 15 else torch.int32
