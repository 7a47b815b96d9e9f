"""The knobs of a rollout. Imports no HTTP library."""

from __future__ import annotations

from dataclasses import dataclass, field

from moetrace import codecs
from moetrace.errors import RolloutError


@dataclass(frozen=True)
class RolloutConfig:
    """The knobs of a rollout beside the sampling. The command line reads names, defaults and help from here.

    Raises:
        RolloutError: a value is out of range.
    """

    concurrency: int = field(default=32, metadata={"help": "requests at once"})
    codec: str = field(
        default="bits", metadata={"help": "how routes travel: bits keeps ranks, set is smaller, either may have +zstd"}
    )
    limit: int | None = field(default=None, metadata={"help": "only so many prompts, from the first; default: all"})
    timeout: float = field(default=600.0, metadata={"help": "seconds for a prompt, with all that is tried again"})
    retries: int = field(default=20, metadata={"help": "connections that may fail one after the other"})

    def __post_init__(self) -> None:
        for name in ("concurrency", "limit", "timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # nor is NaN
                raise RolloutError(f"{name} is out of range", expected="more than 0", got=getattr(self, name))
        if self.codec not in codecs.CHOICES:
            raise RolloutError("codec is unknown", expected=" or ".join(codecs.CHOICES), got=self.codec)
