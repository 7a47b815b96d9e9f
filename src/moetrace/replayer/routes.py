"""The routes of a batch, token by token: what `align` makes, ranks slice and a replay supplies.

Axes: N tokens in the order in which the routers see them, L MoE layers, K experts per token, B rows and S columns of a
batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moetrace.errors import ReplayError
from moetrace.layout import MoeLayout
from moetrace.trace import Order

Pad = Literal["distinct", "first", "missing"]


class TokenMode(IntEnum):
    """What the router of a token does."""

    PADDING = 0
    """Not a token of any sequence: routed live, counted nowhere."""
    LIVE = 1
    """No row exists, or the policy leaves it out: routed live, with permission."""
    REPLAY = 2
    """Routed as recorded."""


@dataclass(frozen=True)
class AlignedRoutes:
    """The rows of a batch's traces at the places of its tokens.

    Attributes:
        experts_LNK: `[L, N, K]`, dtype `layout.dtype`, C order, zeros where nothing is replayed.
        mode_N: `[N]` uint8 of `TokenMode`.
        sequence_N: `[N]` int32, the number of the token's sequence in the batch that was aligned; -1 for padding.
        position_N: `[N]` int32, its position in that sequence; -1 for padding.
        layout: the layers in `experts_LNK`.
        fingerprint: the traces' model fingerprint, or "" (unknown, or these are the layers of one pipeline stage).
        order: "rank" when the K ids of every trace are best first.
        shape: (B, S) where the N tokens are a batch in memory order, or None where they are in another order.
        margin: a route is replayed only where the live router was closer to a tie than this (`ReplayPolicy`), or None.
        tokens_N: `[N]` int64, the token ids that were aligned, padding included; None where nobody knows them.
    """

    experts_LNK: np.ndarray
    mode_N: np.ndarray
    sequence_N: np.ndarray
    position_N: np.ndarray
    layout: MoeLayout
    fingerprint: str
    order: Order
    shape: tuple[int, int] | None = None
    margin: float | None = None
    tokens_N: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """N, padding included."""
        return len(self.mode_N)

    @cached_property
    def follows_N(self) -> np.ndarray:
        """`[N]` bool, True where token n - 1 precedes token n in one sequence and both are replayed."""
        replayed_N = self.mode_N == TokenMode.REPLAY
        follows_N = np.zeros(self.num_tokens, bool)
        follows_N[1:] = replayed_N[1:] & replayed_N[:-1]
        follows_N[1:] &= self.sequence_N[1:] == self.sequence_N[:-1]
        follows_N[1:] &= self.position_N[1:] == self.position_N[:-1] + 1
        return follows_N

    def count(self, mode: TokenMode) -> int:
        """How many tokens have a mode."""
        return int((self.mode_N == mode).sum())

    def take(self, index_N: Any, *, shape: tuple[int, int] | None = None) -> AlignedRoutes:
        """The routes of some tokens, in the order given.

        Args:
            index_N: which tokens, as numbers 0..N-1, none of them twice.
            shape: (B, S) if what is taken is a batch in memory order again.

        Raises:
            ReplayError: a number is out of range or there twice, or the shape does not fit.
        """
        index_N = np.asarray(index_N)
        if index_N.ndim != 1 or (index_N.size and index_N.dtype.kind not in "iu"):
            raise ReplayError(
                "tokens are taken by their numbers",
                expected="one axis of integers",
                got=f"shape {index_N.shape}, dtype {index_N.dtype}",
            )
        index_N = index_N.astype(np.int64)
        if index_N.size and not 0 <= index_N.min() <= index_N.max() < self.num_tokens:
            raise ReplayError(
                "a token that is not there is taken",
                expected=f"0 <= number < {self.num_tokens}",
                got=f"{index_N.min()}..{index_N.max()}",
            )
        if index_N.size and np.bincount(index_N).max() > 1:
            raise ReplayError(
                "a token is taken twice", expected="distinct numbers", got=int(np.bincount(index_N).argmax())
            )
        if shape is not None and shape[0] * shape[1] != index_N.size:
            raise ReplayError("the shape is not that of the tokens taken", expected=f"{index_N.size} tokens", got=shape)
        return replace(
            self,
            experts_LNK=np.ascontiguousarray(self.experts_LNK[:, index_N]),
            mode_N=self.mode_N[index_N],
            sequence_N=self.sequence_N[index_N],
            position_N=self.position_N[index_N],
            shape=shape,
            tokens_N=None if self.tokens_N is None else self.tokens_N[index_N],
        )

    def sequence_first(self) -> AlignedRoutes:
        """The same tokens in the order `[S, B]`: Megatron-Core's. Slice for ranks before, not after.

        Raises:
            ReplayError: the tokens are no batch in memory order any more.
        """
        rows, columns = self.require_batch()
        return self.take(np.arange(self.num_tokens).reshape(rows, columns).T.reshape(-1))

    def require_batch(self) -> tuple[int, int]:
        """(B, S), or `ReplayError` where the tokens are no batch in memory order."""
        if self.shape is None:
            raise ReplayError(
                "the routes are in no batch's memory order any more",
                expected="routes as align made them, or a slice by context_parallel or sequence_parallel",
                fix="Slice for context and sequence parallel ranks first, then reorder.",
            )
        return self.shape

    def dense(self, pad: Pad = "distinct", dtype: Any = None) -> np.ndarray:
        """Ids for a consumer that has no mode of each token: `[L, N, K]`, filled where nothing is replayed.

        Such a consumer routes padding and live tokens by what stands in their rows. A row of one id K times breaks the
        split sizes of an all-to-all dispatcher or overloads that expert, so the K ids of every row are distinct.

        Args:
            pad: "distinct": token n gets `n * K + k` modulo E, so that fillers load all experts alike. "first": every
                one gets 0..K-1. "missing": -1, for a consumer that takes it as a mark; `dtype` must then be signed.
            dtype: integer type of the result; by default `layout.dtype`, for "missing" int16 (int32 above 32768
                experts).

        Raises:
            ReplayError: the dtype does not hold the ids, or the routes are to be replayed by margin, which only a
                replay at the live router can do.
        """
        if self.margin is not None:
            raise ReplayError(
                "a replay by margin depends on the live router",
                expected="routes without a margin",
                got=f"margin {self.margin}",
                fix="Align without ReplayPolicy(margin=...), or replay with moetrace.replay.",
            )
        num_experts, top_k = self.layout.num_experts, self.layout.top_k
        if pad not in ("distinct", "first", "missing"):
            raise ReplayError("pad is unknown", expected="'distinct', 'first' or 'missing'", got=repr(pad))
        if dtype is None:
            dtype = self.layout.dtype if pad != "missing" else np.int16 if num_experts <= 1 << 15 else np.int32
        dtype = np.dtype(dtype)
        lowest = -1 if pad == "missing" else 0
        if dtype.kind not in "iu" or np.iinfo(dtype).max < num_experts - 1 or np.iinfo(dtype).min > lowest:
            raise ReplayError("the ids do not fit the dtype", expected=f"{lowest}..{num_experts - 1}", got=dtype)
        dense_LNK = self.experts_LNK.astype(dtype)
        other_N = np.flatnonzero(self.mode_N != TokenMode.REPLAY)
        first_N1 = other_N[:, None] * top_k if pad == "distinct" else np.zeros((len(other_N), 1), np.int64)
        filler_NK = np.full((1, top_k), -1) if pad == "missing" else (first_N1 + np.arange(top_k)) % num_experts
        dense_LNK[:, other_N] = filler_NK.astype(dtype)
        return dense_LNK
