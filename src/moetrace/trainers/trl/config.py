"""The knobs of replay in TRL, each written once."""

from __future__ import annotations

from dataclasses import dataclass

from moetrace.errors import ReplayError
from moetrace.replayer import ReplayPolicy
from moetrace.replayer.alarm import OnShift


@dataclass(frozen=True)
class ReplayConfig:
    """How routes are replayed and what is measured.

    Attributes:
        missing: what a token without a row does: "error", or "live" to let the live router decide.
        policy: which rows are replayed, by a name and perhaps a margin; None: all. The response is what was sampled.
        on_shift: what happens when routes fit the live router better shifted by one token: "error", "warn", "ignore".
        compare_every: measure what replay changes on the first generation and on every so many after it, by two more
            forwards of that generation without gradients: one without replay, one with it. 0: never.
        tau: by which factor the two probabilities of an extreme token differ, above 1.
    """

    missing: str = "error"
    policy: ReplayPolicy | None = None
    on_shift: OnShift = "error"
    compare_every: int = 10
    tau: float = 2.0

    def __post_init__(self) -> None:
        named = isinstance(self.policy, ReplayPolicy) and isinstance(self.policy.rows, str)
        for name, right, meaning in (
            ("missing", self.missing in ("error", "live"), "'error' or 'live'"),
            ("policy", self.policy is None or named, "a ReplayPolicy with rows by a name: batches differ"),
            ("on_shift", self.on_shift in ("error", "warn", "ignore"), "'error', 'warn' or 'ignore'"),
            ("compare_every", self.compare_every >= 0, "0 or more"),
            ("tau", self.tau > 1, "above 1"),
        ):
            if not right:
                raise ReplayError(f"{name} is out of range", expected=meaning, got=repr(getattr(self, name)))
