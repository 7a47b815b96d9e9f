"""The noun: `RoutingTrace`, what was chosen for the tokens of one sequence, and all that is needed to trust it.

Axes: T rows (tokens that were inputs), L MoE layers, K experts per token. A row is `[L, K]`; row t is the routing that
was in force while token `start + t` was the input, that is, while the distribution of the next token was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moetrace.errors import InvalidTraceError, LayoutMismatchError, TokenMismatchError
from moetrace.layout import MoeLayout, as_int, require_text
from moetrace.sorting import ascending
from moetrace.spans import WeightSpan, cut_spans, joined_spans
from moetrace.tokens import as_token_ids, first_difference, require_token_ids, sha256_of_ids
from moetrace.validity import require_valid

Order = Literal["rank", "set"]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The rows of one sequence and all that is needed to trust them. Immutable, validated at birth.

    Build one with `RoutingTrace.build`, which narrows dtypes and fills in what can be derived.

    Attributes:
        experts_TLK: `[T, L, K]`, C order, dtype `layout.dtype`; rows that are not valid hold zeros and mean nothing.
        valid_T: `[T]` bool, True where the row was captured. There is no magic expert id.
        layout: the model's `MoeLayout`.
        tokens: `[num_tokens]` int64, the token ids from position 0 on, or None where only their hash is known.
        num_tokens: number of token ids the hash covers.
        token_sha256: `token_sha256` of those token ids.
        start: position of row 0 in the sequence (0 unless this is a slice or a multi-turn delta).
        weight_spans: which rows were computed by which weights, ascending, first span at row 0; empty when unknown.
        order: "rank" when the K ids are best first, "set" when their order means nothing (but how the model summed).
        fingerprint: fingerprint of the model that routed, or "" when unknown.
        engine: name and version of the engine that recorded, or "".

    A whole sequence of P prompt and O generated tokens has `T = P + O - 1` rows: the last sampled token was never an
    input. A scored sequence (nothing generated) has one row for each token.
    """

    experts_TLK: np.ndarray
    valid_T: np.ndarray
    layout: MoeLayout
    tokens: np.ndarray | None
    num_tokens: int
    token_sha256: str
    start: int = 0
    weight_spans: tuple[WeightSpan, ...] = ()
    order: Order = "rank"
    fingerprint: str = ""
    engine: str = ""
    rows_checked: InitVar[bool] = False

    @classmethod
    def build(
        cls,
        experts_TLK: np.ndarray,
        layout: MoeLayout,
        tokens: Sequence[int] | np.ndarray,
        *,
        valid_T: np.ndarray | None = None,
        start: int = 0,
        weight_spans: Sequence[WeightSpan] = (),
        order: Order = "rank",
        fingerprint: str = "",
        engine: str = "",
        rows_checked: bool = False,
    ) -> RoutingTrace:
        """Make a trace from ids of any integer dtype; ids of rows that are not valid are dropped.

        Args:
            experts_TLK: `[T, L, K]` integers.
            layout: the model's layout.
            tokens: the token ids from position 0 on, `start + T` or `start + T + 1` of them or more.
            valid_T: `[T]` bool, no mask of numbers; all rows are valid when None.
            rows_checked: do not look at the ids again: whoever wrote the rows has made sure that those of a valid row
                are in range and distinct, and that the others hold zeros. For 32,768 tokens that look is most of what a
                trace costs.

        Raises:
            InvalidTraceError: shapes, types, ranges, duplicates or counts do not fit together.
        """
        experts_TLK = np.asarray(experts_TLK)
        if experts_TLK.ndim != 3 or experts_TLK.dtype.kind not in "iu":
            raise InvalidTraceError(
                "expert ids must be an integer array [T, L, K]",
                expected="3 axes of integers",
                got=f"shape {experts_TLK.shape}, dtype {experts_TLK.dtype}",
            )
        valid_T = np.ones(len(experts_TLK), bool) if valid_T is None else _flags(valid_T)
        if not rows_checked:
            experts_TLK = _in_range(experts_TLK, valid_T, layout)
        tokens = as_token_ids(tokens, copy=True)
        return cls(
            experts_TLK=_frozen(experts_TLK.astype(layout.dtype, order="C", copy=experts_TLK.flags.writeable)),
            valid_T=valid_T,
            layout=layout,
            tokens=_frozen(tokens),
            num_tokens=len(tokens),
            token_sha256=sha256_of_ids(tokens),
            start=start,
            weight_spans=tuple(weight_spans),
            order=order,
            fingerprint=fingerprint,
            engine=engine,
            rows_checked=rows_checked,
        )

    def __post_init__(self, rows_checked: bool) -> None:
        for name in ("num_tokens", "start"):
            object.__setattr__(self, name, as_int(getattr(self, name), name))
        for name in ("token_sha256", "fingerprint", "engine"):
            require_text(getattr(self, name), name)
        for name in ("experts_TLK", "valid_T", "tokens"):
            array = getattr(self, name)
            if array is not None and (array.flags.writeable or not (array.flags.owndata and array.flags.c_contiguous)):
                object.__setattr__(self, name, _frozen(np.array(array, order="C")))
        require_valid(self, rows_checked)

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.valid_T)

    @property
    def stop(self) -> int:
        """Position after that of the last row: `start + T`."""
        return self.start + self.num_rows

    @cached_property
    def num_valid(self) -> int:
        """How many rows were captured."""
        return int(self.valid_T.sum())

    def __len__(self) -> int:
        return self.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made by the constructor: numpy's own would come back writable, and unchecked."""
        return type(self), tuple(getattr(self, fact.name) for fact in fields(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        arrays = (self.experts_TLK.tobytes(), self.valid_T.tobytes(), self.tokens is None)
        facts = (self.layout, self.num_tokens, self.token_sha256, self.start, self.weight_spans)
        return (*arrays, *facts, self.order, self.fingerprint, self.engine)

    def __repr__(self) -> str:
        layout = self.layout
        return (
            f"RoutingTrace(T={self.num_rows} ({self.num_valid} valid), L={layout.num_layers}, K={layout.top_k}, "
            f"E={layout.num_experts}, start={self.start}, order={self.order!r}, engine={self.engine!r})"
        )

    def weight_version(self, row: int) -> str | None:
        """Version of the weights that computed row `row` (an index into this trace), or None when unknown."""
        versions = [span.version for span in self.weight_spans if span.start <= row]
        return versions[-1] if versions else None

    def slice(self, start: int, stop: int) -> RoutingTrace:
        """Rows of the positions `start <= position < stop`; the tokens stay whole, so the slice can still be checked.

        Raises:
            InvalidTraceError: the positions are not all in this trace.
        """
        if not self.start <= start <= stop <= self.stop:
            raise InvalidTraceError(
                "the slice leaves the trace",
                expected=f"{self.start} <= start <= stop <= {self.stop}",
                got=f"{start}, {stop}",
            )
        if (start, stop) == (self.start, self.stop):
            return self
        first, last = start - self.start, stop - self.start
        return self._changed(
            experts_TLK=self.experts_TLK[first:last],
            valid_T=self.valid_T[first:last],
            start=start,
            weight_spans=cut_spans(self.weight_spans, first, last),
        )

    def concat(self, later: RoutingTrace) -> RoutingTrace:
        """This trace followed by a later turn of the same conversation: `later.start` must be `self.stop`.

        The tokens of the later turn must begin with those of this one (a re-tokenised or edited context does not). This
        trace may know only their hash; then the hash decides.

        Raises:
            LayoutMismatchError: the traces come from different models.
            TokenMismatchError: the later tokens do not continue these; says the first position that differs, or, where
                only a hash is known here, among how many tokens it is.
            InvalidTraceError: rows are missing or doubled between the two.
        """
        self.layout.require_same(later.layout, "the later turn")
        if self.fingerprint and later.fingerprint and self.fingerprint != later.fingerprint:
            raise LayoutMismatchError(
                "the two turns were routed by different models", expected=self.fingerprint, got=later.fingerprint
            )
        if later.tokens is None:
            raise TokenMismatchError(
                "a later turn without token ids cannot be joined",
                fix="Give it its token ids: later.with_tokens(tokens).",
            )
        self._require_continued_by(later.tokens)
        if later.start != self.stop:
            raise InvalidTraceError(
                "the later turn's rows do not follow on", expected=f"start {self.stop}", got=later.start
            )
        if not self.num_rows or not later.num_rows:  # nothing to join, but the longer context
            whole = later if later.num_rows else self
            return whole._changed(tokens=later.tokens, num_tokens=later.num_tokens, token_sha256=later.token_sha256)
        return later._changed(
            fingerprint=later.fingerprint or self.fingerprint,
            experts_TLK=np.concatenate([self.experts_TLK, later.experts_TLK]),
            valid_T=np.concatenate([self.valid_T, later.valid_T]),
            start=self.start,
            weight_spans=joined_spans(self.weight_spans, later.weight_spans, self.num_rows),
            order="rank" if self.order == later.order == "rank" else "set",
        )

    def _changed(self, **facts: Any) -> RoutingTrace:
        """Another trace of rows that traces had: those are not looked at again."""
        return replace(self, rows_checked=True, **facts)

    def _require_continued_by(self, tokens: np.ndarray) -> None:
        fix = "Send token ids, not text, from turn to turn."
        if self.tokens is None:
            if len(tokens) < self.num_tokens or sha256_of_ids(tokens[: self.num_tokens]) != self.token_sha256:
                raise TokenMismatchError(
                    f"the later turn's tokens do not continue this one's: one of the first {self.num_tokens} differs",
                    expected=f"SHA-256 {self.token_sha256[:16]}...",
                    fix=f"{fix} To learn which one, keep this turn's token ids.",
                )
            return
        position = first_difference(self.tokens, tokens)
        if position is not None or len(tokens) < len(self.tokens):
            where = len(tokens) if position is None else position
            raise TokenMismatchError(
                f"the later turn's tokens do not continue this one's: first difference at position {where}",
                expected=self.tokens[where],
                got=None if where >= len(tokens) else tokens[where],
                fix=fix,
            )

    def as_set(self) -> RoutingTrace:
        """The same choice without its order: `order` is "set" and ids ascend. What the codec `set` keeps.

        A replay of it chooses the same experts with the same weights; a model may sum their outputs in another order,
        which changes the last bits.
        """
        return self._changed(experts_TLK=ascending(self.experts_TLK), order="set")

    def without_tokens(self) -> RoutingTrace:
        """The same trace knowing only the hash of its tokens: for receivers that have the token ids anyway."""
        return self._changed(tokens=None)

    def with_tokens(self, tokens: Sequence[int] | np.ndarray) -> RoutingTrace:
        """The same trace knowing its token ids again.

        Args:
            tokens: the token ids from position 0 on; more than `num_tokens` are welcome (the context went on since).

        Raises:
            TokenMismatchError: they are not those the trace was recorded on.
            InvalidTraceError: they are not the ids of one sequence.
        """
        tokens = as_token_ids(tokens)[: self.num_tokens]
        self.require_tokens(tokens, "these")
        return self._changed(tokens=tokens) if len(tokens) == self.num_tokens else self

    def require_tokens(self, tokens: Sequence[int] | np.ndarray, whose: str) -> None:
        """Raise `TokenMismatchError` unless `tokens` (from position 0 on) are those this trace was recorded on.

        A shorter or longer sequence passes as long as the common part is equal (a truncated context, or a context that
        went on); where only the hash is known, lengths must be equal. What are no token ids is an `InvalidTraceError`.
        """
        tokens = as_token_ids(tokens)
        if self.tokens is None:
            require_token_ids(tokens)
            if len(tokens) != self.num_tokens or sha256_of_ids(tokens) != self.token_sha256:
                raise TokenMismatchError(
                    f"the trace was recorded on other tokens than {whose}",
                    expected=f"{self.num_tokens} tokens with SHA-256 {self.token_sha256[:16]}...",
                    got=f"{len(tokens)} with {sha256_of_ids(tokens)[:16]}...",
                    fix="Pass the traces in the order of the sequences.",
                )
            return
        position = first_difference(self.tokens, tokens)
        if position is not None:
            raise TokenMismatchError(
                f"the trace was recorded on other tokens than {whose}: first difference at position {position}",
                expected=f"token {self.tokens[position]}",
                got=f"token {tokens[position]}",
                fix="Pass the traces in the order of the sequences, the token ids that the engine returned, and the"
                " attention_mask of a padded batch.",
            )


def as_traces(traces: RoutingTrace | Iterable[RoutingTrace]) -> list[RoutingTrace]:
    """One trace, or several, as a list.

    Raises:
        InvalidTraceError: something else is among them.
    """
    several: list[Any] = list(traces) if isinstance(traces, Iterable) and not isinstance(traces, str) else [traces]
    for trace in several:
        require_trace(trace)
    return several


def require_trace(trace: object) -> None:
    if not isinstance(trace, RoutingTrace):
        raise InvalidTraceError(
            "this is no trace",
            expected="a RoutingTrace",
            got=repr(trace)[:80],
            fix="A Completion has one, `trace`; moetrace.load_file reads files, and moetrace.dialects payloads.",
        )


def _flags(valid_T: np.ndarray) -> np.ndarray:
    """`valid_T` as bools, and nothing that only looks like them: -1 and "False" would count as captured."""
    flags = np.asarray(valid_T)
    if flags.dtype != np.bool_ and flags.size:  # an empty list has no type of its own
        raise InvalidTraceError(
            "valid_T must be [T] bool",
            got=f"shape {flags.shape}, dtype {flags.dtype}",
            fix="Make a mask of 0 and 1 one of bools: mask == 1.",
        )
    return flags.astype(bool, copy=False)


def _in_range(experts_TLK: np.ndarray, valid_T: np.ndarray, layout: MoeLayout) -> np.ndarray:
    """The ids, zero in rows that are not valid; they must fit the layout's type to be looked at further."""
    if valid_T.shape == experts_TLK.shape[:1] and not valid_T.all():  # other shapes: __post_init__ says what is wrong
        experts_TLK = np.where(valid_T[:, None, None], experts_TLK, 0)
    if experts_TLK.size and not 0 <= experts_TLK.min() <= experts_TLK.max() < layout.num_experts:
        row, layer, rank = np.argwhere((experts_TLK < 0) | (experts_TLK >= layout.num_experts))[0]
        raise InvalidTraceError(
            f"an expert id of row {row}, layer {layout.layers[layer] if layer < layout.num_layers else layer} "
            "is out of range",
            expected=f"0 <= id < {layout.num_experts}",
            got=experts_TLK[row, layer, rank],
        )
    return experts_TLK


def _frozen(array: np.ndarray) -> np.ndarray:
    """An array of our own, from now on read-only."""
    array.flags.writeable = False
    return array
