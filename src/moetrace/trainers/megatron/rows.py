"""From the routes of a batch to the rows that one rank's routers see, with every check that needs no forward.

Megatron-Core's activations are `[S, B, H]`, so a router sees its tokens column by column, and under sequence
parallelism only its rank's columns.

Axes: L MoE layers on this rank, N tokens, K experts per token, B rows and S columns of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moetrace.errors import InvalidTraceError, ReplayError
from moetrace.replayer.ranks import pipeline, sequence_parallel
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.sorting import first_repeat
from moetrace.trainers.megatron.routers import LocalRouter, LocalRouters


@dataclass(frozen=True)
class RankRows:
    """The routes of a rank's tokens and layers.

    Attributes:
        batch: in the memory order of the rank's batch, where the routes given were a batch; otherwise as they were.
    """

    batch: AlignedRoutes

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each decoder layer is on axis L."""
        return {layer: place for place, layer in enumerate(self.batch.layout.layers)}

    def in_router_order(self) -> AlignedRoutes:
        """The same in the order in which routers see them."""
        return self.batch if self.batch.shape is None else self.batch.sequence_first()


def rows_of_rank(routes: AlignedRoutes, routers: LocalRouters) -> RankRows | None:
    """The rows for a rank's routers; None where it has dense layers only.

    Args:
        routes: of the tokens that the model is called with on this rank, of all layers or at least of the rank's own.
            Routes with a `shape` are a batch in memory order: they are put into Megatron-Core's order, and cut for
            sequence parallelism where the model uses it. Routes without are taken as they are.
        routers: the rank's.

    Raises:
        LayoutMismatchError: the routes are of another model, or a layer of this rank has none.
        InvalidTraceError: an id is out of range or twice in a row, or shapes do not fit each other.
        ReplayError: the batch cannot be cut, or the routes have a margin.
    """
    routers.require_layers(routes.layout)
    if routes.margin is not None:
        raise ReplayError(
            "a replay by margin is not there for Megatron-Core",
            expected="routes without a margin",
            got=f"margin {routes.margin}",
            fix="Align without ReplayPolicy(margin=...).",
        )
    if not routers.all:
        return None
    _require_form(routes)
    local = pipeline(routes, routers.layers)
    assert local is not None, "require_layers has found them"
    _require_ids(local)
    rank, size = sequence_ranks(routers.all[0])
    if local.shape is not None and size > 1:
        local = sequence_parallel(local, rank, size)
    return RankRows(local)


def sequence_ranks(router: LocalRouter) -> tuple[int, int]:
    """Rank and size of the group that a router's tokens are split over; (0, 1) without sequence parallelism."""
    if not router.module.config.sequence_parallel:
        return 0, 1
    group = router.module.tp_group
    return group.rank(), group.size()


def _require_form(routes: AlignedRoutes) -> None:
    layout, ids = routes.layout, routes.experts_LNK
    shape = (layout.num_layers, routes.num_tokens, layout.top_k)
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.shape != shape:
        raise InvalidTraceError(
            "the routes are not expert ids [L, N, K] of their layout and modes",
            expected=f"integers of shape {shape}",
            got=f"{getattr(ids, 'dtype', type(ids).__name__)} of shape {getattr(ids, 'shape', None)}",
        )


def _require_ids(routes: AlignedRoutes) -> None:
    """Every replayed row has K distinct ids of this model. Others may hold anything: nobody reads them."""
    replayed_N = np.flatnonzero(routes.mode_N == TokenMode.REPLAY)
    for layer, ids_NK in zip(routes.layout.layers, routes.experts_LNK, strict=True):
        rows_NK = ids_NK if len(replayed_N) == len(ids_NK) else ids_NK[replayed_N]
        if not rows_NK.size:
            return
        wrong_N = ((rows_NK < 0) | (rows_NK >= routes.layout.num_experts)).any(1)
        if wrong_N.any():
            row = int(wrong_N.argmax())
            raise InvalidTraceError(
                f"token {replayed_N[row]} has an expert id that does not exist in layer {layer}",
                expected=f"0 <= id < {routes.layout.num_experts}",
                got=rows_NK[row].tolist(),
            )
        if (repeat := first_repeat(rows_NK)) is not None:
            raise InvalidTraceError(
                f"token {replayed_N[repeat]} has an expert twice in layer {layer}",
                expected=f"{routes.layout.top_k} distinct ids",
                got=rows_NK[repeat].tolist(),
            )
