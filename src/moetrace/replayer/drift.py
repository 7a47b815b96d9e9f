"""How far the router itself has moved between two policies: the router-shift ratio, for importance weights.

The measure is that of RSPO ("Towards Stable and Effective Reinforcement Learning for Mixture-of-Experts", arXiv
2510.23027). For a token and its route under the old policy, with p the router's probabilities over all experts:

    deviation = mean over layers of mean over the K experts of | log p_new(expert) - log p_old(expert) |
    ratio     = exp(-deviation)                                            in (0, 1], 1 where the router did not move
    weight    = max(ratio, floor), without gradient

The weight multiplies the importance ratio of the token that the row predicts, which is the next one. Nothing is
replayed for it: it is what to look at, or to weigh by, instead of a replay.

Axes: L MoE layers, N tokens of a batch, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetrace.batch import to_numpy
from moetrace.errors import ReplayError, UnsupportedRouterError
from moetrace.routers import ModelTap, RoutingSession, Selection, tap_model


@dataclass(frozen=True, eq=False)
class RouterShift:
    """How far the routers moved, token by token.

    Attributes:
        deviation_N: `[N]` float32, mean over layers and experts. Where layers are on several ranks (pipeline), average
            this over all layers first: a mean of ratios is another number.
    """

    deviation_N: torch.Tensor

    @property
    def ratio_N(self) -> torch.Tensor:
        """`[N]` float32 in (0, 1]."""
        return torch.exp(-self.deviation_N)

    def weights_N(self, floor: float) -> torch.Tensor:
        """`[N]` float32 without gradient: the ratio, at least `floor`, which bounds how little a token can count."""
        if not 0 <= floor <= 1:
            raise ReplayError("the floor bounds a ratio", expected="0 <= floor <= 1", got=floor)
        return self.ratio_N.clamp(min=floor)

    def stats(self, mask_N: Any = None, *, floor: float = 0.0) -> dict[str, float]:
        """Mean and least ratio, mean deviation and the share of ratios below `floor`. Waits for the device.

        Args:
            mask_N: `[N]` bool, the tokens that count: those before a response token. All of them by default.
            floor: as for `weights_N`.
        """
        deviation_N = self.deviation_N.double().cpu()
        if mask_N is not None:
            deviation_N = deviation_N[torch.from_numpy(to_numpy(mask_N).astype(bool).reshape(-1))]
        if not len(deviation_N):
            raise ReplayError("no token counts", expected="a mask with at least one True", got=mask_N)
        ratio_N = torch.exp(-deviation_N)
        return {
            "ratio_mean": float(ratio_N.mean()),
            "ratio_min": float(ratio_N.min()),
            "deviation_mean": float(deviation_N.mean()),
            "below_floor": float((ratio_N < floor).double().mean()),
        }


def router_shift(old_LNK: torch.Tensor, new_LNK: torch.Tensor) -> RouterShift:
    """The shift between log-probabilities of the same experts under two policies, `[L, N, K]` each."""
    if old_LNK.ndim != 3 or old_LNK.shape != new_LNK.shape:
        raise ReplayError(
            "the log-probabilities are not of the same experts", expected=tuple(old_LNK.shape), got=tuple(new_LNK.shape)
        )
    difference_LNK = new_LNK.detach().float() - old_LNK.detach().float().to(new_LNK.device)
    return RouterShift(difference_LNK.abs().mean(dim=(0, 2)))


class RouterScores(RoutingSession):
    """Log-probabilities that the routers of one forward gave to experts: the last forward counts."""

    def __init__(self, tap: ModelTap, of: RouterScores | None = None) -> None:
        self._tap = tap
        self._of = None if of is None else of.experts_LNK
        self._ids: dict[int, torch.Tensor] = {}
        self._logs: dict[int, torch.Tensor] = {}
        self._last: Selection | None = None

    def on_selection(self, selection: Selection) -> None:
        if selection.recompute:
            return
        self._judge_last()
        index, ids_NK = selection.site.index, selection.indices_NK
        if self._of is not None:
            if len(self._of[index]) != len(ids_NK):
                raise ReplayError(
                    "the new policy ran on another batch", expected=f"{len(self._of[index])} tokens", got=len(ids_NK)
                )
            ids_NK = self._of[index].to(ids_NK.device)
        assert selection.logits_NE is not None
        self._ids[index] = ids_NK.detach()
        self._logs[index] = selection.logits_NE.detach().float().log_softmax(-1).gather(1, ids_NK)
        self._last = selection

    @property
    def experts_LNK(self) -> torch.Tensor:
        """`[L, N, K]` int64: the experts whose probabilities these are."""
        return self._stacked(self._ids)

    @property
    def log_probs_LNK(self) -> torch.Tensor:
        """`[L, N, K]` float32, without gradient."""
        return self._stacked(self._logs)

    def _stacked(self, parts: dict[int, torch.Tensor]) -> torch.Tensor:
        self._judge_last()
        if len(parts) != len(self._tap.sites):
            raise ReplayError("no whole forward ran", expected=f"{len(self._tap.sites)} layers", got=len(parts))
        return torch.stack([parts[index].to(parts[0].device) for index in range(len(parts))])

    def _judge_last(self) -> None:
        """What a router that selects by its logits makes of them is known once it is through."""
        last, self._last = self._last, None
        if last is not None and last.scoring != "softmax":
            raise UnsupportedRouterError(
                f"router {last.site.name} ({type(last.site.module).__name__}) gives its experts no probabilities",
                expected="a softmax, for which the router-shift ratio is defined",
                got=last.scoring or "no score that is known",
            )


@contextmanager
def router_scores(model: nn.Module, of: RouterScores | None = None) -> Iterator[RouterScores]:
    """Collect what the routers give to experts in a forward inside the context. No host synchronisation.

    Run the old policy first, and the new one with `of=` what the old one gave:

        with router_scores(model) as old:
            model(input_ids=ids)
        ...                                      # updates
        with router_scores(model, of=old) as new:
            loss = policy_loss(model(input_ids=ids))
        shift = router_shift(old.log_probs_LNK, new.log_probs_LNK)

    Args:
        model: a transformers MoE model whose routers score by a softmax over all experts, or over the chosen ones.
        of: scores of an earlier forward of the same batch; the new ones are of its experts. Without it they are of the
            experts that this forward uses, which are the replayed ones inside a replay.

    Raises:
        UnsupportedRouterError: the routers score by something else, or choose in turn.
    """
    tap = tap_model(model)
    if tap.in_turn:
        raise UnsupportedRouterError(
            f"{type(model).__name__} chooses its experts in turn",
            expected="probabilities of one softmax",
            got="several",
        )
    scores = RouterScores(tap, of)
    with tap.active(scores):
        yield scores
