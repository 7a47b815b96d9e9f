"""Always-on statistics of a replay: does the live router agree with the routes it is given?

A correct record agrees with the live router almost everywhere, and worse with every neighbour's row. Routes that are
off by one pass every shape check, but fit better when shifted back: that is what the alarm looks for. All counting
happens on the model's device without waiting for it; only `stats` waits.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

import torch

from moetrace.replayer.align import AlignedRoutes, TokenMode
from moetrace.replayer.counts import ReplayCounts

_MAX_PAIRS = 1 << 26
"""Pairs of expert ids compared at once: what bounds the memory of counting."""

_HITS, _SAME, _GIVEN_LATER, _EARLIER, _GIVEN_EARLIER, _LATER = range(6)


class OverlapMonitor:
    """Counts, for one batch, how live choices and replayed rows agree.

    A layer costs one small copy while the forward runs; the counting waits until the forward is over, and is done for
    all layers at once.
    """

    def __init__(self, routes: AlignedRoutes) -> None:
        self._routes = routes
        self._forwards = 0
        self._live: dict[int, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._differs_N: torch.Tensor | None = None
        self._on_device: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def forwards(self) -> int:
        """Forward passes seen so far; known without waiting."""
        return self._forwards

    def observe(self, layer: int, live_NK: torch.Tensor) -> None:
        """Keep one layer's live choice of one forward. No host synchronisation."""
        if not self._live or layer in self._live:  # a new forward; which router is its first, no number tells
            self._count()
            self._forwards += 1
        self._live[layer] = live_NK.to(torch.int16)

    def _count(self) -> None:
        """Count the layers of the forward that has just ended, on the device of its first layer."""
        if not self._live:
            return
        layers = sorted(self._live)
        given_LNK, replayed_N, follows_N = self._routes_on(self._live[layers[0]].device)
        differs_N = torch.zeros_like(replayed_N)
        at_once = max(1, _MAX_PAIRS // max(given_LNK[0].numel() * given_LNK.shape[2], 1))
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            live_LNK = torch.stack([self._live[layer].to(given_LNK.device) for layer in some])
            of_some_LNK = torch.stack([given_LNK[layer] for layer in some])  # given_LNK[some] would wait for the device
            counts_L6, differ_N = _compare(live_LNK, of_some_LNK, replayed_N, follows_N)
            differs_N |= differ_N
            for layer, counts in zip(some, counts_L6, strict=True):
                self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        self._differs_N = differs_N if self._differs_N is None else self._differs_N | differs_N
        self._live = {}

    def counts(self) -> ReplayCounts:
        """Everything counted so far. Waits for the device, once."""
        self._count()
        routes, layers = self._routes, range(self._routes.layout.num_layers)
        nothing = torch.zeros(6, dtype=torch.int64)
        differing = torch.zeros(6, dtype=torch.int64) if self._differs_N is None else self._differs_N.sum().expand(6)
        rows = [differing, *(self._counts.get(layer, nothing) for layer in layers)]
        (differing_tokens, *_), *counts_L6 = torch.stack([row.to(differing.device) for row in rows]).tolist()
        total = [sum(column) for column in zip(*counts_L6, strict=True)]
        replayed, neighbours = routes.count(TokenMode.REPLAY), int(routes.follows_N.sum())
        return ReplayCounts(
            top_k=routes.layout.top_k,
            forwards=self._forwards,
            replayed_tokens=replayed,
            live_tokens=routes.count(TokenMode.LIVE),
            padding_tokens=routes.count(TokenMode.PADDING),
            differing_tokens=differing_tokens,
            neighbour_rows=neighbours,
            compared_tokens=self._forwards * replayed,
            compared_neighbours=self._forwards * neighbours,
            same_routers=total[_SAME],
            hits_L=tuple(counts[_HITS] for counts in counts_L6),
            earlier_gain=total[_EARLIER] - total[_GIVEN_LATER],
            later_gain=total[_LATER] - total[_GIVEN_EARLIER],
        )

    def _routes_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._on_device is None:
            routes = self._routes
            arrays = (routes.experts_LNK.astype("int16"), routes.mode_N == TokenMode.REPLAY, routes.follows_N)
            given_LNK, replayed_N, follows_N = (torch.from_numpy(array) for array in arrays)
            if device.type == "cuda":
                given_LNK, replayed_N, follows_N = (t.pin_memory() for t in (given_LNK, replayed_N, follows_N))
            self._on_device = (
                given_LNK.to(device, non_blocking=True),
                replayed_N.to(device, non_blocking=True),
                follows_N.to(device, non_blocking=True),
            )
        return self._on_device


def _compare(
    live_LNK: torch.Tensor, given_LNK: torch.Tensor, replayed_N: torch.Tensor, follows_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[L, 6]` counts, and `[N]` bool: tokens that differ in any of these layers."""
    hits_LN = _shared(live_LNK, given_LNK)
    same_LN = hits_LN == given_LNK.shape[2]
    pair = follows_N[1:]  # pair n: tokens n and n + 1 of one sequence
    counts_L6 = torch.stack(
        [
            (hits_LN * replayed_N).sum(1),
            (same_LN & replayed_N).sum(1),
            (hits_LN[:, 1:] * pair).sum(1),
            (_shared(live_LNK[:, 1:], given_LNK[:, :-1]) * pair).sum(1),
            (hits_LN[:, :-1] * pair).sum(1),
            (_shared(live_LNK[:, :-1], given_LNK[:, 1:]) * pair).sum(1),
        ],
        1,
    )
    return counts_L6, (~same_LN & replayed_N).any(0)


def _shared(a_LNK: torch.Tensor, b_LNK: torch.Tensor) -> torch.Tensor:
    """`[L, N]` how many ids two routes share."""
    return (a_LNK[..., :, None] == b_LNK[..., None, :]).any(-1).sum(-1)
