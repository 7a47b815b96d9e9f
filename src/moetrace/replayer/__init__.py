"""Replay recorded routes in a training forward: align traces to a batch, supply them at the tap, watch the overlap.

Alignment and slicing for ranks need numpy only; what needs torch loads it when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetrace.replayer.align import align
from moetrace.replayer.counts import ReplayCounts, ReplayStats
from moetrace.replayer.policy import ReplayPolicy
from moetrace.replayer.routes import AlignedRoutes, TokenMode

_NEED_TORCH = {
    "ReplaySession": "moetrace.replayer.session",
    "RouterShift": "moetrace.replayer.drift",
    "replay": "moetrace.replayer.session",
    "router_scores": "moetrace.replayer.drift",
    "router_shift": "moetrace.replayer.drift",
}

__all__ = [
    "AlignedRoutes",
    "ReplayCounts",
    "ReplayPolicy",
    "ReplaySession",
    "ReplayStats",
    "RouterShift",
    "TokenMode",
    "align",
    "replay",
    "router_scores",
    "router_shift",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'moetrace.replayer' has no attribute {name!r}")
    return getattr(import_module(_NEED_TORCH[name]), name)


if TYPE_CHECKING:
    from moetrace.replayer.drift import RouterShift as RouterShift
    from moetrace.replayer.drift import router_scores as router_scores
    from moetrace.replayer.drift import router_shift as router_shift
    from moetrace.replayer.session import ReplaySession as ReplaySession
    from moetrace.replayer.session import replay as replay
