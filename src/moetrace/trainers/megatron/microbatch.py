"""What a forward is run for: the routes of one microbatch, on the device of its routers.

Axes: L MoE layers on this rank, N tokens, K experts per token, E experts, B rows and S columns of a batch.
Routers see tokens in the order `[S, B]`, everything else has them in the batch's, `[B, S]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moetrace.errors import ReplayError
from moetrace.replayer.alarm import OnShift, ShiftAlarm
from moetrace.replayer.counts import ReplayCounts, ReplayStats
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.replayer.ranks import pipeline
from moetrace.replayer.routes import TokenMode
from moetrace.replayer.upload import RoutesUpload
from moetrace.trainers.megatron.routers import LocalRouter
from moetrace.trainers.megatron.rows import RankRows, sequence_ranks


class Task(Protocol):
    """What forwards are run for."""

    forwards: int

    def begin(self, routers: Sequence[LocalRouter], ids: torch.Tensor | None) -> None:
        """A chunk with these routers is about to run, called with these token ids, where it looks them up."""

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        """The ids that a router is to use; `again` in a recomputation."""

    def watch(self, output: torch.Tensor) -> None:
        """A chunk returned this, and its gradient may come."""


class Microbatch:
    """The routes of one microbatch for one chunk: of its forward, and of whatever its backward recomputes.

    Attributes:
        forwards: forwards of the chunk that ran in it.
    """

    def __init__(self, rows: RankRows | None, on_shift: OnShift) -> None:
        self.forwards = 0
        self._of_rank, self._on_shift = rows, on_shift
        self._rows: RankRows | None = None
        self._layers: tuple[int, ...] | None = None

    def begin(self, routers: Sequence[LocalRouter], ids: torch.Tensor | None) -> None:
        """Upload and count for the chunk that runs; compare the ids with those that were aligned."""
        layers = tuple(router.layer for router in routers)
        if self._layers is not None and self._layers != layers:
            raise ReplayError(
                "two chunks run in one microbatch context",
                expected=f"the chunk with MoE layers {list(self._layers)}",
                got=f"that with {list(layers)}",
                fix="Open a context around the call of each chunk, with the same routes.",
            )
        if (
            self._layers is None
            and self._of_rank is not None
            and (batch := pipeline(self._of_rank.batch, layers or [-1]))
        ):
            self._rows = RankRows(batch)
            self._upload = RoutesUpload(batch)
            self._monitor = OverlapMonitor(batch, self._upload)
            self._alarm = ShiftAlarm(self._monitor, self._on_shift)
            self._live_somewhere = batch.count(TokenMode.REPLAY) < batch.num_tokens
        self._layers = layers
        if self._rows and ids is not None:
            rank, size = sequence_ranks(routers[0])
            self._alarm.see_tokens(ids if size == 1 or ids.ndim != 2 else ids.tensor_split(size, dim=1)[rank])

    def watch(self, output: torch.Tensor) -> None:
        if self._rows:
            self._alarm.watch(output)

    def close(self) -> None:
        """No more forwards come: raise the alarm, or leave it to the backward pass; see `ShiftAlarm`."""
        if self._rows:
            self._alarm.close()

    def counts(self) -> ReplayCounts | None:
        """What was counted so far in this chunk; None where it does not route. Waits for the device.

        Whole numbers that add up over microbatches, and over ranks with the same layers.

        Raises:
            TokenMismatchError: the chunk was called with other tokens than those that were aligned.
            ShiftedRoutesError: after the context, if a backward pass was to raise it and has not come yet.
        """
        return self._alarm.counts() if self._rows and self._monitor.forwards else None

    def stats(self) -> ReplayStats | None:
        """How the live routers of this chunk agreed with the routes: `counts` as shares. Waits for the device."""
        counts = self.counts()
        return counts.stats() if counts else None

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        if self._rows is None or router.layer not in self._rows.places:
            raise ReplayError(
                f"router {router.name} runs outside of its chunk's forward",
                expected="a call of what was given to attach",
                fix="Call the chunk, not a part of it; or attach what you call.",
            )
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
        uploaded = self._upload.on(scores_NE.device)
        replayed_N = uploaded.replayed_N
        if not again:
            self._monitor.observe(place, self._to_batch(live_NK), replayed_N)
        given_NK = self._to_router(uploaded.experts_LNK[place]).long()
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
