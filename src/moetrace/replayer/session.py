"""`with replay(model, traces, input_ids=...):` supplies recorded routes to the forwards inside.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from moetrace.errors import LayoutMismatchError, ReplayError
from moetrace.replayer.alarm import OnShift, ShiftAlarm
from moetrace.replayer.align import Missing, align
from moetrace.replayer.counts import ReplayCounts, ReplayStats
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.replayer.policy import ReplayPolicy
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.replayer.upload import RoutesUpload
from moetrace.routers import ModelTap, RoutingSession, Selection, tap_model
from moetrace.routers.inputs import placeholders_of, token_ids_of
from moetrace.trace import RoutingTrace


class ReplaySession(RoutingSession):
    """One batch's routes, supplied to every forward and recomputation that belongs to it.

    A session is bound to its forwards, not to a place in a queue: with several microbatches in flight, each backward
    recomputes with the routes its own forward had, and a forward-only pass leaves nothing behind.
    """

    supplies_routes = True

    def __init__(self, routes: AlignedRoutes, on_shift: OnShift = "error", placeholders: Collection[int] = ()) -> None:
        self.routes = routes
        self._upload = RoutesUpload(routes, placeholders)
        self._monitor = OverlapMonitor(routes, self._upload)
        self._alarm = ShiftAlarm(self._monitor, on_shift)
        self._live_somewhere = routes.margin is not None or routes.count(TokenMode.REPLAY) < routes.num_tokens

    def on_selection(self, selection: Selection) -> None:
        tokens = selection.live_NK.shape[0]
        if tokens != self.routes.num_tokens:
            raise ReplayError(
                f"router {selection.site.name} saw another batch than the one that was aligned",
                expected=f"{self.routes.num_tokens} tokens (padding included)",
                got=f"{tokens}",
                fix="Call the model with the very input_ids given to replay: no generation. For a rank that has a part "
                "of the tokens, slice the aligned routes (moetrace.replayer.ranks).",
            )
        uploaded = self._upload.on(selection.live_NK.device)
        used_N = uploaded.replayed_N
        given_NK = uploaded.experts_LNK[selection.site.index].long()
        if self.routes.margin is not None:
            used_N = used_N & (selection.margin_N() < self.routes.margin)
        if not selection.recompute:
            self._monitor.observe(selection.site.index, selection.live_NK, used_N)
        if self._live_somewhere:
            given_NK = torch.where(used_N[:, None], given_NK, selection.live_NK)
        selection.indices_NK = given_NK

    def on_tokens(self, ids: torch.Tensor) -> None:
        """Compare what the model is called with to what was aligned; see `ShiftAlarm.see_tokens`."""
        self._alarm.see_tokens(ids)

    def on_output(self, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                self._alarm.watch(tensor)

    def close(self) -> None:
        """No more forwards come: raise the alarm, or leave it to the backward pass; see `ShiftAlarm`."""
        self._alarm.close()

    @property
    def forwards(self) -> int:
        """How many whole forward passes were replayed so far."""
        return self._monitor.forwards

    @property
    def lacking(self) -> list[int]:
        """Places, among the model's routers, of those that the last forward has not come to."""
        return self._monitor.lacking

    def counts(self) -> ReplayCounts:
        """What was counted so far, as whole numbers that add up over sessions. Waits for the device.

        Raises:
            TokenMismatchError: the model was called with other tokens than those that were aligned.
            ShiftedRoutesError: after the context, if a backward pass was to raise it and has not come yet.
        """
        return self._alarm.counts()

    def stats(self, group: dist.ProcessGroup | None = None) -> ReplayStats:
        """How the live router agreed with the replayed routes so far. Waits for the device.

        Args:
            group: pool the counts of these ranks, exactly; all of them must call. Ranks that share a batch
                (tensor parallelism) count it once each, so pass the data-parallel group; or
                `torch.distributed.group.WORLD`. None: this rank alone.

        Raises:
            TokenMismatchError, ShiftedRoutesError: as `counts`, of this rank.
        """
        found = self._monitor.send()()
        counts = found.counts
        if group is not None:
            of_ranks: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(of_ranks, counts, group=group)
            counts = reduce(add, of_ranks)
        self._alarm.judge()  # when the other ranks have what they wait for
        found.trusted()
        return counts.stats()


@contextmanager
def replay(
    model: nn.Module,
    traces: RoutingTrace | Sequence[RoutingTrace] | AlignedRoutes,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    cu_seqlens: Any = None,
    missing: Missing | Any = "error",
    policy: ReplayPolicy | None = None,
    response_mask: Any = None,
    on_shift: OnShift = "error",
) -> Iterator[ReplaySession]:
    """Route the forwards inside the context as recorded.

    Expert ids come from the traces, weights from live scores by the model's own formula, and gradients reach the router
    as the model defines it. The routers' own choice is still computed, to report how far it would have been off.
    Backward passes (with activation checkpointing enabled on the model) may run inside the context or after it.

    Args:
        model: a transformers MoE model, not compiled; as it is, or inside DistributedDataParallel and the like.
        traces: one for each sequence of the batch in memory order, or routes that `align` made.
        input_ids: `[B, S]` token ids of the batch (CPU tensors spare a wait for the GPU).
        attention_mask, position_ids, cu_seqlens: how sequences lie in it, see `moetrace.batch.segments_of`.
        missing: what tokens without a row do: "error", "live" or a bool array `[B, S]`; see `align`.
        policy, response_mask: which rows are replayed; see `align`.
        on_shift: what happens when the routes would fit the live router better shifted by one token. It is known at the
            end of the context; on a GPU, where the host would wait for it, at the end of the backward pass, if one is
            to come.

    Yields:
        The session; `session.stats()` tells overlap and mismatch.

    Raises:
        TraceError: the traces do not fit the tokens or the model, rows are missing, or the model is called with other
            tokens (`TokenMismatchError`: on a GPU it comes when a shift is known, whatever `on_shift` says).
        ShiftedRoutesError: see `on_shift`.
        RouterError, ReplayError: the model cannot be replayed, or not as it was called.
    """
    if on_shift not in ("error", "warn", "ignore"):
        raise ReplayError("on_shift is unknown", expected="'error', 'warn' or 'ignore'", got=repr(on_shift))
    tap = tap_model(model)
    if isinstance(traces, AlignedRoutes):
        if policy is not None or response_mask is not None:
            raise ReplayError(
                "aligned routes have a policy already", expected="neither policy nor response_mask", got="one of them"
            )
        routes = traces
    elif input_ids is None:
        raise ReplayError("replay needs the batch's token ids", expected="input_ids=[B, S]", got=None)
    else:
        routes = align(
            traces,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            missing=missing,
            policy=policy,
            response_mask=response_mask,
        )
    _require_model(routes, tap, type(model).__name__)
    session = ReplaySession(routes, on_shift, placeholders_of(model))
    with tap.active(session), token_ids_of(model, session.on_tokens, innermost=True):
        yield session
    _require_all(session.lacking, tap)
    if session.forwards == 0:
        raise ReplayError(
            "nothing was replayed: the model did not run inside the context",
            expected=f"a forward of this {type(model).__name__} on this thread",
            fix="Call the very model given to replay, or its data-parallel wrapper, not a copy of it.",
        )
    session.close()


def _require_all(lacking: list[int], tap: ModelTap) -> None:
    """Refuse a last forward to which some routers did not come: their layers ran live, or not at all."""
    if lacking:
        raise ReplayError(
            f"{len(lacking)} of {len(tap.sites)} routers did not run in the last forward",
            expected="a forward of the whole model, in which each router chooses once",
            got=f"nothing from {', '.join(tap.sites[index].name for index in lacking)}",
            fix="Something computes these layers without their routers, or the forward failed and was not tried again.",
        )


def _require_model(routes: AlignedRoutes, tap: ModelTap, name: str) -> None:
    routes.layout.require_same(tap.layout, f"the model ({name})")
    if routes.fingerprint and routes.fingerprint != tap.fingerprint:
        raise LayoutMismatchError(
            f"the traces were recorded on another model than {name}",
            expected=f"fingerprint {tap.fingerprint[:16]}...",
            got=f"{routes.fingerprint[:16]}...",
            fix="Replay with the architecture and vocabulary that generated the rollout.",
        )
    if routes.margin is not None and tap.in_turn:
        raise ReplayError(
            f"{name} chooses its experts in turn, so a margin between the K-th and the next score means nothing",
            expected="routes without a margin",
            got=f"margin {routes.margin}",
        )
    if routes.order != "rank" and tap.in_turn:
        raise ReplayError(
            f"{name} weighs an expert by which were chosen before it, and the traces do not say that",
            expected="order 'rank'",
            got=f"order {routes.order!r}",
            fix="Record with an engine that keeps the ids in rank order.",
        )
