"""By how much the choices of a dye checkpoint are decided, and whether rounding could pass that.

Axes: E experts, H hidden size, K experts per token, G groups of S experts, n values of a digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrace.conformance.dye.families import DyeFamily
from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.dye.scores import members_of
from moetrace.errors import DyeError
from moetrace.routers import find_routers


@dataclass(frozen=True)
class Margins:
    """By how much the choices of a checkpoint are decided, in the unit that its routers select by.

    Attributes:
        chosen: the least score of a chosen expert less the highest of one that is not (in groups that are used).
        rank: least difference between two ranks; of no meaning where the order is "set".
        group: the least score of a group that is used less the highest of one that is not; None without groups.
        next_token: the logit of the next token less that of any other.
        highest: the largest absolute score: rounding is relative to it.
    """

    chosen: float
    rank: float
    group: float | None
    next_token: float
    highest: float


def margins_of(model: nn.Module, form: DyeForm, family: DyeFamily, entry: float, head: float) -> Margins:
    """Margins of the weights as they were rounded, in float64, over all tokens at once.

    What a pool scores depends on its own digit only, so the least and highest over digits bound all tokens.
    """
    by_rank: list[list[np.ndarray]] = [[] for _ in range(form.top_k)]
    others, used, unused, highest = [], [], [], 0.0
    for site in find_routers(model):
        router: Any = site.module
        weight_EH = router.weight.detach().double().numpy()
        bias_E = getattr(router, family.bias).detach().double().numpy() if family.bias else 0
        offset = 0
        for which, (base, pool) in enumerate(zip(form.digits, form.pools, strict=True)):
            logits_nE = entry * weight_EH[:, offset : offset + base].T
            scores_nE = (1 / (1 + np.exp(-logits_nE)) if family.score == "sigmoid" else logits_nE) + bias_E
            offset += base
            chosen_nK = np.array([form.choice(which, digit, site.layer) for digit in range(base)])
            taken_nK = np.take_along_axis(scores_nE, chosen_nK, 1)
            for k in range(pool.picks):
                by_rank[k * len(form.digits) + which].append(taken_nK[:, k])
            members = members_of(pool)
            mask_nE = np.zeros_like(scores_nE, bool)
            np.put_along_axis(mask_nE, chosen_nK, True, 1)
            others.append(scores_nE[:, members][~mask_nE[:, members]])
            groups_nGS = scores_nE[:, members].reshape(base, pool.groups, pool.size)
            group_nG = np.sort(groups_nGS, -1)[..., -family.group_score :].sum(-1)
            used_nG = mask_nE[:, members].reshape(groups_nGS.shape).any(-1)
            used.append(group_nG[used_nG])
            unused.append(group_nG[~used_nG])
            highest = max(
                highest, float(np.abs(scores_nE[:, members]).max()), float(np.abs(logits_nE[:, members]).max())
            )
    least = [min(float(scores.min()) for scores in rank) for rank in by_rank]
    most = [max(float(scores.max()) for scores in rank) for rank in by_rank]
    rank = min((a - b for a, b in zip(least, most[1:], strict=False)), default=float("inf"))
    other = max(float(scores.max()) for scores in others if scores.size)
    outside = [float(scores.max()) for scores in unused if scores.size]
    return Margins(
        chosen=min(least) - other,
        rank=rank,
        group=min(float(scores.min()) for scores in used) - max(outside) if outside else None,
        next_token=head * entry,
        highest=highest,
    )


def require_margins(margins: Margins, form: DyeForm, dtype: torch.dtype) -> None:
    """Raise `DyeError` where four roundings of the highest score could pass a margin."""
    least = 4 * torch.finfo(dtype).eps * margins.highest
    for name in ("chosen", "group", *(["rank"] if form.order == "rank" else [])):
        value = getattr(margins, name)
        if value is not None and value < least:
            raise DyeError(
                f"the margin of what is {name} could be lost in {dtype}",
                expected=f"at least {least:.3g}",
                got=f"{value:.3g}",
                fix="Take a wider dtype, or fewer experts a token.",
            )
