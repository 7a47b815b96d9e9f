"""Replay recorded routes in a training forward: align traces to a batch, supply them at the tap, watch the overlap."""

from moetrace.replayer.align import AlignedRoutes, align
from moetrace.replayer.counts import ReplayCounts, ReplayStats
from moetrace.replayer.session import ReplaySession, replay

__all__ = ["AlignedRoutes", "ReplayCounts", "ReplaySession", "ReplayStats", "align", "replay"]
