"""What a trainer takes routes as, in one row of a table; traces are written and read by that row alone.

Axes: n tokens of a sequence, R rows of a payload, D decoder layers, L MoE layers, K experts per token, T rows of a
trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from moetrace.batch import to_numpy
from moetrace.dialects.checks import MISSING_ID, captured_rows, places_of, require_ids
from moetrace.errors import FormatError, MissingRowError
from moetrace.layout import MoeLayout
from moetrace.tokens import as_token_ids, require_token_ids
from moetrace.trace import Order, RoutingTrace, require_trace

Rows = Literal["inputs", "tokens", "either", "prefix"]
Layers = Literal["all", "moe", "either"]
Pad = Literal["distinct", "first", "missing"]
Missing = Literal["error", "live", "dummy"]
Captured = int | Sequence[bool] | np.ndarray


class Facts(TypedDict, total=False):
    """What no payload says of itself, and a trace that is read can be told."""

    order: Order
    fingerprint: str
    engine: str


@dataclass(frozen=True)
class Contract:
    """What one trainer takes.

    Attributes:
        trainer: its name, for people.
        field: where it takes routes from.
        dtypes: of the ids. The first that holds every id of the model is written; one that does not is never read.
        rows: "inputs": one for each token but the last. "tokens": one for each. "either" is read, "tokens" written.
            "prefix": any number up to that of the tokens, from the first token on.
        layers: "all" decoder layers, dense ones too; "moe" layers only; "either", as the caller says.
        pad: what is in rows that stand for no token, or for the last one, which predicts nothing that was sampled:
            "distinct" ids that load all experts alike, the "first" K experts, or "missing", -1.
        marks_missing: -1 in all of a row says that it was not captured.
        unknown: what the trainer does with a token in front of the last one whose route is not there: it routes it
            "live", or by a "dummy" route; None: it cannot be told, and would take whatever stands there for a route.
        zero_dense: layers that do not route hold zeros, or -1, and are checked for it; else what they hold means
            nothing.
        narrowed: the dtype follows the highest id of an array, not the model's number of experts.
    """

    trainer: str
    field: str
    dtypes: tuple[str, ...]
    rows: Rows
    layers: Layers
    pad: Pad = "distinct"
    marks_missing: bool = False
    unknown: Literal["live", "dummy"] | None = None
    zero_dense: bool = False
    narrowed: bool = False

    @property
    def payload(self) -> str:
        """As errors call it."""
        return f"{self.trainer}'s {self.field}"

    def write(
        self,
        trace: RoutingTrace,
        tokens: Any,
        num_layers: int | None = None,
        *,
        missing: Missing = "error",
        first_row: int = 0,
    ) -> np.ndarray:
        """The rows of one sequence: `[R, D, K]` or `[R, L, K]`, C order.

        Args:
            trace: what to write.
            tokens: `[n]`, all token ids of the trainer's sequence. The trace must have been recorded on them.
            num_layers: D, decoder layers of the model, where the contract has all of them.
            missing: what a token in front of the last one does if its row was not captured: "error", or the word that
                says what this trainer does with it (see `unknown`), as permission.
            first_row: number of the first row in a batch, from which "distinct" fillers are counted.

        Raises:
            InvalidTraceError: it is no trace, or the token ids are none.
            TokenMismatchError: the trace was recorded on other tokens.
            MissingRowError: a row was not captured, and that is not permitted, or cannot be said.
            FormatError: the ids or the layers have no place in the payload.
        """
        require_trace(trace)
        tokens_n = require_token_ids(as_token_ids(to_numpy(tokens)))
        trace.require_tokens(tokens_n, f"{self.trainer}'s sequence")
        dtype, (places, width) = self.written_dtype(trace.layout), self.axis(trace.layout, num_layers)
        experts_nLK, captured_n = _rows_of(trace, len(tokens_n))
        num_rows = self._num_rows(captured_n)
        self._require_permitted(captured_n, num_rows, missing)
        ids_RDK = np.zeros((num_rows, width, trace.layout.top_k), dtype)
        ids_RDK[:, places] = experts_nLK[:num_rows]
        lacking_R, fillers_R1K = ~captured_n[:num_rows], self.fillers(num_rows, trace.layout, dtype, first_row)
        ids_RDK[lacking_R] = MISSING_ID if self.marks_missing else fillers_R1K[lacking_R]
        if num_rows == len(tokens_n) and lacking_R[-1:].any():  # of the last token nobody misses a row
            ids_RDK[-1] = fillers_R1K[-1]
        return ids_RDK

    def read(
        self,
        payload: Any,
        tokens: Any,
        layout: MoeLayout,
        num_layers: int | None = None,
        *,
        captured: Captured | None = None,
        **facts: Unpack[Facts],
    ) -> RoutingTrace:
        """One sequence's rows as a trace.

        Args:
            payload: `[R, D, K]` or `[R, L, K]`, an array or a tensor on the CPU.
            tokens: `[n]`, all token ids of the trainer's sequence.
            layout: the model's layout.
            num_layers: D, where the layer axis has all decoder layers.
            captured: which rows are routes: how many from the first on, or a bool for each. Needed where rows that are
                not look like routes; all are, else.
            order, fingerprint, engine: what the trace is to say of itself.

        Raises:
            FormatError: another type, another number of rows, layers or experts per token; a row that is missing in
                part; it is not said which rows are routes.
            TraceError: an id is out of range or twice in a route (rows that nobody wrote hold zeros).
        """
        tokens_n = require_token_ids(as_token_ids(to_numpy(tokens)))
        places, width = self.axis(layout, num_layers)
        num_rows = self._read_rows(payload, len(tokens_n))
        dtypes = [np.dtype(name) for name in self.dtypes if self.narrowed or _holds(name, layout)]
        if not dtypes:
            self.written_dtype(layout)
        ids_RDK = require_ids(payload, dtypes, (num_rows, width, layout.top_k), self.payload)
        ids_RLK = ids_RDK[:, places]
        captured_R = self._captured(captured, num_rows)
        self._require_dense(ids_RDK[captured_R], places)
        if self.marks_missing:
            ids_RLK = np.where(captured_R[:, None, None], ids_RLK, ids_RLK.dtype.type(MISSING_ID))
            captured_R = captured_rows(ids_RLK, layout)
        last_too = num_rows == len(tokens_n) and bool(captured_R[-1:].any())
        num_kept = len(tokens_n) if last_too else max(len(tokens_n) - 1, 0)
        valid_T = _resized(captured_R, num_kept)
        return RoutingTrace.build(_resized(ids_RLK, num_kept), layout, tokens_n, valid_T=valid_T, **facts)

    def written_dtype(self, layout: MoeLayout) -> np.dtype:
        """Raises `FormatError` if there is none that holds every expert id."""
        for name in self.dtypes:
            if _holds(name, layout):
                return np.dtype(name)
        raise FormatError(
            f"expert ids of this model do not fit {self.payload}",
            expected=f"at most {np.iinfo(self.dtypes[-1]).max + 1} experts, for {self.dtypes[-1]}",
            got=f"{layout.num_experts} experts",
        )

    def axis(self, layout: MoeLayout, num_layers: int | None) -> tuple[list[int], int]:
        """Where the MoE layers are on the layer axis, and its length."""
        if num_layers is None:
            if self.layers == "all":
                raise FormatError(
                    f"{self.payload} has all decoder layers",
                    expected="num_layers, of dense layers too",
                    fix="Pass the model's num_hidden_layers.",
                )
            return list(range(layout.num_layers)), layout.num_layers
        if self.layers == "moe":
            raise FormatError(f"{self.payload} has MoE layers only", expected="no num_layers", got=num_layers)
        return places_of(layout, num_layers, self.trainer), num_layers

    def _num_rows(self, captured_n: np.ndarray) -> int:
        if self.rows == "inputs":
            return max(len(captured_n) - 1, 0)
        if self.rows == "prefix":
            return int(np.flatnonzero(captured_n)[-1]) + 1 if captured_n.any() else 0
        return len(captured_n)

    def _read_rows(self, payload: Any, num_tokens: int) -> int:
        """The number of rows that is right; of the payload's own where several are."""
        inputs = max(num_tokens - 1, 0)
        got = len(payload) if len(getattr(payload, "shape", ())) else 0
        allowed = {"inputs": [inputs], "tokens": [num_tokens], "either": [num_tokens, inputs]}
        if self.rows == "prefix":
            return got if got <= num_tokens else num_tokens
        return got if got in allowed[self.rows] else allowed[self.rows][0]

    def _require_permitted(self, captured_n: np.ndarray, num_rows: int, missing: Missing) -> None:
        if missing != "error" and missing != self.unknown:
            words = "'error'" if self.unknown is None else f"'error' or '{self.unknown}'"
            raise FormatError(f"missing is not known to {self.trainer}", expected=words, got=repr(missing))
        lacking = np.flatnonzero(~captured_n[:-1])
        if not len(lacking):
            return
        in_front = self.rows == "prefix" and lacking[0] < num_rows
        if missing != "error" and not in_front:
            return
        what = "cannot say that a row is missing" if self.unknown is None or in_front else "needs every row"
        routes = "by their own router" if self.unknown == "live" else "by dummy routes"
        raise MissingRowError(
            f"{self.payload} {what}",
            expected="a captured row for every token but the last",
            got=f"{len(lacking)} of {len(captured_n)} missing, the first at position {lacking[0]}",
            fix="Leave this sequence out of the batch."
            if self.unknown is None or in_front
            else f"Pass missing='{self.unknown}' to let {self.trainer} route such tokens {routes}.",
        )

    def fillers(self, num_rows: int, layout: MoeLayout, dtype: np.dtype, first_row: int = 0) -> np.ndarray:
        """`[R, 1, K]`: what is written where no route is."""
        if self.pad == "missing":
            return np.full((num_rows, 1, layout.top_k), MISSING_ID, dtype)
        rows = np.arange(first_row, first_row + num_rows) if self.pad == "distinct" else np.zeros(num_rows, np.int64)
        ids = (rows[:, None] * layout.top_k + np.arange(layout.top_k)) % layout.num_experts
        return ids.astype(dtype)[:, None]

    def _require_dense(self, ids_RDK: np.ndarray, places: list[int]) -> None:
        if not self.zero_dense or np.isin(np.delete(ids_RDK, places, axis=1), (0, MISSING_ID)).all():
            return
        raise FormatError(
            f"a layer of {self.payload} that does not route names an expert",
            expected=f"zeros in all layers but {places}",
            fix="Pass the layout of the model that made the routes.",
        )

    def _captured(self, captured: Captured | None, num_rows: int) -> np.ndarray:
        """`[R]` bool: the rows of a payload that are said to be routes."""
        if captured is None:
            if self.rows in ("tokens", "either") and self.pad != "missing":
                raise FormatError(
                    f"{self.payload} does not say which of its rows are routes",
                    expected="captured: how many rows, or a bool for each",
                    fix="An engine returns len(tokens) - 1 rows of what it generated.",
                )
            return np.ones(num_rows, bool)
        if isinstance(captured, int | np.integer) and not isinstance(captured, bool):
            if 0 <= captured <= num_rows:
                return np.arange(num_rows) < captured
        elif np.shape(captured) == (num_rows,) and np.asarray(captured).dtype == bool:
            return np.array(captured)
        raise FormatError(
            f"captured does not fit {self.payload}",
            expected=f"0 to {num_rows} rows, or {num_rows} bools",
            got=captured if np.ndim(captured) == 0 else f"shape {np.shape(captured)} of {np.asarray(captured).dtype}",
        )


def _holds(dtype: str, layout: MoeLayout) -> bool:
    return layout.num_experts - 1 <= np.iinfo(dtype).max


def _rows_of(trace: RoutingTrace, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A trace's rows at the positions of its sequence: `[n, L, K]` and which of them were captured, `[n]`."""
    experts_nLK = np.zeros((num_tokens, trace.layout.num_layers, trace.layout.top_k), trace.layout.dtype)
    captured_n = np.zeros(num_tokens, bool)
    stop = min(trace.stop, num_tokens)
    if stop > trace.start:
        experts_nLK[trace.start : stop] = trace.experts_TLK[: stop - trace.start]
        captured_n[trace.start : stop] = trace.valid_T[: stop - trace.start]
    return experts_nLK, captured_n


def _resized(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """The first rows, and zeros (False) where there are fewer."""
    if len(rows) >= num_rows:
        return rows[:num_rows]
    return np.concatenate([rows, np.zeros((num_rows - len(rows), *rows.shape[1:]), rows.dtype)])
