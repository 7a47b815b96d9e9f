"""The nouns between the suite and an engine: what is asked, what comes back, and who can be asked.

Axes: T rows, L layers, K experts per token, as the engine's payload has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moetrace.errors import CheckError
from moetrace.layout import MoeLayout
from moetrace.trace import Order


@dataclass(frozen=True)
class Ask:
    """One request, with routes.

    Attributes:
        prompt: token ids.
        max_new_tokens: most tokens to generate; 0 scores the prompt, which then has a row for each token.
        n: how many sequences.
        temperature: 0 takes the most likely token.
        ignore_eos: go on after an end-of-sequence token.
        start: position of the first row to return.
        stream: let tokens come one by one, and routes as the dialect streams them.
        abort_after: end the request from outside once so many tokens are there.
        cached: how many of the prompt's first tokens an engine may have in its cache. Engines are not told; it is
            for whoever reads the findings.
        switches: the weights change while it runs.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    n: int = 1
    temperature: float = 0.0
    ignore_eos: bool = True
    start: int = 0
    stream: bool = False
    abort_after: int | None = None
    cached: int = 0
    switches: bool = False


@dataclass(frozen=True)
class Rows:
    """Routes as a payload holds them, before anybody has judged them.

    Attributes:
        ids_TLK: any integers, in any shape of three axes.
        valid_T: `[T]` bool, False where the payload says that a row is missing.
        all_layers: the dialect has a place for every decoder layer, dense ones too.
        layout: what it says of layers and experts, or None.
        order: what it says of the order of ids, or None.
        start: what it says of the position of its first row, or None.
        seams: row numbers at which the pieces of a stream join.
        refusal: why the dialect's own strict reader refuses the payload, "" if it reads it, None if there is none.

    Raises:
        CheckError: the ids have not three axes, or not a mark for each row.
    """

    ids_TLK: np.ndarray
    valid_T: np.ndarray
    all_layers: bool = False
    layout: MoeLayout | None = None
    order: Order | None = None
    start: int | None = None
    seams: tuple[int, ...] = ()
    refusal: str | None = None

    def __post_init__(self) -> None:
        if self.ids_TLK.ndim != 3 or self.valid_T.shape != self.ids_TLK.shape[:1]:
            raise CheckError(
                "the rows are in no form that can be judged",
                expected="ids [T, L, K] and marks [T]",
                got=f"{self.ids_TLK.shape} and {self.valid_T.shape}",
            )


@dataclass(frozen=True)
class Answer:
    """One sequence: its tokens, why it ended ("stop", "length", "abort", ...), and its routes, if any came."""

    output: tuple[int, ...]
    finish_reason: str
    rows: Rows | None


class Subject(Protocol):
    """An engine under test, behind a dialect."""

    name: str
    """The engine and its version, for the report."""
    dialect: str
    window: int | None
    """Longest sequence, where the engine tells it."""

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """Ask for one request and wait: one answer for each of its `n` sequences.

        Raises:
            LackingError: the dialect cannot ask for that, or the engine refuses it (HTTP 4xx).
            CheckError: the engine failed (HTTP 5xx, no connection, an answer that is none).
        """
        ...

    async def update_weights(self, folder: str, version: str) -> None:
        """Load the checkpoint `folder`, as the engine sees it; raises as `ask`."""
        ...

    async def close(self) -> None:
        """Free what was opened for the test; the engine goes on."""
        ...
