"""The routes of a batch on the model's device: one copy, and nobody waits for it.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moetrace.replayer.routes import AlignedRoutes, TokenMode

_ID_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class UploadedRoutes(NamedTuple):
    """Views of one buffer on a device.

    Attributes:
        experts_LNK: uint8; int16 above 256 experts, int32 above 32768.
        replayed_N: bool, True for tokens of mode REPLAY.
        follows_N: bool, see `AlignedRoutes`.
    """

    experts_LNK: torch.Tensor
    replayed_N: torch.Tensor
    follows_N: torch.Tensor


class RoutesUpload:
    """Puts routes on each device that has routers, when the first of them asks: one asynchronous copy each."""

    def __init__(self, routes: AlignedRoutes) -> None:
        self._routes = routes
        self._devices: dict[torch.device, UploadedRoutes] = {}

    def on(self, device: torch.device) -> UploadedRoutes:
        """The routes on a device. No host synchronisation: the copy is ordered before what uses it, on its stream."""
        if device not in self._devices:
            self._devices[device] = self._upload(device)
        return self._devices[device]

    def _upload(self, device: torch.device) -> UploadedRoutes:
        routes = self._routes
        experts_LNK = routes.experts_LNK
        if experts_LNK.itemsize > 1:  # torch computes little with unsigned integers of more than a byte
            experts_LNK = experts_LNK.astype(np.int16 if routes.layout.num_experts <= 1 << 15 else np.int32)
        ids, tokens = experts_LNK.nbytes, routes.num_tokens
        blob = torch.empty(ids + 2 * tokens, dtype=torch.uint8, pin_memory=device.type == "cuda")
        host = blob.numpy()
        host[:ids] = experts_LNK.reshape(-1).view(np.uint8)
        host[ids : ids + tokens] = routes.mode_N == TokenMode.REPLAY
        host[ids + tokens :] = routes.follows_N
        blob = blob.to(device, non_blocking=True)
        return UploadedRoutes(
            blob[:ids].view(_ID_TYPES[experts_LNK.itemsize]).view(experts_LNK.shape),
            blob[ids : ids + tokens].view(torch.bool),
            blob[ids + tokens :].view(torch.bool),
        )
