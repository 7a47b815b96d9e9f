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
from typing import Any

import torch
from torch import nn

from moetrace.errors import ReplayError, RouterError, UnsupportedRouterError
from moetrace.layout import MoeLayout
from moetrace.routers.find import RouterSite, find_routers, fingerprint_of, layout_of, traits_of, unwrapped
from moetrace.routers.selection import RoutingSession, SelectionMode
from moetrace.routers.sessions import ThreadSessions, taking_part

_RECOMPUTING = {
    "torch.utils.checkpoint": "torch.utils.checkpoint applied by other means",
    "torch.autograd.function": "an autograd.Function around it, which may run it again in its backward",
}
"""Modules whose frames above a router say that it may run again unseen, and what this is called."""
_CHECKPOINT_ATTRIBUTE = "_gradient_checkpointing_func"
_CHECKPOINT_WRAPPER = ("CheckpointWrapper", "checkpoint_fn")
_ABSENT = object()


class ModelTap:
    """The taps of one model's routers. Installed while at least one user holds it, and then gone without a trace.

    Sessions are per thread, per task of asyncio and per model: two models, or two threads with one model, do not mix.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = find_routers(model)
        self.layout: MoeLayout = layout_of(model)
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._users = 0
        self._shadows: list[_Shadow] = []
        self._thread = ThreadSessions()

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
    def installed(self, *, again: bool = False) -> Iterator[None]:
        """Keep the taps in the model's routers for the length of the context.

        Args:
            again: put back what the last one put there, if nobody has touched it since, without a look at every module:
                a backward after the `with` block installs once for each checkpointed layer.
        """
        with self._lock:
            if self._users == 0:
                if not (again and self._shadows and all(shadow.fits() for shadow in self._shadows)):
                    self._prepare()
                for shadow in self._shadows:
                    shadow.put()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for shadow in reversed(self._shadows):
                        shadow.remove()

    @contextmanager
    def active(self, *sessions: RoutingSession) -> Iterator[None]:
        """Let sessions take part in this thread's forwards; install the taps if nobody has.

        Raises:
            ReplayError: one of the sessions supplies routes, and another one that began after it has not ended yet.
        """
        with self.installed(), self._thread.begun(sessions):
            yield

    def _prepare(self) -> None:
        """Find what is to be replaced, in the model as it is now."""
        methods = [(site, traits_of(site.module).method) for site in self.sites]
        for site, method in methods:
            if isinstance(vars(site.module).get(method), Tapped):
                raise UnsupportedRouterError(
                    f"router {site.name} is already tapped through another module of the same model",
                    expected="one and the same object in every record and replay that overlaps",
                    fix="Pass the same model each time, not its decoder; a data-parallel wrapper of it will do.",
                )
        self._shadows = [
            _Shadow(site.module, method, self._tapped(site, getattr(site.module, method))) for site, method in methods
        ]
        model = self._model()  # gone, perhaps, while a backward of it is still to come: then its routers are enough
        for module in model.modules() if model is not None else ():
            attribute = _checkpoint_attribute(module)
            if attribute:
                self._shadows.append(_Shadow(module, attribute, self._followed(getattr(module, attribute))))

    def _tapped(self, site: RouterSite, forward: Callable) -> Callable:
        traits = traits_of(site.module)
        # Whoever wrapped the router before us (expert parallelism maps ids to shards) may return other ids: those it
        # selected inside are the logical ones.
        returns_ids = traits.returns_ids and traits.method not in vars(site.module)

        def tapped_forward(*args: Any, **kwargs: Any) -> Any:
            state = self._thread
            sessions = taking_part(state)
            if not sessions:
                return forward(*args, **kwargs)
            if any(session.supplies_routes for session in sessions):
                _refuse_unknown_checkpointing(site)
            if traits.in_turn and site.module.training:
                _refuse_drawing(site)
            mode = SelectionMode(site, sessions, state.recompute, traits.in_turn)
            with mode:  # not "with ... as mode": torch.compile traces this too
                output = forward(*args, **kwargs)
            mode.verify(output, returns_ids)
            return _shown(output, sessions, state)

        return tapped_forward

    def _followed(self, checkpoint: Callable) -> Callable:
        """Wrap a layer's checkpoint function so that the recomputation sees the sessions of its first pass.

        The recomputation runs during backward: perhaps on another thread, after the `with` block, with other
        microbatches in between. So the sessions travel in the closure of the checkpointed function itself.
        """

        def checkpoint_with_sessions(function: Callable, *args: Any, **kwargs: Any) -> Any:
            sessions = taking_part(self._thread)
            if not sessions:
                return checkpoint(function, *args, **kwargs)
            passes = 0

            def follow(*inner_args: Any, **inner_kwargs: Any) -> Any:
                nonlocal passes
                passes += 1
                again = passes > 1 or self._thread.recompute  # its first pass may be part of another's second
                with self.installed(again=True), self._thread.following(sessions, again):
                    return function(*inner_args, **inner_kwargs)

            return _shown(checkpoint(follow, *args, **kwargs), sessions, self._thread)

        return checkpoint_with_sessions


class Tapped:
    """What a module has in place of its own function, and will not let a copy have, which would run the original by it.

    A plain function would go into the copy as it is.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RouterError(
            "a model cannot be copied or pickled while its routers are tapped: the copy would run the original's",
            expected="a model that nothing records, replays or serves now",
            fix="Copy it before or after; its state_dict can be copied at any time.",
        )


class _Shadow:
    """An attribute of one module that is replaced for a while, and then is what it was.

    It goes by the module's own dictionary: the setters of `nn.Module` would cost more than the rest of a replay.
    """

    def __init__(self, module: nn.Module, name: str, value: Callable) -> None:
        self._module = weakref.ref(module)  # a tap that is kept must not keep its model
        self._name, self._value = name, Tapped(value)
        self._before = vars(module).get(name, _ABSENT)

    def fits(self) -> bool:
        """Whether the attribute is what it was before."""
        module = self._module()
        return module is not None and vars(module).get(self._name, _ABSENT) is self._before

    def put(self) -> None:
        module = self._module()
        if module is not None:
            vars(module)[self._name] = self._value

    def remove(self) -> None:
        module = self._module()
        if module is None:
            return
        if self._before is _ABSENT:
            vars(module).pop(self._name, None)
        else:
            vars(module)[self._name] = self._before


def _shown(output: Any, sessions: tuple[RoutingSession, ...], state: ThreadSessions) -> Any:
    """The output of a router or a checkpoint, which the sessions have seen where a backward pass may come back to it.

    Within a reentrant checkpoint's first pass there is no graph: the checkpoint's own output is what belongs to one.
    """
    if torch.is_grad_enabled() and not state.recompute:
        for session in sessions:
            session.on_output(output)
    return output


def _checkpoint_attribute(module: nn.Module) -> str | None:
    """The attribute by which a module puts what it runs under an activation checkpoint.

    transformers gives its layers one. torch's `checkpoint_wrapper`, which accelerate and torchtitan use, has another.
    """
    own = vars(module)
    if callable(own.get(_CHECKPOINT_ATTRIBUTE)):
        return _CHECKPOINT_ATTRIBUTE
    wrapper, attribute = _CHECKPOINT_WRAPPER
    if attribute in own and any(kind.__name__ == wrapper for kind in type(module).__mro__):  # FSDP2 derives from it
        return attribute
    return None


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
        got = _RECOMPUTING.get(frame.f_globals.get("__name__", ""))
        if got is not None:
            raise ReplayError(
                f"router {site.name} runs under an activation checkpoint that moetrace cannot follow",
                expected="model.gradient_checkpointing_enable(...) or checkpoint_wrapper, before the replay began",
                got=got,
                fix="Its recomputation would use live routes; enable checkpointing in one of these ways instead.",
            )
        frame = frame.f_back  # type: ignore[assignment]


def _is_compiled(module: nn.Module) -> bool:
    # not by the name of the class: FSDP2 replaces it
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


_taps: weakref.WeakKeyDictionary[nn.Module, ModelTap] = weakref.WeakKeyDictionary()
_taps_lock = threading.Lock()


def tap_model(model: nn.Module) -> ModelTap:
    """The tap of a model; all recordings and replays of one model share it.

    Raises:
        RouterError, LayoutMismatchError: see `layout_of`.
    """
    whole, model = model, unwrapped(model)
    if any(_is_compiled(module) for module in whole.modules()):
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
    return all(_submodule(model, site.name) is site.module for site in tap.sites)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    """`get_submodule` by the module's own tables: a replay begins with one look at every router."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module
