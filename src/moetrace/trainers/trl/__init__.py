"""R3 in TRL's GRPOTrainer: `from moetrace.trainers.trl import GRPOTrainer`. See docs/trainers.md."""

from __future__ import annotations

from moetrace.errors import MissingExtraError

try:
    from moetrace.trainers.trl.config import ReplayConfig
    from moetrace.trainers.trl.server import ServerRollout
    from moetrace.trainers.trl.trainer import GRPOTrainer, RoutingReplay
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "moetrace":
        raise
    raise MissingExtraError.of(error, "trl") from error

__all__ = ["GRPOTrainer", "ReplayConfig", "RoutingReplay", "ServerRollout"]
