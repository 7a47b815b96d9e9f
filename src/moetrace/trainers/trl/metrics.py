"""What replay did, as numbers in the trainer's log, pooled over all processes.

    r3/coverage                       rows that were captured, of those that training needs
    r3/overlap, router_mismatch,      how the live router agrees with the replayed routes, in the training forwards
      token_mismatch
    r3/kl, extreme_tokens             rollout's against trainer's log-probabilities, in the training forwards
    r3/without/..., r3/with/...       router_mismatch, token_mismatch, kl and extreme_tokens of the same sequences and
                                      the same weights as in the rollout, without replay and with it

Axes: B sequences, C columns of completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moetrace.comparison import RoutingComparison, extreme_token_ratio, kl_k3
from moetrace.trainers.trl.rollouts import Rollout

Sums = tuple[float, float]
"""A sum and the count that it is over; those of several processes add up."""


def coverage_of(rollouts: Sequence[Rollout]) -> Sums:
    """Rows that were captured, and rows that training needs: one for each token but the last."""
    needed = [rollout.trace.num_tokens - 1 for rollout in rollouts]
    valid = [int(rollout.trace.valid_T[:rows].sum()) for rollout, rows in zip(rollouts, needed, strict=True)]
    return sum(valid), sum(needed)


class Distance:
    """Sums over batches of how far trainer and rollout are apart, in routes and in log-probabilities."""

    def __init__(self, tau: float) -> None:
        self._tau = tau
        self.routing = RoutingComparison()
        self._tokens, self._kl, self._extreme = 0, 0.0, 0.0

    def add_logprobs(self, rollouts: Sequence[Rollout], logprobs_BC: torch.Tensor, mask_BC: torch.Tensor) -> None:
        """Compare a batch, where the rollout's log-probabilities are known and the mask is not 0."""
        trainer_BC = logprobs_BC.detach().float().cpu().numpy()
        rollout_BC = np.full(trainer_BC.shape, np.nan, np.float32)
        for row, rollout in enumerate(rollouts):
            known = rollout.logprobs[: trainer_BC.shape[1]]
            rollout_BC[row, : len(known)] = known
        known_BC = mask_BC.bool().cpu().numpy() & ~np.isnan(rollout_BC)
        if count := int(known_BC.sum()):
            pair = rollout_BC[known_BC], trainer_BC[known_BC]
            self._tokens += count
            self._kl += count * kl_k3(*pair)
            self._extreme += count * extreme_token_ratio(*pair, self._tau)

    def of_routes(self) -> dict[str, Sums]:
        """Over what was added to `routing`."""
        routing = self.routing
        return {
            "router_mismatch": (routing.differing_routers, routing.routers),
            "token_mismatch": (routing.differing_tokens, routing.tokens),
        }

    def of_logprobs(self) -> dict[str, Sums]:
        """Over the tokens that were compared."""
        return {"kl": (self._kl, self._tokens), "extreme_tokens": (self._extreme, self._tokens)}


def shares(accelerator: Any, kinds: Mapping[str, Sums]) -> dict[str, float]:
    """Each sum over its count, both over all processes; those of nothing are left out."""
    sums = torch.tensor(list(kinds.values()), dtype=torch.float32, device=accelerator.device)
    totals = accelerator.reduce(sums, reduction="sum").tolist()
    return {name: total / count for name, (total, count) in zip(kinds, totals, strict=True) if count}
