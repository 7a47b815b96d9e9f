"""What a replay counts, as whole numbers that add up over microbatches and ranks, and the shares that follow.

Axis: L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moetrace.errors import LayoutMismatchError, TokenMismatchError

SHIFT_MARGIN = 0.05
"""Shifted routes must fit better than the given ones by this much overlap to raise the alarm."""
SEQUENCE_SHIFT_MARGIN = 0.2
"""The same of one sequence by itself. A wrong one gains more where experts depend on tokens; a short one that repeats a
token, or noise between two numerics, gains a little by chance, and with many sequences some always do."""
SHIFT_MIN_ROWS = 32
"""Fewer neighbouring rows than this prove nothing."""


@dataclass(frozen=True)
class ReplayStats:
    """What a replay did, pooled over its forwards (recomputations do not count), and over ranks where asked.

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
        shifted_sequences: how many sequences fit clearly better when shifted, each judged by itself.
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
    shifted_sequences: int

    @property
    def coverage(self) -> float:
        """Share of the tokens that are not padding that have a row to replay."""
        return _share(self.replayed_tokens, self.replayed_tokens + self.live_tokens)

    @property
    def shifted(self) -> bool:
        """Whether the routes, or those of one sequence, fit clearly better shifted by one token than as given."""
        return looks_shifted(self.neighbour_rows, self.shift_gain) or self.shifted_sequences > 0


def looks_shifted(neighbour_rows: int, gain: float, margin: float = SHIFT_MARGIN) -> bool:
    """Whether so many rows that gain so much overlap when shifted are beyond chance."""
    return neighbour_rows >= SHIFT_MIN_ROWS and gain > margin


@dataclass(frozen=True)
class ReplayCounts:
    """Counts from which `ReplayStats` follow; add those of several batches, or of several ranks, to pool them.

    Attributes:
        top_k: K.
        forwards: forward passes.
        replayed_tokens, live_tokens, padding_tokens: tokens of each mode in one forward of each batch.
        differing_tokens: replayed tokens of a batch whose live choice was another set in some layer of some forward.
        neighbour_rows: adjacent replayed rows of one sequence, in one forward of each batch.
        compared_tokens: replayed tokens times forwards.
        compared_neighbours: neighbouring rows times forwards.
        same_routers: (token, layer) pairs of all forwards whose live choice was the replayed set.
        hits_L: experts that live choice and replayed row share, over `compared_tokens`.
        earlier_gain: experts that the live choices of later neighbours share with the earlier row, minus those they
            share with their own, over all layers.
        later_gain: the same of earlier neighbours and the later row.
        supplied_routers: (token, layer) pairs of all forwards whose router got the row.
        replaced_routers: those of them whose live choice was another set.
        shifted_sequences: sequences of each batch that, over all forwards, fit clearly better shifted by one token.
    """

    top_k: int
    forwards: int
    replayed_tokens: int
    live_tokens: int
    padding_tokens: int
    differing_tokens: int
    neighbour_rows: int
    compared_tokens: int
    compared_neighbours: int
    same_routers: int
    hits_L: tuple[int, ...]
    earlier_gain: int
    later_gain: int
    supplied_routers: int
    replaced_routers: int
    shifted_sequences: int

    def __add__(self, other: ReplayCounts) -> ReplayCounts:
        """The counts of both.

        Raises:
            LayoutMismatchError: they are of other numbers of layers or experts per token.
        """
        if (self.top_k, len(self.hits_L)) != (other.top_k, len(other.hits_L)):
            raise LayoutMismatchError(
                "counts of different models do not add up",
                expected=f"{len(self.hits_L)} layers, top_k={self.top_k}",
                got=f"{len(other.hits_L)} layers, top_k={other.top_k}",
                fix="Pool over batches, and over ranks that hold the same layers.",
            )
        names = [field.name for field in fields(self) if field.name not in ("top_k", "hits_L")]
        return ReplayCounts(
            top_k=self.top_k,
            hits_L=tuple(mine + theirs for mine, theirs in zip(self.hits_L, other.hits_L, strict=True)),
            **{name: getattr(self, name) + getattr(other, name) for name in names},
        )

    @property
    def _seen(self) -> int:
        """(token, layer) pairs of all forwards that had a row to replay."""
        return self.compared_tokens * len(self.hits_L)

    def agreement(self) -> dict[str, tuple[int, int]]:
        """`overlap`, `router_mismatch` and `token_mismatch` of `stats`, each as a count and what it is a share of."""
        return {
            "overlap": (sum(self.hits_L), self._seen * self.top_k),
            "router_mismatch": (self._seen - self.same_routers, self._seen),
            "token_mismatch": (self.differing_tokens, self.replayed_tokens if self._seen else 0),
        }

    def stats(self) -> ReplayStats:
        """The shares that follow. Those of a sum are exact: no mean of means."""
        seen = self._seen
        pairs = max(self.compared_neighbours * len(self.hits_L) * self.top_k, 1)
        gains = {"earlier": self.earlier_gain / pairs, "later": self.later_gain / pairs}
        best = max(gains, key=lambda shift: gains[shift])
        return ReplayStats(
            forwards=self.forwards,
            replayed_tokens=self.replayed_tokens,
            live_tokens=self.live_tokens,
            padding_tokens=self.padding_tokens,
            **{name: _share(*sums) for name, sums in self.agreement().items()},
            overlap_per_layer=tuple(_share(hits, self.compared_tokens * self.top_k) for hits in self.hits_L),
            neighbour_rows=self.neighbour_rows if self.compared_neighbours else 0,
            shift_gain=gains[best],
            best_shift=best,
            supplied=_share(self.supplied_routers, seen),
            replaced=_share(self.replaced_routers, seen),
            shifted_sequences=self.shifted_sequences,
        )


@dataclass(frozen=True)
class SequenceShift:
    """One sequence that fits better shifted by one token.

    Attributes:
        sequence: its number in the batch that was aligned.
        neighbour_rows: adjacent rows of it on which it was judged.
        gain: in overlap, as `ReplayStats.shift_gain`.
        best_shift: "earlier" or "later".
    """

    sequence: int
    neighbour_rows: int
    gain: float
    best_shift: str


@dataclass(frozen=True)
class Findings:
    """What a monitor has sent to the host.

    Attributes:
        counts: the counts.
        shifted: sequences that look shifted by themselves.
        other_tokens: what to raise where a model was called with other tokens than its routes are of.
    """

    counts: ReplayCounts
    shifted: tuple[SequenceShift, ...]
    other_tokens: TokenMismatchError | None

    def trusted(self) -> ReplayCounts:
        """The counts, or `TokenMismatchError` where they are of other tokens."""
        if self.other_tokens is not None:
            raise self.other_tokens
        return self.counts


def _share(count: int, of: int) -> float:
    """A share of nothing is not a number."""
    return count / of if of else float("nan")
