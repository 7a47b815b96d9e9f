"""Always-on statistics of a replay: does the live router agree with the routes it is given?

A correct record agrees with the live router almost everywhere, and worse with every neighbour's row. Routes that are
off by one pass every shape check, but fit better when shifted back: that is what the alarm looks for. All counting
happens on the model's device without waiting for it; only `counts` waits.

Axes: L MoE layers, N tokens of the batch, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from moetrace.replayer.counts import (
    SEQUENCE_SHIFT_MARGIN,
    Findings,
    ReplayCounts,
    SequenceShift,
    looks_shifted,
)
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.replayer.tokens import TokenCheck
from moetrace.replayer.upload import RoutesUpload

_MAX_PAIRS = 1 << 26
"""Pairs of expert ids compared at once: what bounds the memory of counting."""

_HITS, _SAME, _GIVEN_LATER, _EARLIER, _GIVEN_EARLIER, _LATER, _SUPPLIED, _REPLACED = range(8)


class OverlapMonitor:
    """Counts, for one batch, how live choices and replayed rows agree.

    A layer costs one small copy while the forward runs; the counting waits until the forward is over, and is done for
    all layers at once.

    Attributes:
        tokens: whether the model is called with the tokens that were aligned; what it finds is sent with the counts.
    """

    def __init__(self, routes: AlignedRoutes, upload: RoutesUpload | None = None) -> None:
        self._routes = routes
        self._upload = upload or RoutesUpload(routes)
        self.tokens = TokenCheck(routes, self._upload)
        self._forwards = 0
        self._live: dict[int, torch.Tensor] = {}
        self._used: dict[int, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._differs_N: torch.Tensor | None = None
        self._gains_2N: torch.Tensor | None = None

    @property
    def forwards(self) -> int:
        """Whole forward passes seen so far; known without waiting."""
        return self._forwards + (bool(self._live) and not self.lacking)

    @property
    def lacking(self) -> list[int]:
        """Numbers of the layers that the last forward has not come to; none where it is whole, or none ran."""
        layers = range(self._routes.layout.num_layers)
        return [layer for layer in layers if layer not in self._live] if self._live else []

    def observe(self, layer: int, live_NK: torch.Tensor, used_N: torch.Tensor) -> None:
        """Keep one layer's live choice of one forward, and which tokens got the row instead. No synchronisation."""
        if len(self._live) == self._routes.layout.num_layers:
            self._count()
        elif layer in self._live:  # the forward before failed half way and is tried again
            self._live, self._used = {}, {}
        self._live[layer] = live_NK.to(torch.int32 if self._routes.layout.num_experts > 1 << 15 else torch.int16)
        self._used[layer] = used_N

    def _count(self) -> None:
        """Count the layers of the forward that has just ended, if it is whole, on the device of its first layer."""
        if not self._live or self.lacking:
            return
        self._forwards += 1
        layers = sorted(self._live)
        _, _, given_LNK, replayed_N, follows_N = self._upload.on(self._live[layers[0]].device)
        differs_N = torch.zeros_like(replayed_N)
        at_once = max(1, _MAX_PAIRS // max(given_LNK[0].numel() * given_LNK.shape[2], 1))
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            live_LNK, used_LN = (
                torch.stack([kept[layer].to(given_LNK.device) for layer in some]) for kept in (self._live, self._used)
            )
            rows_LNK = torch.stack([given_LNK[layer] for layer in some])  # indexing by a list would wait for its copy
            counts_L8, differ_N, gains_2N = _compare(
                live_LNK, rows_LNK.to(live_LNK.dtype), used_LN, replayed_N, follows_N
            )
            differs_N |= differ_N
            self._gains_2N = gains_2N if self._gains_2N is None else self._gains_2N + gains_2N.to(self._gains_2N.device)
            for layer, counts in zip(some, counts_L8, strict=True):
                self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        self._differs_N = differs_N if self._differs_N is None else self._differs_N | differs_N
        self._live, self._used = {}, {}

    def send(self) -> Callable[[], Findings]:
        """Send everything counted so far to the host; the result waits until it is there. No synchronisation here."""
        self._count()
        forwards, layers = self._forwards, range(self._routes.layout.num_layers)
        device = torch.device("cpu") if self._differs_N is None else self._differs_N.device
        nothing = torch.zeros(_REPLACED + 1, dtype=torch.int64, device=device)
        differing = nothing[:1] if self._differs_N is None else self._differs_N.sum().expand(1)
        rows = [self._counts.get(layer, nothing) for layer in layers]
        parts = [differing, self.tokens.found(device), *rows, self._gains_of_sequences(device).reshape(-1)]
        arrived = _to_host(torch.cat([part.to(device) for part in parts]))
        return lambda: self._findings(arrived().tolist(), forwards)

    def _findings(self, sent: list[int], forwards: int) -> Findings:
        differing, count, first, *others = sent
        width, layers = _REPLACED + 1, self._routes.layout.num_layers
        counts_L8 = [others[start : start + width] for start in range(0, layers * width, width)]
        shifted = self._shifted(others[layers * width :], forwards)
        counts = self._counts_of(differing, counts_L8, forwards, len(shifted))
        return Findings(counts, shifted, self.tokens.error_of([count, first]))

    @property
    def _num_sequences(self) -> int:
        return int(self._routes.sequence_N.max(initial=0)) + 1

    def _gains_of_sequences(self, device: torch.device) -> torch.Tensor:
        """`[2, sequences]`: what each would gain by earlier and by later rows, in ids. No synchronisation."""
        gains = torch.zeros((2, self._num_sequences), dtype=torch.int64, device=device)
        if self._gains_2N is None:
            return gains
        return gains.index_add_(1, self._upload.on(device).sequence_N[1:], self._gains_2N.to(device))

    def _shifted(self, gains: list[int], forwards: int) -> tuple[SequenceShift, ...]:
        routes, sequences = self._routes, self._num_sequences
        rows = np.bincount(routes.sequence_N[routes.follows_N], minlength=sequences).tolist()
        ids = forwards * routes.layout.num_layers * routes.layout.top_k
        found = [
            SequenceShift(number, rows[number], gains[place * sequences + number] / (ids * rows[number]), shift)
            for number in range(sequences)
            if forwards and rows[number]
            for place, shift in enumerate(("earlier", "later"))
        ]
        return tuple(one for one in found if looks_shifted(one.neighbour_rows, one.gain, SEQUENCE_SHIFT_MARGIN))

    def _counts_of(
        self, differing_tokens: int, counts_L8: list[list[int]], forwards: int, shifted_sequences: int
    ) -> ReplayCounts:
        total = [sum(column) for column in zip(*counts_L8, strict=True)]
        routes = self._routes
        replayed, neighbours = routes.count(TokenMode.REPLAY), int(routes.follows_N.sum())
        return ReplayCounts(
            top_k=routes.layout.top_k,
            forwards=forwards,
            replayed_tokens=replayed,
            live_tokens=routes.count(TokenMode.LIVE),
            padding_tokens=routes.count(TokenMode.PADDING),
            differing_tokens=differing_tokens,
            neighbour_rows=neighbours,
            compared_tokens=forwards * replayed,
            compared_neighbours=forwards * neighbours,
            same_routers=total[_SAME],
            hits_L=tuple(counts[_HITS] for counts in counts_L8),
            earlier_gain=total[_EARLIER] - total[_GIVEN_LATER],
            later_gain=total[_LATER] - total[_GIVEN_EARLIER],
            supplied_routers=total[_SUPPLIED],
            replaced_routers=total[_REPLACED],
            shifted_sequences=shifted_sequences,
        )


def _to_host(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin a copy to the host, behind what is queued on the device; the result waits for it, unless it is there."""
    if values.device.type != "cuda":
        return values.cpu
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))

    def arrived() -> torch.Tensor:
        if not event.query():
            event.synchronize()
        return copy

    return arrived


def _compare(
    live_LNK: torch.Tensor,
    given_LNK: torch.Tensor,
    used_LN: torch.Tensor,
    replayed_N: torch.Tensor,
    follows_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[L, 8]` counts; `[N]` bool, tokens that differ in some layer; `[2, N - 1]`, what each pair would gain."""
    hits_LN = _shared(live_LNK, given_LNK)
    same_LN = hits_LN == given_LNK.shape[2]
    pair = follows_N[1:]  # pair n: tokens n and n + 1 of one sequence
    given_later_LN, given_earlier_LN = hits_LN[:, 1:] * pair, hits_LN[:, :-1] * pair
    earlier_LN = _shared(live_LNK[:, 1:], given_LNK[:, :-1]) * pair
    later_LN = _shared(live_LNK[:, :-1], given_LNK[:, 1:]) * pair
    counts_L8 = torch.stack(
        [
            (hits_LN * replayed_N).sum(1),
            (same_LN & replayed_N).sum(1),
            given_later_LN.sum(1),
            earlier_LN.sum(1),
            given_earlier_LN.sum(1),
            later_LN.sum(1),
            used_LN.sum(1),
            (used_LN & ~same_LN).sum(1),
        ],
        1,
    )
    gains_2N = torch.stack([(earlier_LN - given_later_LN).sum(0), (later_LN - given_earlier_LN).sum(0)])
    return counts_L8, (~same_LN & replayed_N).any(0), gains_2N


def _shared(a_LNK: torch.Tensor, b_LNK: torch.Tensor) -> torch.Tensor:
    """`[L, N]` how many ids two routes share."""
    return (a_LNK[..., :, None] == b_LNK[..., None, :]).any(-1).sum(-1)
