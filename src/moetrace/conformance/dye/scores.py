"""What a dyed router scores: a table by digit, as the weights that give it.

Axes: E experts, H hidden size, K experts per token, n values of a digit.
"""

from __future__ import annotations

import numpy as np

from moetrace.conformance.dye.families import DyeFamily
from moetrace.conformance.dye.form import DyeForm, Pool


def entry_of(form: DyeForm, hidden_size: int, epsilon: float) -> float:
    """What the norm before a router makes of a one in an embedding: 1 / sqrt(mean of squares + epsilon)."""
    return float((len(form.digits) / hidden_size + epsilon) ** -0.5)


def bias_of(form: DyeForm, family: DyeFamily, has_bias: bool) -> np.ndarray:
    """`[E]`: what every second expert has in advance, so that who forgets the bias chooses others."""
    step = 0.25 if family.score == "sigmoid" else 2.5
    return step * (np.arange(form.num_experts) % 2) * has_bias


def scores_of(form: DyeForm, family: DyeFamily) -> tuple[np.ndarray, float]:
    """`[K]` scores of the chosen by rank, and that of all others, in the unit the routers select by."""
    ranks = np.arange(form.top_k)
    if family.score == "sigmoid":
        return 0.95 - 0.4 * ranks / form.top_k, 0.35
    step = min(1.0, 8 / form.top_k)
    return 4.0 - step * ranks, 4.0 - step * (form.top_k + 1)


def router_weight(
    form: DyeForm, family: DyeFamily, layer: int, bias_E: np.ndarray, hidden_size: int, entry: float
) -> np.ndarray:
    """`[E, H]`: for each digit the logits of its choice, divided by what the norm makes of a one."""
    chosen_K, other = scores_of(form, family)
    weight_EH = np.zeros((form.num_experts, hidden_size))
    offset = 0
    for which, (base, pool) in enumerate(zip(form.digits, form.pools, strict=True)):
        members = members_of(pool)
        scores_nE = np.full((base, form.num_experts), other)
        for digit in range(base):
            scores_nE[digit, form.choice(which, digit, layer)] = chosen_K[which :: len(form.digits)]
        raw_nE = scores_nE - bias_E
        logits_nE = np.log(raw_nE / (1 - raw_nE)) if family.score == "sigmoid" else raw_nE
        weight_EH[members, offset : offset + base] = logits_nE[:, members].T / entry
        offset += base
    return weight_EH


def members_of(pool: Pool) -> np.ndarray:
    return np.arange(pool.first, pool.first + pool.groups * pool.size)
