"""Record plain forwards of a model: `with record(model) as recording: model(...)`.

Axes: L MoE layers, N tokens of a forward (a padded batch counts its padding), K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moetrace.batch import batch_of, to_numpy
from moetrace.errors import RouterError
from moetrace.routers import ModelTap, RoutingSession, Selection, tap_model
from moetrace.trace import Order, RoutingTrace


class Recording(RoutingSession):
    """The routes of the last forward that ran while this was active, on this thread, in this model.

    What is kept is what the experts received: under a replay, the replayed ids.
    """

    def __init__(self, tap: ModelTap) -> None:
        self._tap = tap
        self._ids: dict[int, torch.Tensor] = {}
        self._order: Order = "rank"

    def on_selection(self, selection: Selection) -> None:
        if selection.recompute:
            return
        if selection.site.index in self._ids:  # a new forward; which router is its first, no number tells
            self._ids, self._order = {}, "rank"
        self._ids[selection.site.index] = selection.indices_NK.detach().clone()
        if not selection.sorted:
            self._order = "set"

    @property
    def experts_LNK(self) -> torch.Tensor:
        """`[L, N, K]` int64, on the model's device.

        Raises:
            RouterError: no whole forward ran.
        """
        if len(self._ids) != len(self._tap.sites):
            raise RouterError(
                "no whole forward was recorded", expected=f"{len(self._tap.sites)} layers", got=f"{len(self._ids)}"
            )
        return torch.stack([self._ids[index].to(self._ids[0].device) for index in range(len(self._ids))])

    def traces(
        self, input_ids: Any, *, attention_mask: Any = None, position_ids: Any = None, cu_seqlens: Any = None
    ) -> list[RoutingTrace]:
        """One trace for each sequence of the batch, with a row for every token; see `batch_of` for the arguments."""
        batch = batch_of(input_ids, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens)
        tokens_N = batch.tokens_N
        experts_NLK = to_numpy(self.experts_LNK).transpose(1, 0, 2)
        if len(experts_NLK) != len(tokens_N):
            raise RouterError(
                "the batch is not the one that ran", expected=f"{len(experts_NLK)} tokens", got=len(tokens_N)
            )
        return [
            RoutingTrace.build(
                experts_NLK[segment.start : segment.stop],
                self._tap.layout,
                tokens_N[segment.start : segment.stop],
                order=self._order,
                fingerprint=self._tap.fingerprint,
                engine=f"torch {torch.__version__}",
            )
            for segment in batch.segments
        ]


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the routes of the forwards that this thread runs through `model` inside the context.

    Raises:
        NotMoeError, UnsupportedRouterError: the model cannot be recorded.
    """
    tap = tap_model(model)
    recording = Recording(tap)
    with tap.active(recording):
        yield recording
