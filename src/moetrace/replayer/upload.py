"""The routes of a batch on the model's device: one copy, and nobody waits for it.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from moetrace.replayer.routes import AlignedRoutes, TokenMode

_ID_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class UploadedRoutes(NamedTuple):
    """Views of one buffer on a device.

    Attributes:
        tokens_N: int64, `RoutesUpload.compared_N`; empty where that is None.
        sequence_N: int32, the number of each token's sequence; 0 for padding.
        experts_LNK: uint8; int16 above 256 experts, int32 above 32768.
        replayed_N: bool, True for tokens of mode REPLAY.
        follows_N: bool, see `AlignedRoutes`.
    """

    tokens_N: torch.Tensor
    sequence_N: torch.Tensor
    experts_LNK: torch.Tensor
    replayed_N: torch.Tensor
    follows_N: torch.Tensor


class RoutesUpload:
    """Puts routes on each device that has routers, when the first of them asks: one asynchronous copy each.

    Args:
        routes: of a batch.
        placeholders: token ids in whose place a model may look up others.
    """

    def __init__(self, routes: AlignedRoutes, placeholders: Collection[int] = ()) -> None:
        self._routes, self._placeholders = routes, placeholders
        self._devices: dict[torch.device, UploadedRoutes] = {}

    def on(self, device: torch.device) -> UploadedRoutes:
        """The routes on a device. No host synchronisation: the copy is ordered before what uses it, on its stream."""
        if device not in self._devices:
            self._devices[device] = self._upload(device)
        return self._devices[device]

    @cached_property
    def compared_N(self) -> np.ndarray | None:
        """`[N]` int64, the ids that the model must be called with; -1 for padding and placeholders, which may be any.

        None where nobody knows: without `tokens_N`, and where the tokens are no batch in memory order, whose order the
        model need not be called in.
        """
        routes = self._routes
        if routes.tokens_N is None or routes.shape is None:
            return None
        any_N = (routes.mode_N == TokenMode.PADDING) | np.isin(routes.tokens_N, list(self._placeholders))
        return np.where(any_N, -1, routes.tokens_N)

    def _upload(self, device: torch.device) -> UploadedRoutes:
        routes = self._routes
        experts_LNK = routes.experts_LNK
        if experts_LNK.itemsize > 1:  # torch computes little with unsigned integers of more than a byte
            experts_LNK = experts_LNK.astype(np.int16 if routes.layout.num_experts <= 1 << 15 else np.int32)
        tokens_N = np.zeros(0, np.int64) if self.compared_N is None else self.compared_N
        sequence_N = np.maximum(routes.sequence_N, 0).astype(np.int32)
        replayed_N = routes.mode_N == TokenMode.REPLAY
        parts = [tokens_N, sequence_N, experts_LNK, replayed_N, routes.follows_N]  # the widest items first
        sizes = [part.nbytes for part in parts]
        blob = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        np.concatenate([part.reshape(-1).view(np.uint8) for part in parts], out=blob.numpy())
        tokens, sequence, ids, replayed, follows = blob.to(device, non_blocking=True).split(sizes)
        return UploadedRoutes(
            tokens.view(torch.int64),
            sequence.view(torch.int32),
            ids.view(_ID_TYPES[experts_LNK.itemsize]).view(experts_LNK.shape),
            replayed.view(torch.bool),
            follows.view(torch.bool),
        )
