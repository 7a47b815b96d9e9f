"""Whether a model is called with the tokens that its routes were aligned to.

Another batch of the same size passes every check of shapes, and its routes are then of nobody's tokens. What the
model's input embeddings are called with says which tokens these are.

Axis: N tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moetrace.errors import TokenMismatchError
from moetrace.replayer.routes import AlignedRoutes
from moetrace.replayer.upload import RoutesUpload
from moetrace.routers.find import unwrapped
from moetrace.routers.sessions import in_backward

_PLACEHOLDERS = [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]

_watches: ContextVar[tuple[tuple[int, RemovableHandle], ...]] = ContextVar("moetrace token checks", default=())
"""Which embeddings are watched in this thread or task of asyncio, and by whom, the innermost last."""


class TokenCheck:
    """Compares the ids that a model is called with to those that were aligned, where both are known."""

    def __init__(self, routes: AlignedRoutes, upload: RoutesUpload) -> None:
        self._routes, self._upload = routes, upload
        self._differs_N: torch.Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether ids were compared on a device, and so what came out is not known here yet."""
        return self._differs_N is not None

    def compare(self, ids: torch.Tensor, *, later: bool) -> None:
        """Look at the ids of one forward.

        Ids that are no batch of N tokens are not of this batch as a whole: whether they are its slice is for the
        routers to say, who count their tokens.

        Args:
            ids: `[B, S]`, as the model's input embeddings get them.
            later: keep on the device of the ids what comes out. No synchronisation then.

        Raises:
            TokenMismatchError: some are others, and `later` is False.
        """
        compared_N = self._upload.compared_N
        if compared_N is None or ids.ndim != 2 or ids.numel() != len(compared_N):
            return
        if later:
            differs_N = _differ(ids.detach(), self._upload.on(ids.device).tokens_N)
            self._differs_N = differs_N if self._differs_N is None else self._differs_N | differs_N
            return
        differs_N = _differ(ids.detach().cpu(), torch.from_numpy(compared_N))
        if differs_N.any():
            raise self._error(*_found_in(differs_N).tolist())

    def found(self, device: torch.device) -> torch.Tensor:
        """`[2]` int64 on a device: how many differ, and the number of the first. No synchronisation."""
        if self._differs_N is None:
            return torch.zeros(2, dtype=torch.int64, device=device)  # made there: bringing it would wait
        return _found_in(self._differs_N).to(device)

    def error_of(self, found: list[int]) -> TokenMismatchError | None:
        """What there is to raise, of what `found` gave."""
        count, first = found
        return self._error(count, first) if count else None

    def _error(self, count: int, first: int) -> TokenMismatchError:
        routes = self._routes
        assert routes.tokens_N is not None, "nothing else is compared"
        return TokenMismatchError(
            "the model was called with other tokens than those that the routes were aligned to",
            expected=f"token {routes.tokens_N[first]} at position {routes.position_N[first]} "
            f"of sequence {routes.sequence_N[first]}",
            got=f"another there, the first of {count} that differ",
            fix="Call the model with the very input_ids given to replay, each microbatch inside its own replay.",
        )


def _differ(ids: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """`[N]` bool. Where nothing is compared `tokens_N` is below 0."""
    return (ids.reshape(-1) != tokens_N) & (tokens_N >= 0)


def _found_in(differs_N: torch.Tensor) -> torch.Tensor:
    """`[2]` int64: how many are True, and the number of the first."""
    return torch.stack([differs_N.sum(), differs_N.view(torch.uint8).argmax()])


@contextmanager
def token_ids_of(model: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show the token ids of every forward of this thread or task, before anything is computed with them.

    Of contexts within each other only the innermost is shown any, as it is the innermost replay that decides. Where a
    model has no input embeddings (a later stage of a pipeline), or is called with `inputs_embeds`, nothing is shown.
    Recomputations in a backward pass are not: their forward has been.
    """
    embeddings = _input_embeddings(model)
    if embeddings is None:
        yield
        return

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = next((watch for watch in reversed(_watches.get()) if watch[0] == id(module)), None)
        if watch is not own or in_backward():
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                see(value)
                return

    # First of all hooks: those of a parallel plan make shards of the ids.
    handle = embeddings.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    own = id(embeddings), handle
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
