"""A sound engine that computes nothing: it answers from the closed form. What mutants are made of."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask, Rows

_PIECE = 5


class Oracle:
    """Answers every request as an engine without a fault would."""

    dialect = "in process"
    window: int | None = None

    def __init__(self, form: DyeForm, name: str = "oracle") -> None:
        self.name, self.form = name, form
        self._random = random.Random(0)
        self.in_flight = 0

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`; requests that are asked together run together."""
        form = self.form
        self.in_flight += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            samples = [self._output(ask) for _ in range(ask.n)]
            return [Answer(output, reason, self.rows(ask, output, form)) for output, reason in samples]
        finally:
            self.in_flight -= 1

    def rows(self, ask: Ask, output: tuple[int, ...], form: DyeForm) -> Rows:
        """The rows of a sequence under the weights that it began with."""
        tokens = [*ask.prompt, *output]
        ids_TLK = form.routes(tokens[ask.start : len(tokens) - (ask.max_new_tokens > 0)]).astype(np.int64)
        seams = tuple(range(_PIECE, len(ids_TLK), _PIECE)) if ask.stream else ()
        return Rows(ids_TLK, np.ones(len(ids_TLK), bool), start=ask.start, seams=seams)

    def _output(self, ask: Ask) -> tuple[tuple[int, ...], str]:
        count = ask.max_new_tokens
        if ask.temperature > 0:
            return tuple(self._random.choices(range(self.form.vocab_size), k=count)), "length"
        output = self.form.continuation(ask.prompt[-1], count)
        if not ask.ignore_eos and self.form.eos_token_id in output:
            return tuple(output[: output.index(self.form.eos_token_id) + 1]), "stop"
        if ask.abort_after is not None and ask.abort_after < count:
            return tuple(output[: ask.abort_after + 2]), "abort"
        return tuple(output), "length"

    async def update_weights(self, folder: str, version: str) -> None:
        """Take the form of another checkpoint folder."""
        self.form = DyeForm.load(folder)

    async def close(self) -> None:
        """Nothing was opened."""
