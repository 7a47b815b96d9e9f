"""The token ids that a model is called with, as its input embeddings get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetrace.routers.find import unwrapped
from moetrace.routers.sessions import in_backward
from moetrace.routers.tap import Tapped

_PLACEHOLDERS = [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]


@dataclass(eq=False)
class _Watch:
    embeddings: nn.Module
    innermost: bool


_watches: ContextVar[tuple[_Watch, ...]] = ContextVar("moetrace token ids", default=())
"""Who watches in this thread or task of asyncio, the innermost last."""


@contextmanager
def token_ids_of(model: nn.Module, see: Callable[[torch.Tensor], None], *, innermost: bool = False) -> Iterator[None]:
    """Show the token ids of every forward of this thread or task, before anything is computed with them.

    Where a model has no input embeddings (a later stage of a pipeline), or is called with `inputs_embeds`, nothing is
    shown. Recomputations in a backward pass are not: their forward has been.

    Args:
        model: whose forwards.
        see: gets the ids, as a rule `[B, S]`.
        innermost: of such contexts within each other only the innermost is shown any.
    """
    embeddings = _input_embeddings(model)
    if embeddings is None:
        yield
        return
    own = _Watch(embeddings, innermost)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rivals = [watch for watch in _watches.get() if watch is own or (watch.innermost and watch.embeddings is module)]
        if own not in rivals or (innermost and rivals[-1] is not own) or in_backward():
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                see(value)
                return

    # First of all hooks: those of a parallel plan make shards of the ids.
    handle = embeddings.register_forward_pre_hook(Tapped(before), prepend=True, with_kwargs=True)
    _watches.set((*_watches.get(), own))
    try:
        yield
    finally:
        _watches.set(tuple(watch for watch in _watches.get() if watch is not own))
        handle.remove()


def placeholders_of(model: nn.Module) -> frozenset[int]:
    """Ids that stand for parts of an image, a video or a sound: some models look up others in their place."""
    config = getattr(unwrapped(model), "config", None)
    ids = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return frozenset(token for token in ids if isinstance(token, int))


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(unwrapped(model), "get_input_embeddings", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):  # as transformers says that there are none
        return None
    return found if isinstance(found, nn.Module) else None
