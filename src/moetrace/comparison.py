"""How far two records of one sequence, or two passes over it, are apart.

Axes: T tokens, L MoE layers, K experts per token. The measures are those of "Stabilizing MoE Reinforcement Learning by
Aligning Training and Inference Routers" (arXiv 2510.11370, the paper that introduced R3), which compares the routes and
the token probabilities of the rollout engine with those of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moetrace.errors import InvalidTraceError, TokenMismatchError
from moetrace.tokens import first_difference
from moetrace.trace import RoutingTrace


def shared_experts(a_TLK: np.ndarray, b_TLK: np.ndarray) -> np.ndarray:
    """How many of the K experts two routes have in common, whatever their order: `[T, L]` ints in 0..K.

    Ids within a route must be distinct, as they are in every trace.
    """
    shared_TL = np.zeros(a_TLK.shape[:2], dtype=np.int64)
    for k in range(b_TLK.shape[-1]):  # K passes over [T, L, K] instead of one over [T, L, K, K]
        shared_TL += (a_TLK == b_TLK[..., k, None]).any(axis=-1)
    return shared_TL


@dataclass(frozen=True)
class RoutingComparison:
    """Counts from which the mismatch measures follow; add two to pool them.

    Attributes:
        tokens: rows compared (valid on both sides).
        routers: rows times layers compared.
        experts: rows times layers times K compared.
        shared_experts: expert choices both sides made.
        differing_routers: (row, layer) pairs whose expert sets differ.
        differing_tokens: rows whose expert sets differ in at least one layer.
        skipped_tokens: rows that were not valid on both sides.
    """

    tokens: int = 0
    routers: int = 0
    experts: int = 0
    shared_experts: int = 0
    differing_routers: int = 0
    differing_tokens: int = 0
    skipped_tokens: int = 0

    def __add__(self, other: RoutingComparison) -> RoutingComparison:
        return RoutingComparison(*(mine + theirs for mine, theirs in zip(_counts(self), _counts(other), strict=True)))

    @property
    def overlap(self) -> float:
        """Mean of |A ∩ B| / K over all compared routers, in 0..1; NaN when nothing was compared."""
        return self.shared_experts / self.experts if self.experts else float("nan")

    @property
    def router_mismatch(self) -> float:
        """Share of (token, layer) routers that chose another expert set (arXiv 2510.11370 reports about 10 %)."""
        return self.differing_routers / self.routers if self.routers else float("nan")

    @property
    def token_mismatch(self) -> float:
        """Share of tokens with another expert set in at least one layer (arXiv 2510.11370 reports 94 %)."""
        return self.differing_tokens / self.tokens if self.tokens else float("nan")


def _counts(comparison: RoutingComparison) -> Iterable[int]:
    return (getattr(comparison, name) for name in RoutingComparison.__dataclass_fields__)


def compare(a: RoutingTrace, b: RoutingTrace) -> RoutingComparison:
    """Compare two traces of one sequence row by row over the positions that both have, as expert sets.

    Raises:
        LayoutMismatchError: the traces have other layers, experts or top-k.
        TokenMismatchError: they were recorded on other tokens.
        InvalidTraceError: they have no position in common.
    """
    a.layout.require_same(b.layout, "the other trace")
    if a.tokens is not None:
        b.require_tokens(a.tokens, "the other trace's")
    elif a.token_sha256 != b.token_sha256:
        raise TokenMismatchError(
            "the traces were recorded on other tokens", expected=a.token_sha256, got=b.token_sha256
        )
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    if stop <= start:
        raise InvalidTraceError(
            "the traces have no position in common", got=f"[{a.start}, {a.stop}) and [{b.start}, {b.stop})"
        )
    a, b = a.slice(start, stop), b.slice(start, stop)
    both_T = a.valid_T & b.valid_T
    shared_TL = shared_experts(a.experts_TLK[both_T], b.experts_TLK[both_T])
    differs_TL = shared_TL < a.layout.top_k
    return RoutingComparison(
        tokens=len(shared_TL),
        routers=shared_TL.size,
        experts=shared_TL.size * a.layout.top_k,
        shared_experts=int(shared_TL.sum()),
        differing_routers=int(differs_TL.sum()),
        differing_tokens=int(differs_TL.any(axis=1).sum()),
        skipped_tokens=int((~both_T).sum()),
    )


@dataclass(frozen=True)
class Difference:
    """The first thing in which two traces differ.

    Attributes:
        fact: which one: an attribute of `RoutingTrace`, "valid" for a row that only one has, "experts" for ids.
        a, b: what each has there.
        position: of the token, for "tokens", "valid" and "experts".
        layer: number of the decoder layer, for "experts".
    """

    fact: str
    a: object
    b: object
    position: int | None = None
    layer: int | None = None


def first_difference_of(a: RoutingTrace, b: RoutingTrace, *, as_sets: bool = False) -> Difference | None:
    """The first difference of two traces, in the order facts, tokens, rows; None where they are equal.

    Args:
        a, b: any two traces.
        as_sets: compare which experts were chosen, not their ranks (nor `order`).
    """
    if as_sets:
        a, b = a.as_set(), b.as_set()
    facts = ("layout", "start", "num_rows", "num_tokens", "order", "weight_spans", "fingerprint", "engine")
    for fact in facts:
        if getattr(a, fact) != getattr(b, fact):
            return Difference(fact, getattr(a, fact), getattr(b, fact))
    if a.tokens is not None and b.tokens is not None:
        position = first_difference(a.tokens, b.tokens)
        if position is not None:
            return Difference("tokens", int(a.tokens[position]), int(b.tokens[position]), position)
    if a.token_sha256 != b.token_sha256:
        return Difference("token_sha256", a.token_sha256, b.token_sha256)
    rows = np.flatnonzero((a.valid_T != b.valid_T) | (a.experts_TLK != b.experts_TLK).any(axis=(1, 2)))
    if not len(rows):
        return None
    row = int(rows[0])
    if a.valid_T[row] != b.valid_T[row]:
        return Difference("valid", bool(a.valid_T[row]), bool(b.valid_T[row]), a.start + row)
    layer = int(np.flatnonzero((a.experts_TLK[row] != b.experts_TLK[row]).any(axis=1))[0])
    ids_a, ids_b = (trace.experts_TLK[row, layer].tolist() for trace in (a, b))
    return Difference("experts", ids_a, ids_b, a.start + row, a.layout.layers[layer])


def kl_k3(rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> float:
    """KL(rollout ‖ trainer) in nats, estimated from tokens that the rollout sampled, by the k3 estimator.

    With r = p_trainer(token) / p_rollout(token), the estimate is the mean of r - 1 - log r: unbiased, and never
    negative (J. Schulman, "Approximating KL Divergence", 2020; the estimator arXiv 2510.11370 uses).

    Args:
        rollout_logprobs: natural logarithms of the probabilities the rollout gave its own tokens, any shape.
        trainer_logprobs: those the trainer gives the same tokens, same shape.
    """
    log_ratio = _log_ratio(rollout_logprobs, trainer_logprobs)
    return float(np.mean(np.expm1(log_ratio) - log_ratio))


def extreme_token_ratio(rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray, tau: float = 2.0) -> float:
    """F(τ): the share of tokens whose probability differs between the two by more than a factor τ, either way.

    F(τ) = mean of 1[max(p / q, q / p) > τ] (arXiv 2510.11370, "extreme token distribution").

    Args:
        rollout_logprobs, trainer_logprobs: natural logarithms, same shape.
        tau: the factor, above 1.
    """
    if not tau > 1:
        raise InvalidTraceError("tau is a ratio of probabilities", expected="tau > 1", got=tau)
    return float(np.mean(np.abs(_log_ratio(rollout_logprobs, trainer_logprobs)) > np.log(tau)))


def _log_ratio(rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> np.ndarray:
    rollout, trainer = np.asarray(rollout_logprobs, np.float64), np.asarray(trainer_logprobs, np.float64)
    if rollout.shape != trainer.shape or not rollout.size:
        raise InvalidTraceError(
            "log-probabilities must be of the same tokens",
            expected=f"shape {rollout.shape}, not empty",
            got=trainer.shape,
        )
    return trainer - rollout
