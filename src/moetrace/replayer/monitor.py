"""Always-on statistics of a replay: does the live router agree with the routes it is given?

A correct record agrees with the live router almost everywhere, and worse with every neighbour's row. Routes that are
off by one pass every shape check, but fit better when shifted back: that is what the alarm looks for. All counting
happens on the model's device without waiting for it; only `stats` waits.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrace.replayer.align import AlignedRoutes, TokenMode

SHIFT_MARGIN = 0.05
"""Shifted routes must fit better than the given ones by this much overlap to raise the alarm."""
SHIFT_MIN_ROWS = 32
"""Fewer neighbouring rows than this prove nothing."""

_HITS, _SAME, _PAIRS, _GIVEN_LATER, _EARLIER, _GIVEN_EARLIER, _LATER = range(7)


@dataclass(frozen=True)
class ReplayStats:
    """What a replay did, pooled over its forwards (recomputations do not count).

    Attributes:
        forwards: forward passes seen.
        replayed_tokens, live_tokens, padding_tokens: tokens of each mode in one forward.
        overlap: mean share of the K live choices that the replayed row has too, 0..1; NaN when nothing was replayed.
        router_mismatch: share of (token, layer) pairs where the live router would have chosen another set.
        token_mismatch: share of replayed tokens where it would have in at least one layer.
        overlap_per_layer: `overlap` of each MoE layer.
        neighbour_rows: adjacent rows on which the two shifts were judged.
        shift_gain: largest gain in overlap from replaying row t - 1 ("earlier") or t + 1 ("later") at token t;
            negative when the given rows fit best.
        best_shift: "earlier" or "later".
    """

    forwards: int
    replayed_tokens: int
    live_tokens: int
    padding_tokens: int
    overlap: float
    router_mismatch: float
    token_mismatch: float
    overlap_per_layer: tuple[float, ...]
    neighbour_rows: int
    shift_gain: float
    best_shift: str

    @property
    def shifted(self) -> bool:
        """True when the routes fit the live router better shifted by one token than as given."""
        return self.neighbour_rows >= SHIFT_MIN_ROWS and self.shift_gain > SHIFT_MARGIN


class OverlapMonitor:
    """Counts, for one batch, how live choices and replayed rows agree."""

    def __init__(self, routes: AlignedRoutes) -> None:
        self._routes = routes
        self._forwards = 0
        self._counts: dict[int, torch.Tensor] = {}
        self._differs: dict[int, torch.Tensor] = {}
        self._masks: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def forwards(self) -> int:
        """Forward passes seen so far; known without waiting."""
        return self._forwards

    def observe(self, layer: int, live_NK: torch.Tensor, given_NK: torch.Tensor) -> None:
        """Count one layer of one forward. No host synchronisation."""
        if layer == 0:
            self._forwards += 1
        replayed_N, follows_N = self._device_masks(live_NK.device)
        hits_N = _shared(live_NK, given_NK)
        same_N = hits_N == given_NK.shape[1]
        pair = follows_N[1:]  # pair n: tokens n and n + 1 of one sequence
        counts = torch.stack(
            [
                (hits_N * replayed_N).sum(),
                (same_N & replayed_N).sum(),
                pair.sum(),
                (hits_N[1:] * pair).sum(),
                (_shared(live_NK[1:], given_NK[:-1]) * pair).sum(),
                (hits_N[:-1] * pair).sum(),
                (_shared(live_NK[:-1], given_NK[1:]) * pair).sum(),
            ]
        )
        differs_N = ~same_N & replayed_N
        if layer in self._counts:
            self._counts[layer] += counts
            self._differs[layer] |= differs_N
        else:
            self._counts[layer], self._differs[layer] = counts, differs_N

    def stats(self) -> ReplayStats:
        """Everything counted so far. Waits for the device."""
        routes, top_k = self._routes, self._routes.layout.top_k
        replayed = routes.count(TokenMode.REPLAY)
        counts = torch.stack([self._counts[layer].cpu() for layer in sorted(self._counts)] or [torch.zeros(7)])
        total = counts.sum(0).tolist()
        seen = self._forwards * replayed * len(self._counts)
        pairs = max(total[_PAIRS] * top_k, 1)
        gains = {
            "earlier": (total[_EARLIER] - total[_GIVEN_LATER]) / pairs,
            "later": (total[_LATER] - total[_GIVEN_EARLIER]) / pairs,
        }
        best = max(gains, key=lambda shift: gains[shift])
        differs = torch.zeros(routes.num_tokens, dtype=torch.bool)
        for differs_N in self._differs.values():
            differs |= differs_N.cpu()
        return ReplayStats(
            forwards=self._forwards,
            replayed_tokens=replayed,
            live_tokens=routes.count(TokenMode.LIVE),
            padding_tokens=routes.count(TokenMode.PADDING),
            overlap=_share(total[_HITS], seen * top_k),
            router_mismatch=_share(seen - total[_SAME], seen),
            token_mismatch=_share(int(differs.sum()), replayed if seen else 0),
            overlap_per_layer=tuple(
                _share(hits, self._forwards * replayed * top_k) for hits in counts[:, _HITS].tolist()
            ),
            neighbour_rows=int(total[_PAIRS]) // max(self._forwards * max(len(self._counts), 1), 1),
            shift_gain=gains[best],
            best_shift=best,
        )

    def _device_masks(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._masks:
            replayed_N = torch.from_numpy(self._routes.mode_N == TokenMode.REPLAY)
            follows_N = torch.from_numpy(self._routes.follows_N)
            self._masks[device] = (replayed_N.to(device, non_blocking=True), follows_N.to(device, non_blocking=True))
        return self._masks[device]


def _share(count: float, of: int) -> float:
    """A share of nothing is not a number."""
    return count / of if of else float("nan")


def _shared(a_NK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """`[N]` how many ids two routes share."""
    return (a_NK[:, :, None] == b_NK[:, None, :]).any(-1).sum(-1)
