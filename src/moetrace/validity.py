"""What a `RoutingTrace` must be at its birth. Axes as in trace.py."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from moetrace.errors import InvalidTraceError
from moetrace.sorting import first_repeat
from moetrace.tokens import require_token_ids, sha256_of_ids

if TYPE_CHECKING:
    from moetrace.trace import RoutingTrace

_CHECKED_IDS = 1 << 17
"""Ids that are checked at once, so that checking a trace takes little memory beside it."""
_PARALLEL_FROM = 16 * _CHECKED_IDS
"""From this many ids on, several threads check: numpy lets them, and whoever waits for a long sequence waits less."""
_MAX_THREADS = 4


def require_valid(trace: RoutingTrace, rows_checked: bool) -> None:
    """Raise `InvalidTraceError` unless shapes, ranges, tokens and spans fit together.

    Args:
        rows_checked: the rows' ids are in range and distinct, and zero where they are not valid: somebody has looked.
    """
    _require_shapes(trace)
    if not rows_checked:
        _require_ids(trace)
    _require_tokens(trace)
    _require_spans(trace)
    if trace.order not in ("rank", "set"):
        raise InvalidTraceError("order is unknown", expected="'rank' or 'set'", got=repr(trace.order))


def _require_shapes(trace: RoutingTrace) -> None:
    experts_TLK, valid_T, layout = trace.experts_TLK, trace.valid_T, trace.layout
    if valid_T.dtype != np.bool_ or valid_T.ndim != 1:
        raise InvalidTraceError("valid_T must be [T] bool", got=f"shape {valid_T.shape}, dtype {valid_T.dtype}")
    shape = (len(valid_T), layout.num_layers, layout.top_k)
    if experts_TLK.shape != shape or experts_TLK.dtype != layout.dtype:
        raise InvalidTraceError(
            "experts_TLK does not fit its layout and valid_T",
            expected=f"shape {shape}, dtype {layout.dtype}",
            got=f"shape {experts_TLK.shape}, dtype {experts_TLK.dtype}",
            fix="Axes are [T, L, K], token-major; use RoutingTrace.build to narrow other integer dtypes.",
        )


def _require_ids(trace: RoutingTrace) -> None:
    experts_TLK, valid_T, layout = trace.experts_TLK, trace.valid_T, trace.layout
    if experts_TLK.size and int(experts_TLK.max()) >= layout.num_experts:
        raise InvalidTraceError(
            "an expert id is out of range", expected=f"id < {layout.num_experts}", got=int(experts_TLK.max())
        )
    step = max(1, _CHECKED_IDS // (layout.num_layers * layout.top_k))
    firsts = range(0, len(valid_T), step)
    if experts_TLK.size < _PARALLEL_FROM:
        for first in firsts:
            _require_rows(trace, first, first + step)
        return
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(lambda first: _require_rows(trace, first, first + step), firsts):
            pass  # in order: the first row that is wrong is the one that is named


def _require_rows(trace: RoutingTrace, first: int, stop: int) -> None:
    experts_TLK, valid_T, layout = trace.experts_TLK[first:stop], trace.valid_T[first:stop], trace.layout
    if not valid_T.all():
        if experts_TLK[~valid_T].any():
            raise InvalidTraceError("rows that are not valid must hold zeros", expected="0", got="other ids")
        experts_TLK = experts_TLK[valid_T]
    repeat = first_repeat(experts_TLK.reshape(-1, layout.top_k))
    if repeat is not None:
        valid_row, layer = divmod(repeat, layout.num_layers)
        row = first + np.flatnonzero(valid_T)[valid_row]
        raise InvalidTraceError(
            f"row {row}, layer {layout.layers[layer]} names one expert twice",
            expected=f"{layout.top_k} distinct ids",
            got=experts_TLK[valid_row, layer].tolist(),
            fix="A row that was not captured must be marked in valid_T, not filled.",
        )


def _require_tokens(trace: RoutingTrace) -> None:
    if trace.tokens is not None and require_token_ids(trace.tokens).dtype != np.int64:
        raise InvalidTraceError(
            "tokens must be [num_tokens] int64", got=f"dtype {trace.tokens.dtype}", fix="Use RoutingTrace.build."
        )
    if trace.tokens is not None and len(trace.tokens) != trace.num_tokens:
        raise InvalidTraceError(
            "num_tokens is not the number of tokens", expected=len(trace.tokens), got=trace.num_tokens
        )
    if trace.tokens is not None and sha256_of_ids(trace.tokens) != trace.token_sha256:
        raise InvalidTraceError("token_sha256 is not the hash of the tokens", got=trace.token_sha256)
    if trace.start < 0 or trace.stop > trace.num_tokens:
        raise InvalidTraceError(
            "a trace has more rows than tokens",
            expected=f"start + T <= {trace.num_tokens} tokens, start >= 0",
            got=f"start {trace.start} + T {trace.num_rows}",
            fix="P prompt and O generated tokens give P + O - 1 rows.",
        )


def _require_spans(trace: RoutingTrace) -> None:
    starts = [span.start for span in trace.weight_spans]
    if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= max(trace.num_rows, 1)):
        raise InvalidTraceError(
            "weight_spans must begin at row 0 and ascend", expected=f"0 < ... < {trace.num_rows}", got=starts
        )
