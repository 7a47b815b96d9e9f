"""Does what was seen of routers and experts agree with the family's rule? Weights, and gradients of the logits.

Axes: L MoE layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from moetrace.conformance.scoring import Rule
from moetrace.conformance.spies import RouterCall

ZERO = 1e-9
"""What counts as zero in float64, relatively."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Dtype of the model -> how far its weights and gradients may be from float64, relatively."""
CANCELLED = {torch.float32: ZERO, torch.bfloat16: 0.01}
"""Dtype of the model -> gradients up to here may be exactly zero, relatively: nearly equal terms cancel."""

Reach = Literal["chosen", "all", "none", "unseen", ""]


def received(calls: Sequence[RouterCall], ids_LNK: torch.Tensor) -> bool | None:
    """Whether the experts of every layer received exactly these ids; None where that cannot be seen."""
    return _all(call.received(ids_NK) for call, ids_NK in zip(calls, ids_LNK, strict=True))


def weighs_all(calls: Sequence[RouterCall], ids_LNK: torch.Tensor) -> bool:
    """Whether no weight that can be seen is zero, infinite or NaN."""
    found = [call.weights_NK(ids_NK) for call, ids_NK in zip(calls, ids_LNK, strict=True)]
    return all(bool((w_NK.isfinite() & (w_NK != 0)).all()) for w_NK in found if w_NK is not None)


def follows(rule: Rule | None, config: Any, calls: Sequence[RouterCall], ids_LNK: torch.Tensor) -> bool | None:
    """Whether the experts received the weights that the rule gives at these ids, from the routers' logits.

    None without a rule, or where logits or weights cannot be seen.
    """
    return _all(_follows(rule, config, call, ids_NK) for call, ids_NK in zip(calls, ids_LNK, strict=True))


def gradient(rule: Rule | None, config: Any, calls: Sequence[RouterCall], ids_LNK: torch.Tensor) -> Reach:
    """Which logits got the gradient that the rule's derivative gives, after a backward.

    Returns:
        "chosen": those at these ids, of every token, and no others; "all": those at these ids, of every token, and
        others too; "none": the rule's derivative is zero, and so are they; "unseen": a gradient reached the routers'
        parameters, but logits or weights cannot be seen, or have no rule; "": a gradient is missing or wrong.
    """
    reached = {_gradient(rule, config, call, ids_NK) for call, ids_NK in zip(calls, ids_LNK, strict=True)}
    return reached.pop() if len(reached) == 1 else ""


def _all(answers: Iterable[bool | None]) -> bool | None:
    """False as soon as one is, None where one cannot be told."""
    known = set(answers)
    return False if False in known else None if None in known else True


def _follows(rule: Rule | None, config: Any, call: RouterCall, ids_NK: torch.Tensor) -> bool | None:
    weights_NK, logits_NE = call.weights_NK(ids_NK), call.logits_NE
    if rule is None or weights_NK is None or logits_NE is None:
        return None
    expected_NK = rule.weights(config, call.site.module, call.hidden_NH, logits_NE, ids_NK)
    return torch.allclose(weights_NK, expected_NK, rtol=ROUNDING[call.dtype], atol=ZERO)


def _gradient(rule: Rule | None, config: Any, call: RouterCall, ids_NK: torch.Tensor) -> Reach:
    upstream_NK, logits_NE = call.gradients_NK(ids_NK), call.logits_NE
    if rule is None or upstream_NK is None or logits_NE is None or call.logits is None:
        return "unseen" if _learns(call.site.module) else ""
    rule.weights(config, call.site.module, call.hidden_NH, logits_NE.requires_grad_(), ids_NK).backward(upstream_NK)
    assert logits_NE.grad is not None
    expected_NE, got = logits_NE.grad, call.logits.grad
    got_NE = torch.zeros_like(expected_NE) if got is None else got.double().view_as(expected_NE)
    scale_N1 = upstream_NK.abs().amax(1, keepdim=True)
    if not bool(scale_N1.all()):
        return ""  # nothing came back to the weights of some token
    if bool(((got_NE - expected_NE).abs() > ROUNDING[call.dtype] * scale_N1).any()):
        return ""
    given_NE = torch.zeros_like(expected_NE, dtype=torch.bool).scatter(1, ids_NK, True)
    if bool((given_NE & (got_NE == 0) & (expected_NE.abs() > CANCELLED[call.dtype] * scale_N1)).any()):
        return ""
    reached_NE = expected_NE.abs() > ZERO * scale_N1
    if not bool(reached_NE.any()):
        return "none"
    return "all" if bool(reached_NE[~given_NE].any()) else "chosen"


def _learns(router: torch.nn.Module) -> bool:
    gradients = [p.grad for p in router.parameters() if p.grad is not None]
    return any(bool((grad != 0).any()) for grad in gradients)
