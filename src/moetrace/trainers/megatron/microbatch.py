"""What a forward is run for: the routes of one microbatch, on the device of its routers.

Axes: L MoE layers on this rank, N tokens, K experts per token, E experts, B rows and S columns of a batch.
Routers see tokens in the order `[S, B]`, everything else has them in the batch's, `[B, S]`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from moetrace.errors import ReplayError
from moetrace.replayer.counts import ReplayCounts, ReplayStats
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.replayer.routes import TokenMode
from moetrace.replayer.upload import RoutesUpload
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
        if rows is not None:
            self._upload = RoutesUpload(rows.batch)
            self._monitor = OverlapMonitor(rows.batch, self._upload)
            self._live_somewhere = rows.batch.count(TokenMode.REPLAY) < rows.batch.num_tokens

    def counts(self) -> ReplayCounts | None:
        """What was counted so far on this rank, as whole numbers that add up over microbatches, and over ranks with the
        same layers; None where it has no MoE layer. Waits for the device.
        """
        return self._monitor.counts() if self._rows else None

    def stats(self) -> ReplayStats | None:
        """How the live routers of this rank agreed with the routes: `counts` as shares. Waits for the device."""
        counts = self.counts()
        return counts.stats() if counts else None

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        assert self._rows is not None, "only routers that rows were made for have a port"
        tokens, top_k = self._rows.batch.num_tokens, self._rows.batch.layout.top_k
        if len(scores_NE) != tokens:
            raise ReplayError(
                f"router {router.name} sees another number of tokens than the routes have",
                expected=f"{tokens} tokens (padding included)",
                got=len(scores_NE),
                fix="Align the routes to the very tokens that this rank's model is called with: after context "
                "parallelism, before sequence parallelism, which is cut here.",
            )
        if live_NK.shape[1] != top_k:
            raise ReplayError(
                f"router {router.name} chooses another number of experts than the routes have",
                expected=top_k,
                got=live_NK.shape[1],
            )
        place = self._rows.places[router.layer]
        experts_LNK, replayed_N, _ = self._upload.on(scores_NE.device)
        if not again:
            self._monitor.observe(place, self._to_batch(live_NK), replayed_N)
        given_NK = self._to_router(experts_LNK[place]).long()
        return (
            torch.where(self._to_router(replayed_N[:, None]), given_NK, live_NK) if self._live_somewhere else given_NK
        )

    def _to_router(self, values_NX: torch.Tensor) -> torch.Tensor:
        """From `[B, S]` to `[S, B]`, where the routes are a batch."""
        return self._reordered(values_NX, 0)

    def _to_batch(self, values_NX: torch.Tensor) -> torch.Tensor:
        """From `[S, B]` to `[B, S]`: only there do the tokens of a sequence follow each other, as the alarm needs."""
        return self._reordered(values_NX, 1)

    def _reordered(self, values_NX: torch.Tensor, first: int) -> torch.Tensor:
        shape = self._rows.batch.shape if self._rows else None
        if shape is None or 1 in shape:
            return values_NX
        return values_NX.view(shape[first], shape[1 - first], -1).transpose(0, 1).reshape(values_NX.shape)
