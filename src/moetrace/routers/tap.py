"""The tap: the one top-k inside a router's own forward, observed (record) or supplied (replay).

While a router runs, a `TorchFunctionMode` watches its torch calls. The expert selection is the top-k over `[N, E]` with
k = K. Recording keeps its indices. Replaying hands back other indices with the scores gathered at them; everything else
(renormalisation, softmax after top-k, bias correction, scaling) is the model's own code, so weights come from live
scores by the model's formula and gradients reach the router exactly as the model defines it.

Axes: N tokens of one router call, E experts, K experts per token.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moetrace.errors import ReplayError, UnsupportedRouterError
from moetrace.layout import MoeLayout
from moetrace.routers.find import RouterSite, find_routers, fingerprint_of, layout_of, traits_of

_TOPK = {torch.topk, torch.Tensor.topk}
_MAX = {torch.max, torch.Tensor.max}
_MASKED_FILL = {torch.masked_fill, torch.Tensor.masked_fill}
_CHECKPOINT_MODULE = "torch.utils.checkpoint"
_CHECKPOINT_ATTRIBUTE = "_gradient_checkpointing_func"
_MARK = "_moetrace_tapped"


@dataclass
class Selection:
    """One expert selection in progress: what a session may look at, and change, before the router goes on.

    Attributes:
        site: the router.
        scores_NE: what the router selects by.
        live_NK: int64 indices of the router's own top-k.
        indices_NK: int64 indices the router will use; equal to `live_NK` unless a replay changed them.
        recompute: True in the second forward of activation checkpointing.
        in_place: True if the indices lie already where the session's `indices_out` wanted them.
    """

    site: RouterSite
    scores_NE: torch.Tensor
    live_NK: torch.Tensor
    indices_NK: torch.Tensor
    sorted: bool
    recompute: bool
    in_place: bool = False


class RoutingSession:
    """Something that takes part in every expert selection while it is active on a thread."""

    supplies_routes = False
    """True if `on_selection` may change `indices_NK`."""

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


class ModelTap:
    """The taps of one model's routers. Installed while at least one user holds it, and then gone without a trace.

    Sessions are per thread and per model: two models, or two threads with one model, do not mix.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = find_routers(model)
        self.layout: MoeLayout = layout_of(model)
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._users = 0
        self._undo: list[Callable[[], None]] = []
        self._thread = _ThreadState()

    @property
    def fingerprint(self) -> str:
        """`fingerprint_of` the model as it is now."""
        model = self._model()
        return "" if model is None else fingerprint_of(model, self.sites)

    @property
    def in_turn(self) -> bool:
        """Whether the order in which the K experts of a token are chosen matters."""
        return any(traits_of(site.module).in_turn for site in self.sites)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the taps in the model's routers for the length of the context."""
        with self._lock:
            if self._users == 0:
                self._install()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._uninstall()

    @contextmanager
    def active(self, *sessions: RoutingSession) -> Iterator[None]:
        """Let sessions take part in this thread's forwards; install the taps if nobody has."""
        with self.installed(), self._thread.using(self._thread.sessions + sessions, self._thread.recompute, False):
            yield

    def _install(self) -> None:
        methods = [(site, traits_of(site.module).method) for site in self.sites]
        for site, method in methods:
            if hasattr(vars(site.module).get(method), _MARK):
                raise UnsupportedRouterError(
                    f"router {site.name} is already tapped through another module of the same model",
                    expected="one and the same object in every record and replay that overlaps",
                    fix="Pass the model itself each time, not its decoder or a wrapper of it.",
                )
        for site, method in methods:
            self._replace(site.module, method, self._tapped(site, getattr(site.module, method)))
        model = self._model()  # gone, perhaps, while a backward of it is still to come: then its routers are enough
        for module in model.modules() if model is not None else ():
            if callable(getattr(module, _CHECKPOINT_ATTRIBUTE, None)):
                followed = self._followed(getattr(module, _CHECKPOINT_ATTRIBUTE))
                self._replace(module, _CHECKPOINT_ATTRIBUTE, followed)

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, module: nn.Module, name: str, value: Callable) -> None:
        """Shadow an attribute on one instance; remembered so that detaching restores what was there."""
        had_own, before = name in vars(module), vars(module).get(name)

        def undo() -> None:
            if had_own:
                setattr(module, name, before)
            else:
                delattr(module, name)

        setattr(module, name, value)
        self._undo.append(undo)

    def _tapped(self, site: RouterSite, forward: Callable) -> Callable:
        traits = traits_of(site.module)
        # Whoever wrapped the router before us (expert parallelism maps ids to shards) may return other ids: those it
        # selected inside are the logical ones.
        returns_ids = traits.returns_ids and traits.method not in vars(site.module)

        def tapped_forward(*args: Any, **kwargs: Any) -> Any:
            state = self._thread
            if not state.sessions or (_in_backward() and not state.following):
                return forward(*args, **kwargs)  # what recomputes unfollowed ran its first pass without these sessions
            if any(session.supplies_routes for session in state.sessions):
                _refuse_unknown_checkpointing(site)
            if traits.in_turn and site.module.training:
                _refuse_drawing(site)
            mode = _TopkMode(site, state.sessions, state.recompute, traits.in_turn)
            with mode:  # not "with ... as mode": torch.compile traces this too
                output = forward(*args, **kwargs)
            mode.verify(output, returns_ids)
            return output

        setattr(tapped_forward, _MARK, True)
        return tapped_forward

    def _followed(self, checkpoint: Callable) -> Callable:
        """Wrap a layer's checkpoint function so that the recomputation sees the sessions of its first pass.

        The recomputation runs during backward: perhaps on another thread, after the `with` block, with other
        microbatches in between. So the sessions travel in the closure of the checkpointed function itself.
        """

        def checkpoint_with_sessions(function: Callable, *args: Any, **kwargs: Any) -> Any:
            sessions = self._thread.sessions
            if not sessions:
                return checkpoint(function, *args, **kwargs)
            passes = 0

            def follow(*inner_args: Any, **inner_kwargs: Any) -> Any:
                nonlocal passes
                passes += 1
                with self.installed(), self._thread.using(sessions, passes > 1, True):
                    return function(*inner_args, **inner_kwargs)

            return checkpoint(follow, *args, **kwargs)

        return checkpoint_with_sessions


class _ThreadState(threading.local):
    """What is going on in this thread: active sessions, and whether a checkpointed layer is being followed."""

    sessions: tuple[RoutingSession, ...] = ()
    recompute = False
    following = False

    @contextmanager
    def using(self, sessions: tuple[RoutingSession, ...], recompute: bool, following: bool) -> Iterator[None]:
        before = self.sessions, self.recompute, self.following
        self.sessions, self.recompute, self.following = sessions, recompute, following
        try:
            yield
        finally:
            self.sessions, self.recompute, self.following = before


class _TopkMode(TorchFunctionMode):
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

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and self._selects_experts(*args, **kwargs):
            return self._select(func, args, kwargs)
        if func in _MAX and self._takes_turn(*args, **kwargs):
            return self._next(args[0])
        result = func(*args, **kwargs)
        if func in _MASKED_FILL:
            self.masked.append((result, args[0]))
        return result

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
        return input.ndim > 1 and input.shape[-1] == self.site.num_experts and k == self.site.top_k and largest

    def _select(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        scores = args[0] if args else kwargs["input"]
        written = self._topk_to_session(scores, *args[1:], **kwargs)
        live = func(*args, **kwargs) if written is None else written
        is_sorted = kwargs.get("sorted", args[4] if len(args) > 4 else True)
        used = self._settle(scores, live.indices, is_sorted)
        if used is live.indices:
            return live
        return torch.return_types.topk((self._unmasked(scores).gather(-1, used), used))

    def _settle(self, scores: torch.Tensor, live: torch.Tensor, is_sorted: bool) -> torch.Tensor:
        """Ask the sessions; the indices to use, those of `live` itself unless one of them changed them."""
        live_NK = live.reshape(-1, self.site.top_k)
        scores_NE = scores.reshape(-1, self.site.num_experts)
        selection = Selection(
            self.site, scores_NE, live_NK, live_NK, is_sorted, self.recompute, in_place=written is not None
        )
        for session in sorted(self.sessions, key=lambda session: not session.supplies_routes):
            session.on_selection(selection)  # replay first, so that a recording keeps what was really used
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


def _in_backward() -> bool:
    """True while autograd runs a backward pass on this thread: a forward is then a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_turn(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """`[..., K]`: the best, the best of the rest, and so on."""
    chosen: list[torch.Tensor] = []
    rest = scores.detach()
    for _ in range(top_k):
        chosen.append(rest.max(dim=-1, keepdim=True).indices)
        rest = rest.scatter(-1, chosen[-1], float("-inf"))
    return torch.cat(chosen, dim=-1)


def _refuse_drawing(site: RouterSite) -> None:
    raise UnsupportedRouterError(
        f"router {site.name} ({type(site.module).__name__}) draws its experts at random in training mode",
        expected="the router in eval mode; the rest of the model may train",
        fix="Call .eval() on the router: it then chooses the best and still gets its gradient.",
    )


def _refuse_unknown_checkpointing(site: RouterSite) -> None:
    """A checkpoint that the tap does not follow would recompute with live routes, silently: refuse it."""
    frame = sys._getframe(1)
    while frame is not None and not (frame.f_code.co_name == "follow" and frame.f_globals is globals()):
        if frame.f_globals.get("__name__") == _CHECKPOINT_MODULE:
            raise ReplayError(
                f"router {site.name} runs under an activation checkpoint that moetrace cannot follow",
                expected="model.gradient_checkpointing_enable(...), called before the replay began",
                got="torch.utils.checkpoint applied by other means",
                fix="Its recomputation would use live routes; enable checkpointing through the model instead.",
            )
        frame = frame.f_back  # type: ignore[assignment]


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


_taps: weakref.WeakKeyDictionary[nn.Module, ModelTap] = weakref.WeakKeyDictionary()
_taps_lock = threading.Lock()


def tap_model(model: nn.Module) -> ModelTap:
    """The tap of a model; all recordings and replays of one model share it.

    Raises:
        NotMoeError, UnsupportedRouterError, LayoutMismatchError: see `layout_of`.
    """
    if any(_is_compiled(module) for module in model.modules()):
        raise UnsupportedRouterError(
            "a torch.compile'd model cannot be tapped",
            expected="the eager model, with no compiled module in it",
            fix="Pass the model as it was before torch.compile; CUDA graphs are fine.",
        )
    with _taps_lock:
        tap = _taps.get(model)
        if tap is None or not _is_current(tap, model):
            tap = _taps[model] = ModelTap(model)
        return tap


def _is_current(tap: ModelTap, model: nn.Module) -> bool:
    """False once a router has been wrapped, replaced or removed."""
    try:
        return all(model.get_submodule(site.name) is site.module for site in tap.sites)
    except AttributeError:
        return False
