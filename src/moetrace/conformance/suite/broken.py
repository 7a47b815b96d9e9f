"""An engine that is broken on purpose: a sound one, and what bends its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask, Subject
from moetrace.conformance.suite.bugs import Bug

_SHARED = 8
"""Equal tokens at the beginning that count as a cached prefix."""


class Broken:
    """A subject whose answers a mutant bends; it remembers what an engine would have in its cache.

    Args:
        subject: a sound engine.
        form: its checkpoint.
        mutant: how it is broken.
    """

    dialect = "in process"

    def __init__(self, subject: Subject, form: DyeForm, mutant: Mutant) -> None:
        self.name, self.window, self.form = mutant.name, subject.window, form
        self.old_form: DyeForm | None = None
        self.past: list[np.ndarray] = []
        self.running: list[Ask] = []
        self._subject, self._mutant = subject, mutant

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        self.running.append(ask)
        try:
            answers = list(await self._subject.ask(ask))
            bent = self._mutant.bend(self, ask, answers)
        finally:
            self.running.remove(ask)
        self.past += [np.array([*ask.prompt, *answer.output]) for answer in answers]
        return bent

    async def update_weights(self, folder: str, version: str) -> None:
        """See `Subject`."""
        await self._subject.update_weights(folder, version)
        self.old_form, self.form = self.form, DyeForm.load(folder)

    async def close(self) -> None:
        """See `Subject`."""
        await self._subject.close()

    def shared(self, ask: Ask) -> int:
        """How many first tokens of a prompt were computed before; 0 if few."""
        prompt = np.array(ask.prompt)
        lengths = [0]
        for tokens in self.past:
            size = min(len(tokens) - 1, len(prompt))
            differing = np.flatnonzero(tokens[:size] != prompt[:size])
            lengths.append(int(differing[0]) if len(differing) else size)
        return max(lengths) if max(lengths) >= _SHARED else 0


Bend = Callable[[Broken, Ask, list[Answer]], list[Answer]]


@dataclass(frozen=True)
class Mutant:
    """One way to be broken.

    Attributes:
        name: in a few words.
        bug: what the suite must call it.
        bend: what it does to the answers of a request.
        place: what the suite must say of where, or "".
        also: what it may call it besides, in answers where both are the same.
        form: what the checkpoint must be like for the bug to show.
    """

    name: str
    bug: Bug
    bend: Bend
    place: str = ""
    also: frozenset[Bug] = frozenset()
    form: dict[str, Any] = field(default_factory=dict)
