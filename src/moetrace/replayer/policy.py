"""Which of the rows that exist are replayed: `ReplayPolicy`.

Axes: B rows and S columns of a batch, N = B * S tokens in memory order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moetrace.batch import TokenBatch
from moetrace.errors import ReplayError

Rows = Literal["all", "response", "prompt"]


@dataclass(frozen=True, eq=False)
class ReplayPolicy:
    """Which rows are replayed; all others are routed live, and need no row.

    Attributes:
        rows: "all"; "response": rows that computed the distribution of a response token, that is the row before each
            token that `response_mask` marks; "prompt": all but these; or a bool array `[B, S]`, jagged where the batch
            is, True where a row is replayed.
        margin: replay a route only where the live router is close to a tie: where its K-th best score leads the next
            one by less than this. In the unit of the scores that the router selects by (`Selection.margin_N`). None
            replays wherever `rows` says so.
    """

    rows: Rows | Any = "all"
    margin: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, str) and self.rows not in ("all", "response", "prompt"):
            raise ReplayError(
                "rows is unknown", expected="'all', 'response', 'prompt' or a bool array [B, S]", got=repr(self.rows)
            )
        if self.margin is not None and not (self.margin > 0 and math.isfinite(self.margin)):
            raise ReplayError(
                "the margin is a difference of scores",
                expected="a number above 0, or None for no margin",
                got=self.margin,
            )

    def wanted(self, batch: TokenBatch, response_mask: Any = None) -> np.ndarray:
        """`[N]` bool: the rows to replay, where they exist.

        Args:
            batch: the batch.
            response_mask: as the batch, True or 1 for each token that was sampled: several runs of them in a
                conversation of several turns.

        Raises:
            ReplayError: the policy needs a response mask and there is none, or a mask does not fit the batch.
        """
        if not isinstance(self.rows, str):
            return batch.flags(self.rows, "ReplayPolicy.rows")
        if self.rows == "all":
            return np.ones(len(batch.tokens_N), bool)
        if response_mask is None:
            raise ReplayError(
                f"ReplayPolicy(rows={self.rows!r}) must know which tokens are the response",
                expected="response_mask=[B, S]",
                got=None,
            )
        response_N = batch.flags(response_mask, "response_mask")
        sampled_N, predicts_N = np.zeros_like(response_N), np.zeros_like(response_N)
        for segment in batch.segments:
            sampled_N[segment.start : segment.stop] = response_N[segment.start : segment.stop]
            predicts_N[segment.start : segment.stop - 1] = response_N[segment.start + 1 : segment.stop]
        if not np.array_equal(sampled_N, response_N):
            raise ReplayError(
                "response_mask marks padding",
                expected="zeros outside of the sequences",
                got=f"{int((response_N & ~sampled_N).sum())} ones there",
            )
        return predicts_N if self.rows == "response" else ~predicts_N


REPLAY_ALL = ReplayPolicy()
