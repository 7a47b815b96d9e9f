"""One expert selection: what a session sees of it, and the mode that finds it inside a router's own forward.

Axes: N tokens of one router call, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moetrace.errors import UnsupportedRouterError
from moetrace.routers.find import RouterSite

_TOPK = {torch.topk, torch.Tensor.topk}
_MAX = {torch.max, torch.Tensor.max}
_SCORED_OF_GROUP = 2
"""DeepSeek-V3 and its kin rank groups by their two best scores: with one group and K = 2, on `[N, 1, E]`."""
_MASKED_FILL = {torch.masked_fill, torch.Tensor.masked_fill}
_SCORING = {
    torch.softmax: "softmax",
    torch.Tensor.softmax: "softmax",
    torch.nn.functional.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
    torch.nn.functional.sigmoid: "sigmoid",
    torch.nn.functional.softplus: "softplus",
}
"""What a router may make of its logits, before it selects or of those it has selected."""


@dataclass
class Selection:
    """One expert selection in progress: what a session may look at, and change, before the router goes on.

    Attributes:
        site: the router.
        scores_NE: what the router selects by.
        live_NK: int64 indices of the router's own top-k.
        indices_NK: int64 indices the router will use; equal to `live_NK` unless a replay changed them.
        sorted: whether those that the router will use come best first: a router's own ranking, or routes in rank order.
        recompute: True in the second forward of activation checkpointing.
        in_place: True if the indices lie already where the session's `indices_out` wanted them.
        scoring: "softmax", "sigmoid" or "softplus": what the router makes of its logits. A router that selects by its
            logits does so afterwards: "" until then.
        logits_NE: the logits, as far as they can be seen: what was scored, `scores_NE` if nothing was until now.
        groups: (scores [N, G], k) of each top-k over groups of experts that limits this one.
    """

    site: RouterSite
    scores_NE: torch.Tensor
    live_NK: torch.Tensor
    indices_NK: torch.Tensor
    sorted: bool
    recompute: bool
    in_place: bool = False
    scoring: str = ""
    logits_NE: torch.Tensor | None = None
    groups: tuple[tuple[torch.Tensor, int], ...] = ()

    def margin_N(self) -> torch.Tensor:
        """`[N]` float32: by how much the K-th best score leads the next one. No host synchronisation.

        It is a difference of the very scores that the router selects by, since these decide: probabilities for a
        router that ranks by a softmax, logits, or sigmoids with their correction bias. So thresholds of two families do
        not compare. Where groups are chosen first, a tie between groups changes the experts too: the margin is then the
        smaller one of both choices. Infinite where there is no next one.
        """
        margin_N = _lead(self.scores_NE, self.live_NK.shape[1])
        for scores_NG, top_k in self.groups:
            margin_N = torch.minimum(margin_N, _lead(scores_NG, top_k))
        return margin_N


class RoutingSession:
    """Something that takes part in every expert selection while it is active on a thread."""

    supplies_routes = False
    """True if `on_selection` may change `indices_NK`."""
    routes: Any = None
    """What it supplies, where it does, with its `order`. Where it does not tell, the order of its ids means nothing."""

    def indices_out(self, site: RouterSite, num_tokens: int) -> torch.Tensor | None:
        """Where the router's own top-k should write its indices; None lets it allocate.

        Asked only of the one session of a thread, and only where no gradient is needed.

        Returns:
            `[num_tokens, K]` int64, contiguous, on the router's device.
        """
        return None

    def on_selection(self, selection: Selection) -> None:
        """See, and where `supplies_routes` is True change, one selection."""
        raise NotImplementedError

    def on_output(self, output: Any) -> None:
        """See what a router, or a checkpointed layer, returned to the graph of a first pass that records gradients."""


class SelectionMode(TorchFunctionMode):
    """Watches one router forward for its expert selection."""

    def __init__(
        self, site: RouterSite, sessions: tuple[RoutingSession, ...], recompute: bool, in_turn: bool = False
    ) -> None:
        super().__init__()
        self.site, self.sessions, self.recompute, self.in_turn = site, sessions, recompute, in_turn
        self.selections: list[Selection] = []
        self.turns = 0
        self.used: torch.Tensor | None = None
        self.masked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups: list[tuple[torch.Tensor, int]] = []
        self.scoring = ""
        self.logits: torch.Tensor | None = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and self._selects_experts(*args, **kwargs):
            return self._select(func, args, kwargs)
        if func in _MAX and self._takes_turn(*args, **kwargs):
            return self._next(args[0])
        result = func(*args, **kwargs)
        if func in _MASKED_FILL:
            self.masked.append((result, args[0]))
        elif func in _TOPK and self.used is None:
            self._note_groups(*args, **kwargs)
        elif func in _SCORING:
            self._note_scoring(_SCORING[func], *args, **kwargs)
        return result

    def _note_groups(self, input: torch.Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> None:
        """Parameters are those of torch.topk; called for any that does not select experts.

        One score for each group of a token is of groups; scores within each group, `[N, G, E / G]`, are not.
        """
        if input.ndim == 2 and dim in (-1, 1) and input.shape[1] < self.site.num_experts:
            self.groups.append((input, k))

    def _note_scoring(self, scoring: str, input: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if self.selections:
            self.selections[-1].scoring = self.selections[-1].scoring or scoring
        elif input.ndim > 1 and input.shape[-1] == self.site.num_experts:
            self.scoring, self.logits = scoring, input

    def _selects_experts(
        self,
        input: torch.Tensor,
        k: int,
        dim: int = -1,
        largest: bool = True,
        sorted: bool = True,
        out: object = None,
    ) -> bool:
        """Parameters are those of torch.topk. Group-limited routers also call it over groups: other sizes.

        Some routers select on `[B, S, E]`; sessions see every selection as `[N, E]` and `[N, K]`.
        """
        if input.ndim < 2 or input.shape[-1] != self.site.num_experts or k != self.site.top_k or not largest:
            return False
        ranks_the_one_group = k == _SCORED_OF_GROUP and getattr(self.site.module, "num_group", None) == 1
        return not (ranks_the_one_group and input.ndim == 3)

    def _select(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        scores = args[0] if args else kwargs["input"]
        written = self._topk_to_session(scores, *args[1:], **kwargs)
        live = func(*args, **kwargs) if written is None else written
        is_sorted = kwargs.get("sorted", args[4] if len(args) > 4 else True)
        used = self._settle(scores, live.indices, is_sorted, in_place=written is not None)
        if used is live.indices:
            return live
        return torch.return_types.topk((self._unmasked(scores).gather(-1, used), used))

    def _settle(
        self, scores: torch.Tensor, live: torch.Tensor, is_sorted: bool, *, in_place: bool = False
    ) -> torch.Tensor:
        """Ask the sessions; the indices to use, those of `live` itself unless one of them changed them."""
        live_NK = live.reshape(-1, self.site.top_k)
        scores_NE = scores.reshape(-1, self.site.num_experts)
        logits_NE = scores_NE if self.logits is None else self.logits.reshape(-1, self.site.num_experts)
        selection = Selection(
            self.site,
            scores_NE,
            live_NK,
            live_NK,
            is_sorted,
            self.recompute,
            in_place,
            self.scoring,
            logits_NE,
            tuple(self.groups),
        )
        for session in sorted(self.sessions, key=lambda session: not session.supplies_routes):
            session.on_selection(selection)  # replay first, so that a recording keeps what was really used
            if session.supplies_routes and selection.indices_NK is not live_NK:
                selection.sorted = is_sorted and getattr(session.routes, "order", "set") == "rank"
        self.selections.append(selection)
        self.used = live if selection.indices_NK is live_NK else selection.indices_NK.view_as(live)
        return self.used

    def _takes_turn(self, input: torch.Tensor, dim: object = None, keepdim: bool = False) -> bool:
        """Parameters are those of torch.max."""
        over_experts = input.ndim > 1 and input.shape[-1] == self.site.num_experts and dim in (-1, input.ndim - 1)
        return self.in_turn and over_experts and keepdim

    def _next(self, scores: torch.Tensor) -> Any:
        """The max of one turn: settled before the first for all K. Ids are ours even where nobody replays, so that
        what is recorded is what is used, also of equal scores.
        """
        used = self._settle(scores, _in_turn(scores, self.site.top_k), True) if self.used is None else self.used
        index = used.narrow(-1, self.turns % self.site.top_k, 1)
        self.turns += 1
        return torch.return_types.max((scores.gather(-1, index), index))

    def _topk_to_session(self, scores: torch.Tensor, *args: Any, input: object = None, **kwargs: Any) -> Any:
        """The top-k with its indices written where the session wants them, or None where it does not mind."""
        if len(self.sessions) != 1 or scores.requires_grad:
            return None
        out_NK = self.sessions[0].indices_out(self.site, scores.numel() // self.site.num_experts)
        if out_NK is None:
            return None
        shape = (*scores.shape[:-1], self.site.top_k)
        return torch.topk(scores, *args, **kwargs, out=(scores.new_empty(shape), out_NK.view(shape)))

    def _unmasked(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores before groups were masked out of them.

        DeepSeek-V2 zeroes the scores outside the live groups and uses what top-k returns as weights: a replayed expert
        outside them would get weight zero and no gradient.
        """
        for result, source in reversed(self.masked):
            if result is scores:
                return source
        return scores

    def verify(self, output: Any, returns_ids: bool) -> None:
        """Raise `UnsupportedRouterError` unless the router selected once and, if it should, returned that selection."""
        name, kind = self.site.name, type(self.site.module).__name__
        if self.in_turn and self.turns != self.site.top_k:
            raise UnsupportedRouterError(
                f"router {name} ({kind}) does not choose its experts in turn",
                expected=f"{self.site.top_k} maxima of [N, {self.site.num_experts}]",
                got=f"{self.turns} of them",
            )
        if len(self.selections) != 1:
            raise UnsupportedRouterError(
                f"router {name} ({kind}) does not select its experts by one top-k",
                expected=f"one topk of [N, {self.site.num_experts}] with k={self.site.top_k}",
                got=f"{len(self.selections)} of them",
            )
        if returns_ids and not (isinstance(output, tuple) and any(item is self.used for item in output)):
            raise UnsupportedRouterError(
                f"router {name} ({kind}) changes the expert ids after its top-k",
                expected="the indices of the top-k among its outputs",
                got=type(output).__name__,
            )


def _lead(scores_NX: torch.Tensor, top_k: int) -> torch.Tensor:
    """`[N]` float32: the K-th best score less the next one."""
    if scores_NX.shape[1] <= top_k:
        return torch.full((len(scores_NX),), torch.inf, device=scores_NX.device)
    best_NX = scores_NX.detach().topk(top_k + 1).values.float()
    return best_NX[:, top_k - 1] - best_NX[:, top_k]


def _in_turn(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """`[..., K]`: the best, the best of the rest, and so on."""
    chosen: list[torch.Tensor] = []
    rest = scores.detach()
    for _ in range(top_k):
        chosen.append(rest.max(dim=-1, keepdim=True).indices)
        rest = rest.scatter(-1, chosen[-1], float("-inf"))
    return torch.cat(chosen, dim=-1)
