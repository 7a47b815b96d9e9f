"""Replay in Megatron-Core. Needs the extra `megatron`; see docs/trainers.md.

`attach` is for training code of your own: it answers the routers of one model, whatever Megatron-Core's `RouterReplay`
can do. `fill` is for code that drives `RouterReplay` already: the same checks, and nothing else taken over.
"""

from __future__ import annotations

try:
    import megatron.core.transformer.moe.router  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("megatron", "torch"):
        raise
    from moetrace.errors import MissingExtraError

    raise MissingExtraError.of(error, "megatron") from error

from moetrace.trainers.megatron.filling import begin_recomputation, fill, finish
from moetrace.trainers.megatron.microbatch import Microbatch
from moetrace.trainers.megatron.recording import Recording
from moetrace.trainers.megatron.replaying import Replayer, attach

__all__ = ["Microbatch", "Recording", "Replayer", "attach", "begin_recomputation", "fill", "finish"]
