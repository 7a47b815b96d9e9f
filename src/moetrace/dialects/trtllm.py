"""TensorRT-LLM's payload: int16 `[T, L, K]` over MoE layers, -1 in rows that are missing.

`CompletionOutput.routed_experts`, a tensor on the CPU; all P + O - 1 rows, no offset. Source: TensorRT-LLM pull
request 18397, `tensorrt_llm/_torch/route_capture.py`; request for comments 17778. The engine itself fails on a row that
is missing in the middle; a missing tail makes the array shorter, which is refused here. Of a sequence with one row it
returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetrace.dialects.checks import (
    MISSING_ID,
    captured_rows,
    require_from_first,
    require_id_type,
    require_ids,
    rows_from,
)
from moetrace.layout import MoeLayout
from moetrace.trace import Order, RoutingTrace


def to_trtllm(trace: RoutingTrace) -> np.ndarray:
    """What `CompletionOutput.routed_experts` would hold, as a numpy array (`torch.from_numpy` makes a tensor of it).

    Raises:
        FormatError: the expert ids do not fit int16, or the trace does not begin at the first token.
    """
    require_id_type(trace.layout, "int16")
    require_from_first(trace, "TensorRT-LLM")
    return np.where(trace.valid_T[:, None, None], trace.experts_TLK.astype(np.int16), np.int16(MISSING_ID))


def from_trtllm(
    payload: object,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    *,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "tensorrt_llm",
) -> RoutingTrace:
    """Read `CompletionOutput.routed_experts`. Rows of -1 are not valid in the trace.

    Args:
        payload: int16 `[T, L, K]`, a tensor on the CPU or an array.
        tokens: prompt and output token ids, P + O of them: T must be P + O - 1.
        layout: the model's layout, `moetrace.layout_of(model)`.
        order, fingerprint, engine: what the trace is to say of itself.

    Raises:
        FormatError: another type, another number of rows, layers or experts per token, or -1 in a part of a row.
        TraceError: an id is out of range or twice in a route.
    """
    require_id_type(layout, "int16")
    shape = (rows_from(tokens, 0), layout.num_layers, layout.top_k)
    ids_TLK = require_ids(payload, [np.dtype(np.int16)], shape, "TensorRT-LLM's routed_experts")
    return RoutingTrace.build(
        ids_TLK,
        layout,
        tokens,
        valid_T=captured_rows(ids_TLK, layout),
        order=order,
        fingerprint=fingerprint,
        engine=engine,
    )
