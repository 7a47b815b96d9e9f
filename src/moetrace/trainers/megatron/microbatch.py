"""What a forward is run for: the routes of one microbatch, on the device of its routers.

Axes: L MoE layers on this rank, N tokens, K experts per token, E experts, B rows and S columns of a batch.
"""

from __future__ import annotations

from typing import Protocol

import torch

from moetrace.errors import ReplayError
from moetrace.replayer.monitor import OverlapMonitor, ReplayStats
from moetrace.replayer.routes import TokenMode
from moetrace.trainers.megatron.routers import LocalRouter
from moetrace.trainers.megatron.rows import RankRows


class Task(Protocol):
    """What forwards are run for."""

    forwards: int

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        """The ids that a router is to use; `again` in a recomputation."""


class Microbatch:
    """The routes of one microbatch: of its forward, and of whatever its backward recomputes.

    Attributes:
        forwards: forwards of chunks that ran in it.
    """

    def __init__(self, rows: RankRows | None) -> None:
        self.forwards = 0
        self._rows = rows
        self._monitor = OverlapMonitor(rows.batch) if rows else None
        self._live_somewhere = rows is not None and rows.router.count(TokenMode.REPLAY) < rows.router.num_tokens
        self._device_rows: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def stats(self) -> ReplayStats | None:
        """How the live routers of this rank agreed with the routes; None where it has no MoE layer. Waits for the
        device.
        """
        return self._monitor.stats() if self._monitor else None

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        assert self._rows is not None, "only routers that rows were made for have a port"
        assert self._monitor is not None
        tokens = self._rows.router.num_tokens
        if len(scores_NE) != tokens:
            raise ReplayError(
                f"router {router.name} sees another number of tokens than the routes have",
                expected=f"{tokens} tokens (padding included)",
                got=len(scores_NE),
                fix="Align the routes to the very tokens that this rank's model is called with: after context "
                "parallelism, before sequence parallelism, which is cut here.",
            )
        if live_NK.shape[1] != self._rows.router.layout.top_k:
            raise ReplayError(
                f"router {router.name} chooses another number of experts than the routes have",
                expected=self._rows.router.layout.top_k,
                got=live_NK.shape[1],
            )
        place = self._rows.places[router.layer]
        if not again:
            self._monitor.observe(place, self._in_batch_order(live_NK))
        experts_LNK, replayed_N1 = self._on(scores_NE.device)
        given_NK = experts_LNK[place].long()
        return torch.where(replayed_N1, given_NK, live_NK) if self._live_somewhere else given_NK

    def _in_batch_order(self, live_NK: torch.Tensor) -> torch.Tensor:
        """From `[S, B]` to `[B, S]`: only there do the tokens of a sequence follow each other, as the alarm needs."""
        assert self._rows is not None
        if (shape := self._rows.batch.shape) is None:
            return live_NK
        return live_NK.view(shape[1], shape[0], -1).transpose(0, 1).reshape(live_NK.shape)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._rows is not None
        if device not in self._device_rows:
            routes = self._rows.router
            narrow = routes.experts_LNK if routes.experts_LNK.dtype == "uint8" else routes.experts_LNK.astype("int32")
            experts_LNK = torch.from_numpy(narrow)
            replayed_N1 = torch.from_numpy(routes.mode_N == TokenMode.REPLAY)[:, None]
            if device.type == "cuda":
                experts_LNK, replayed_N1 = experts_LNK.pin_memory(), replayed_N1.pin_memory()
            self._device_rows[device] = (
                experts_LNK.to(device, non_blocking=True),
                replayed_N1.to(device, non_blocking=True),
            )
        return self._device_rows[device]
