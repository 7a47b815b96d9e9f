"""From traces to the flat token order of a training batch. Runs on the CPU, before the step.

Axes: N = B * S tokens of the batch in memory order, L MoE layers, K experts per token, T rows of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from moetrace.batch import Segment, TokenBatch, batch_of
from moetrace.errors import LayoutMismatchError, MissingRowError, ReplayError
from moetrace.layout import MoeLayout
from moetrace.replayer.policy import REPLAY_ALL, ReplayPolicy
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.trace import RoutingTrace, as_traces

Missing = Literal["error", "live"]


def align(
    traces: RoutingTrace | Sequence[RoutingTrace],
    input_ids: Any,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    cu_seqlens: Any = None,
    missing: Missing | Any = "error",
    policy: ReplayPolicy | None = None,
    response_mask: Any = None,
) -> AlignedRoutes:
    """Put the rows of traces where a batch has their tokens.

    Args:
        traces: one for each sequence of the batch, in memory order.
        input_ids: `[B, S]` token ids, exactly those the model will be called with, or a jagged batch; see
            `moetrace.batch.batch_of`.
        attention_mask, position_ids, cu_seqlens: how sequences lie in the batch, see `moetrace.batch.segments_of`.
        missing: what a token without a row does: "error" (the default), "live" (the live router decides), or a bool
            array `[B, S]`, True where live routing is allowed. The last token of a sequence is always allowed: it
            predicts nothing that was sampled, and an engine never had it as input.
        policy: which rows are replayed; all of them by default. Rows that it leaves out may be missing.
        response_mask: as `input_ids`, 1 for each sampled token: for the policies "response" and "prompt".

    Raises:
        InvalidTraceError: something else than traces is given.
        TokenMismatchError: a trace was recorded on other tokens than its sequence.
        LayoutMismatchError: the traces come from different models.
        MissingRowError: a token has no row and may not be routed live.
        ReplayError: batch arguments contradict each other, or the number of traces is wrong; or that is no policy.
    """
    traces = as_traces(traces)
    policy = REPLAY_ALL if policy is None else policy
    if not isinstance(policy, ReplayPolicy):
        raise ReplayError(
            "this is no policy", expected="a ReplayPolicy", got=repr(policy), fix="Write ReplayPolicy('response')."
        )
    batch = batch_of(input_ids, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens)
    if len(traces) != len(batch.segments):
        raise ReplayError(
            "each sequence of the batch needs one trace",
            expected=f"{len(batch.segments)} traces",
            got=len(traces),
            fix="Without cu_seqlens, or position_ids that restart, each row of input_ids is one sequence.",
        )
    layout, fingerprint = _common_model(traces)
    wanted_N = policy.wanted(batch, response_mask)
    live_allowed_N = _live_allowed(missing, batch) | ~wanted_N
    tokens_N = batch.tokens_N
    experts_NLK = np.zeros((tokens_N.size, layout.num_layers, layout.top_k), layout.dtype)
    mode_N = np.full(tokens_N.size, TokenMode.PADDING, np.uint8)
    sequence_N, position_N = (np.full(tokens_N.size, -1, np.int32) for _ in range(2))
    for number, (segment, trace) in enumerate(zip(batch.segments, traces, strict=True)):
        trace.require_tokens(tokens_N[segment.start : segment.stop], f"sequence {number} of the batch")
        replayed_T = np.zeros(len(segment), bool)
        stop = min(trace.stop, len(segment))
        if stop > trace.start:
            replayed_T[trace.start : stop] = trace.valid_T[: stop - trace.start]
            experts_NLK[segment.start + trace.start : segment.start + stop] = trace.experts_TLK[: stop - trace.start]
        _require_rows(number, segment, replayed_T, live_allowed_N)
        replayed_T &= wanted_N[segment.start : segment.stop]
        experts_NLK[segment.start : segment.stop][~replayed_T] = 0
        mode_N[segment.start : segment.stop] = np.where(replayed_T, TokenMode.REPLAY, TokenMode.LIVE)
        sequence_N[segment.start : segment.stop] = number
        position_N[segment.start : segment.stop] = np.arange(len(segment))
    return AlignedRoutes(
        experts_LNK=_layer_major(experts_NLK),
        mode_N=mode_N,
        sequence_N=sequence_N,
        position_N=position_N,
        layout=layout,
        fingerprint=fingerprint,
        order="rank" if all(trace.order == "rank" for trace in traces) else "set",
        shape=batch.shape,
        margin=policy.margin,
        tokens_N=tokens_N.astype(np.int64),  # a copy: the caller's may change
    )


def _layer_major(experts_NLK: np.ndarray) -> np.ndarray:
    """`[L, N, K]`, C order. A route is moved as one item, not id by id: six times as fast."""
    num_tokens, num_layers, top_k = experts_NLK.shape
    route_NL = experts_NLK.view(f"V{top_k * experts_NLK.itemsize}")[..., 0]
    return np.ascontiguousarray(route_NL.T).view(experts_NLK.dtype).reshape(num_layers, num_tokens, top_k)


def _common_model(traces: Sequence[RoutingTrace]) -> tuple[MoeLayout, str]:
    for trace in traces[1:]:
        trace.layout.require_same(traces[0].layout, "the batch's first trace")
    fingerprints = sorted({trace.fingerprint for trace in traces} - {""})
    if len(fingerprints) > 1:
        raise LayoutMismatchError("the traces come from different models", expected="one fingerprint", got=fingerprints)
    return traces[0].layout, "".join(fingerprints)


def _live_allowed(missing: Missing | Any, batch: TokenBatch) -> np.ndarray:
    if not isinstance(missing, str):
        return batch.flags(missing, "missing")
    if missing not in ("error", "live"):
        raise ReplayError("missing is unknown", expected="'error', 'live' or a bool array [B, S]", got=repr(missing))
    return np.full(len(batch.tokens_N), missing == "live")


def _require_rows(number: int, segment: Segment, replayed_T: np.ndarray, live_allowed_N: np.ndarray) -> None:
    lacking_T = ~replayed_T & ~live_allowed_N[segment.start : segment.stop]
    lacking_T[-1] = False
    if lacking_T.any():
        raise MissingRowError(
            f"sequence {number} lacks {int(lacking_T.sum())} of {len(segment)} rows, "
            f"the first at position {int(np.flatnonzero(lacking_T)[0])}",
            expected="a captured row for every token but the last",
            fix="If these are padding, pass the attention_mask. If not, missing='live', or a bool array [B, S], lets"
            " the live router decide there.",
        )
