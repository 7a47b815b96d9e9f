"""One sequence as it should be and as it came, read backwards: which token a row is of.

The rows of a dye's tokens are all different, so a wrong row still tells what it is the row of. Axes: T rows, L MoE
layers, K experts per token, V tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moetrace.conformance.dye.form import DyeForm

UNKNOWN_TOKEN = -1


class Reader:
    """From rows to the tokens whose rows they are, by one form; rank order plays no part."""

    def __init__(self, form: DyeForm) -> None:
        self.form = form

    @cached_property
    def _tokens(self) -> dict[bytes, int]:
        rows_VLK = np.sort(self.form.routes(np.arange(self.form.vocab_size)).astype(np.int32))
        return {row.tobytes(): token for token, row in enumerate(rows_VLK)}

    def read(self, ids_TLK: np.ndarray) -> np.ndarray:
        """`[T]` tokens, `UNKNOWN_TOKEN` where a row is no token's."""
        rows_TLK = np.sort(ids_TLK.astype(np.int32))
        return np.array([self._tokens.get(row.tobytes(), UNKNOWN_TOKEN) for row in rows_TLK], np.int64)


@dataclass
class Asked:
    """A sequence of the run: its tokens so far, and between which two ticks it is under way (to None: it still is)."""

    number: int
    tokens: np.ndarray
    began: int
    ended: int | None = None


@dataclass
class Book:
    """All sequences of a run, found again by their tokens."""

    sequences: dict[int, Asked] = field(default_factory=dict)
    _places: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, asked: Asked) -> None:
        """Keep a sequence, or what has become of it."""
        known = self.sequences.get(asked.number)
        self.sequences[asked.number] = asked
        for position in range(0 if known is None else len(known.tokens), len(asked.tokens)):
            self._places[int(asked.tokens[position])].append((asked.number, position))

    @property
    def num_tokens(self) -> int:
        """Of all of them."""
        return sum(len(asked.tokens) for asked in self.sequences.values())

    def find(self, seen: Sequence[tuple[int, int]], besides: int, past: bool) -> tuple[Asked, int] | None:
        """The sequence, and by how many places it is off, that explains most of `seen` (position, token).

        Of several the one in its own place, then one that has ended or, by `past`, one that is still under way.
        """
        votes: Counter[tuple[int, int]] = Counter()
        for position, token in seen[:64]:
            votes.update((number, at - position) for number, at in self._places.get(token, ()) if number != besides)
        if not votes:
            return None

        def merit(vote: tuple[tuple[int, int], int]) -> tuple[int, bool, bool, int]:
            (number, offset), count = vote
            return count, offset == 0, (self.sequences[number].ended is not None) == past, number

        (number, offset), _ = max(votes.items(), key=merit)
        return self.sequences[number], offset


@dataclass(frozen=True)
class Scene:
    """What a diagnosis sees of one sequence.

    Attributes:
        form: the weights that were in force.
        readers: of all weight versions of the run, by version.
        number, tokens: the sequence, P + O tokens.
        prompt_length: P.
        start: position of the first row that was asked for.
        cached: how many first tokens an engine may have in its cache.
        want_TLK, got_TLK: rows as they should be and as they came; of the same L and K.
        seams: where the pieces of a stream join.
        began: tick at which it was asked.
        siblings: tokens of the other samples of its request, by their number.
        book: the other sequences.
    """

    form: DyeForm
    readers: dict[int, Reader]
    number: int
    tokens: np.ndarray
    prompt_length: int
    start: int
    cached: int
    want_TLK: np.ndarray
    got_TLK: np.ndarray
    seams: tuple[int, ...]
    began: int
    siblings: dict[int, np.ndarray]
    book: Book
    ordered: bool

    @cached_property
    def seen_T(self) -> np.ndarray:
        """Which token each row is of."""
        return self.readers[self.form.weight_version].read(self.got_TLK)

    @property
    def right_T(self) -> np.ndarray:
        """Which token each row should be of."""
        return self.tokens[self.start : self.start + len(self.want_TLK)]

    @cached_property
    def wrong_TL(self) -> np.ndarray:
        """Where ids are wrong; only if as many rows came as should."""
        return wrong_layers(self.want_TLK, self.got_TLK, self.ordered)

    @cached_property
    def wrong_T(self) -> np.ndarray:
        """Which rows are wrong."""
        return ~right_rows(self.want_TLK, self.got_TLK, self.ordered)


def wrong_layers(want_TLK: np.ndarray, got_TLK: np.ndarray, ordered: bool) -> np.ndarray:
    """`[T, L]`: where the ids are not those they should be, in rank order or as sets."""
    if not ordered:
        want_TLK, got_TLK = np.sort(want_TLK), np.sort(got_TLK)
    return (want_TLK != got_TLK).any(axis=2)


def right_rows(want_TLK: np.ndarray, got_TLK: np.ndarray, ordered: bool) -> np.ndarray:
    """`[T]`: which rows are right in all layers."""
    return np.all(~wrong_layers(want_TLK, got_TLK, ordered), axis=1)
