"""Which sessions take part in a forward: per thread, per task of asyncio, per checkpointed layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from moetrace.errors import ReplayError
from moetrace.routers.selection import RoutingSession

_Item = TypeVar("_Item")
_begun: ContextVar[tuple[weakref.ref[RoutingSession], ...]] = ContextVar("moetrace sessions", default=())
"""Sessions that began in this task of asyncio, or before it in what made it. Of other tasks' the thread has more."""


class ThreadSessions(threading.local):
    """What is going on in this thread: active sessions, and those of the checkpointed layer that is being followed.

    No attribute is the class's: of a thread-local object torch.compile would read these (torch 2.11).
    """

    def __init__(self) -> None:
        self.sessions: tuple[RoutingSession, ...] = ()
        self.of_task: tuple[weakref.ref[RoutingSession], ...] | None = None  # a value of `_begun` that has all of them
        self.followed: tuple[RoutingSession, ...] | None = None
        self.recompute = False

    @contextmanager
    def begun(self, sessions: tuple[RoutingSession, ...]) -> Iterator[None]:
        """Add sessions, and then take away these and no others: contexts of generators and tasks end in any order."""
        own = vars(self)  # of this thread, on whichever a generator that nobody needs any more is closed
        before, of_task, inside = own["sessions"], own["of_task"], _begun.get()
        refs = tuple(map(weakref.ref, sessions))
        now, begun = before + sessions, inside + refs
        own["sessions"], own["of_task"] = now, begun if not before or of_task is inside else None
        _begun.set(begun)
        if own["followed"] is not None:
            own["followed"] += sessions
        later: tuple[RoutingSession, ...] = ()
        try:
            yield
        finally:
            if own["sessions"] is now:
                own["sessions"], own["of_task"] = before, of_task
            else:
                (own["sessions"], later), own["of_task"] = _without(own["sessions"], sessions), None
            ended = _begun.get()
            _begun.set(inside if ended is begun else _without(ended, refs)[0])
            if own["followed"] is not None:
                own["followed"], _ = _without(own["followed"], sessions)
        if later and any(session.supplies_routes for session in sessions):
            _refuse_interleaved([session for session in later if weakref.ref(session) in ended])

    @contextmanager
    def following(self, sessions: tuple[RoutingSession, ...], recompute: bool) -> Iterator[None]:
        """Run a checkpointed layer with the sessions of its first pass, whatever else is active now."""
        before = self.followed, self.recompute
        self.followed, self.recompute = sessions, recompute
        try:
            yield
        finally:
            self.followed, self.recompute = before


def _without(items: tuple[_Item, ...], gone: tuple[_Item, ...]) -> tuple[tuple[_Item, ...], tuple[_Item, ...]]:
    """The items without those that are gone, and what came after these. Most often they are the last."""
    at = len(items) - len(gone)
    while at >= 0 and any(item is not last for item, last in zip(items[at:], gone, strict=False)):
        at -= 1
    if at < 0:
        return items, ()
    later = items[at + len(gone) :]
    return items[:at] + later, later


def taking_part(state: ThreadSessions) -> tuple[RoutingSession, ...]:
    """The sessions of a forward that runs now: those of the layer that is followed, or else this task's own.

    A recomputation that is not followed has none, since its first pass ran without them.
    """
    if state.followed is not None:
        return state.followed
    if not state.sessions or torch.compiler.is_compiling():  # which cannot ask for a task: an engine's step has none
        return state.sessions
    if in_backward():
        return ()
    begun = _begun.get()
    if begun is state.of_task:
        return state.sessions
    return tuple(session for session in state.sessions if weakref.ref(session) in begun)


def in_backward() -> bool:
    """True while autograd runs a backward pass on this thread: a forward is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _refuse_interleaved(later: list[RoutingSession]) -> None:
    """Between two replays of which neither is inside the other nobody can tell whose routes a forward should get."""
    if any(session.supplies_routes for session in later):
        raise ReplayError(
            "a replay ends before one that began inside it: forwards since then had the routes of the later one",
            expected="replays of one model, on one thread, that end in the reverse order of their beginning",
            got="two that interleave, as those of two generators in turn do",
            fix="End one before the next begins, or run each on a thread or in an asyncio task of its own.",
        )
