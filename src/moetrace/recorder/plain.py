"""Record plain forwards of a model: `with record(model) as recording: model(...)`.

Axes: L MoE layers, N tokens of a forward (a padded batch counts its padding), K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrace.batch import TokenBatch, batch_of, to_numpy
from moetrace.errors import RouterError, TokenMismatchError
from moetrace.routers import ModelTap, RoutingSession, Selection, tap_model
from moetrace.routers.inputs import placeholders_of, token_ids_of
from moetrace.tokens import first_difference
from moetrace.trace import Order, RoutingTrace


class Recording(RoutingSession):
    """The routes of the last forward that ran while this was active, on this thread, in this model.

    What is kept is what the experts received: under a replay, the replayed ids.
    """

    def __init__(self, tap: ModelTap, placeholders: Collection[int] = ()) -> None:
        self._tap, self._placeholders = tap, list(placeholders)
        self._ids: dict[int, torch.Tensor] = {}
        self._order: Order = "rank"
        self._tokens: torch.Tensor | None = None
        self._next_tokens: torch.Tensor | None = None

    def on_tokens(self, ids: torch.Tensor) -> None:
        """Keep the token ids of the forward that begins."""
        self._next_tokens = ids.detach().clone()

    def on_selection(self, selection: Selection) -> None:
        if selection.recompute:
            return
        if not self._ids or selection.site.index in self._ids:  # a new forward; which router is first, no number tells
            self._ids, self._order = {}, "rank"
            self._tokens, self._next_tokens = self._next_tokens, None
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
                "no whole forward was recorded",
                expected=f"{len(self._tap.sites)} layers",
                got=f"{len(self._ids)}",
                fix="Call the very model given to record inside the context, on this thread.",
            )
        return torch.stack([self._ids[index].to(self._ids[0].device) for index in range(len(self._ids))])

    def traces(
        self, input_ids: Any, *, attention_mask: Any = None, position_ids: Any = None, cu_seqlens: Any = None
    ) -> list[RoutingTrace]:
        """One trace for each sequence of the batch, with a row for every token; see `batch_of` for the arguments.

        Raises:
            RouterError: no whole forward ran, or one of another size.
            TokenMismatchError: it ran on other tokens. A model that was called with `inputs_embeds` tells none.
            ReplayError: the arguments contradict each other.
        """
        batch = batch_of(input_ids, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens)
        tokens_N = batch.tokens_N
        experts_NLK = to_numpy(self.experts_LNK).transpose(1, 0, 2)
        if len(experts_NLK) != len(tokens_N):
            raise RouterError(
                "the batch is not the one that ran",
                expected=f"{len(experts_NLK)} tokens",
                got=len(tokens_N),
                fix="Pass the batch of the last forward; model.generate has recorder.generation.record_generation.",
            )
        self._require_tokens(batch)
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

    def _require_tokens(self, batch: TokenBatch) -> None:
        """Other tokens of the same number would have rows that are not theirs."""
        if self._tokens is None or self._tokens.ndim != 2 or self._tokens.numel() != len(batch.tokens_N):
            return  # the model was told no ids, or not those of the routers' tokens
        tokens_N = batch.tokens_N
        ran_N = np.where(np.isin(tokens_N, self._placeholders), tokens_N, to_numpy(self._tokens).reshape(-1))
        for number, segment in enumerate(batch.segments):
            ran, given = (ids_N[segment.start : segment.stop] for ids_N in (ran_N, tokens_N))
            position = first_difference(ran, given)
            if position is not None:
                raise TokenMismatchError(
                    f"the model ran on other tokens than sequence {number}: first difference at position {position}",
                    expected=f"token {ran[position]}",
                    got=f"token {given[position]}",
                    fix="Pass the very batch of the forward: its rows in their order, its padding on the same side.",
                )


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the routes of the forwards that this thread runs through `model` inside the context.

    Raises:
        NotMoeError, UnsupportedRouterError: the model cannot be recorded.
    """
    tap = tap_model(model)
    recording = Recording(tap, placeholders_of(model))
    with tap.active(recording), token_ids_of(model, recording.on_tokens):
        yield recording
