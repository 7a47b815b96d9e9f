"""Always-on statistics of a replay: does the live router agree with the routes it is given?

A correct record agrees with the live router almost everywhere, and worse with every neighbour's row. Routes that are
off by one pass every shape check, but fit better when shifted back: that is what the alarm looks for. All counting
happens on the model's device without waiting for it; only `stats` waits.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.replayer.upload import RoutesUpload

SHIFT_MARGIN = 0.05
"""Shifted routes must fit better than the given ones by this much overlap to raise the alarm."""
SHIFT_MIN_ROWS = 32
"""Fewer neighbouring rows than this prove nothing."""
_MAX_PAIRS = 1 << 26
"""Pairs of expert ids compared at once: what bounds the memory of counting."""

_HITS, _SAME, _PAIRS, _GIVEN_LATER, _EARLIER, _GIVEN_EARLIER, _LATER, _SUPPLIED, _REPLACED = range(9)


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
        supplied: share of (token, layer) pairs with a row to replay whose router got it; below 1 with a margin only.
        replaced: share of these pairs whose router got it and would have chosen another set: what the replay changed.
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
    supplied: float
    replaced: float

    @property
    def coverage(self) -> float:
        """Share of the tokens that are not padding that have a row to replay."""
        return _share(self.replayed_tokens, self.replayed_tokens + self.live_tokens)

    @property
    def shifted(self) -> bool:
        """True when the routes fit the live router better shifted by one token than as given."""
        return self.neighbour_rows >= SHIFT_MIN_ROWS and self.shift_gain > SHIFT_MARGIN


class OverlapMonitor:
    """Counts, for one batch, how live choices and replayed rows agree.

    A layer costs one small copy while the forward runs; the counting waits until the forward is over, and is done for
    all layers at once.
    """

    def __init__(self, routes: AlignedRoutes, upload: RoutesUpload | None = None) -> None:
        self._routes = routes
        self._upload = upload or RoutesUpload(routes)
        self._forwards = 0
        self._live: dict[int, torch.Tensor] = {}
        self._used: dict[int, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._differs_N: torch.Tensor | None = None

    @property
    def forwards(self) -> int:
        """Forward passes seen so far; known without waiting."""
        return self._forwards

    def observe(self, layer: int, live_NK: torch.Tensor, used_N: torch.Tensor) -> None:
        """Keep one layer's live choice of one forward, and which tokens got the row instead. No synchronisation."""
        if not self._live or layer in self._live:  # a new forward; which router is its first, no number tells
            self._count()
            self._forwards += 1
        self._live[layer] = live_NK.to(torch.int32 if self._routes.layout.num_experts > 1 << 15 else torch.int16)
        self._used[layer] = used_N

    def _count(self) -> None:
        """Count the layers of the forward that has just ended, on the device of its first layer."""
        if not self._live:
            return
        layers = sorted(self._live)
        given_LNK, replayed_N, follows_N = self._upload.on(self._live[layers[0]].device)
        differs_N = torch.zeros_like(replayed_N)
        at_once = max(1, _MAX_PAIRS // max(given_LNK[0].numel() * given_LNK.shape[2], 1))
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            live_LNK, used_LN = (
                torch.stack([kept[layer].to(given_LNK.device) for layer in some]) for kept in (self._live, self._used)
            )
            rows_LNK = torch.stack([given_LNK[layer] for layer in some])  # indexing by a list would wait for its copy
            counts_L9, differ_N = _compare(live_LNK, rows_LNK.to(live_LNK.dtype), used_LN, replayed_N, follows_N)
            differs_N |= differ_N
            for layer, counts in zip(some, counts_L9, strict=True):
                self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        self._differs_N = differs_N if self._differs_N is None else self._differs_N | differs_N
        self._live, self._used = {}, {}

    def stats(self) -> ReplayStats:
        """Everything counted so far. Waits for the device."""
        self._count()
        routes, top_k = self._routes, self._routes.layout.top_k
        replayed = routes.count(TokenMode.REPLAY)
        counts = torch.stack([self._counts[layer] for layer in sorted(self._counts)] or [torch.zeros(9)]).cpu()
        total = counts.sum(0).tolist()
        seen = self._forwards * replayed * len(self._counts)
        pairs = max(total[_PAIRS] * top_k, 1)
        gains = {
            "earlier": (total[_EARLIER] - total[_GIVEN_LATER]) / pairs,
            "later": (total[_LATER] - total[_GIVEN_EARLIER]) / pairs,
        }
        best = max(gains, key=lambda shift: gains[shift])
        differs = 0 if self._differs_N is None else int(self._differs_N.sum())
        return ReplayStats(
            forwards=self._forwards,
            replayed_tokens=replayed,
            live_tokens=routes.count(TokenMode.LIVE),
            padding_tokens=routes.count(TokenMode.PADDING),
            overlap=_share(total[_HITS], seen * top_k),
            router_mismatch=_share(seen - total[_SAME], seen),
            token_mismatch=_share(differs, replayed if seen else 0),
            overlap_per_layer=tuple(
                _share(hits, self._forwards * replayed * top_k) for hits in counts[:, _HITS].tolist()
            ),
            neighbour_rows=int(total[_PAIRS]) // max(self._forwards * max(len(self._counts), 1), 1),
            shift_gain=gains[best],
            best_shift=best,
            supplied=_share(total[_SUPPLIED], seen),
            replaced=_share(total[_REPLACED], seen),
        )


def _compare(
    live_LNK: torch.Tensor,
    given_LNK: torch.Tensor,
    used_LN: torch.Tensor,
    replayed_N: torch.Tensor,
    follows_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[L, 9]` counts, and `[N]` bool: tokens that differ in any of these layers."""
    hits_LN = _shared(live_LNK, given_LNK)
    same_LN = hits_LN == given_LNK.shape[2]
    pair = follows_N[1:]  # pair n: tokens n and n + 1 of one sequence
    counts_L9 = torch.stack(
        [
            (hits_LN * replayed_N).sum(1),
            (same_LN & replayed_N).sum(1),
            pair.sum().expand(len(hits_LN)),
            (hits_LN[:, 1:] * pair).sum(1),
            (_shared(live_LNK[:, 1:], given_LNK[:, :-1]) * pair).sum(1),
            (hits_LN[:, :-1] * pair).sum(1),
            (_shared(live_LNK[:, :-1], given_LNK[:, 1:]) * pair).sum(1),
            used_LN.sum(1),
            (used_LN & ~same_LN).sum(1),
        ],
        1,
    )
    return counts_L9, (~same_LN & replayed_N).any(0)


def _share(count: float, of: int) -> float:
    """A share of nothing is not a number."""
    return count / of if of else float("nan")


def _shared(a_LNK: torch.Tensor, b_LNK: torch.Tensor) -> torch.Tensor:
    """`[L, N]` how many ids two routes share."""
    return (a_LNK[..., :, None] == b_LNK[..., None, :]).any(-1).sum(-1)
