"""SGLang's payload: base64 of int32 `[T, D, K]` over all D decoder layers, which says nothing of itself.

`meta_info.routed_experts` of `/generate`, `sgl_ext.routed_experts` of each choice of the OpenAI endpoints; rows are
those of `[routed_experts_start_len, P + O - 1)`. Source: sglang `srt/layers/moe/routed_experts_capturer.py` (zeros
where nothing was written), pull requests 12162 and 17434, `docs/basic_usage/openai_api_completions`. sglang-jax follows
it, with -1 in dense layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moetrace.dialects.checks import (
    MISSING_ID,
    decode_base64,
    encode_base64,
    places_of,
    require_all_captured,
    rows_from,
    with_dense_layers,
)
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import Order, RoutingTrace

_INT32 = np.dtype("<i4")


def to_sglang(trace: RoutingTrace, num_layers: int) -> str:
    """SGLang's payload: `np.frombuffer(b64decode(text), np.int32).reshape(-1, num_layers, K)`; dense layers hold zeros.

    Args:
        trace: what to write, all of its rows: the receiver must know its `start` (SGLang's `routed_experts_start_len`).
        num_layers: D, decoder layers of the model, dense ones too.

    Raises:
        MissingRowError: a row was not captured. The payload has no place to say so.
        FormatError: the model's layers have no place in the payload.
    """
    return encode_base64(sglang_ids(trace, num_layers).tobytes())


def sglang_ids(trace: RoutingTrace, num_layers: int) -> np.ndarray:
    """`to_sglang` for who encodes by themselves: `[T, D, K]`, little-endian int32. Raises what it raises."""
    require_all_captured(trace, "SGLang")
    return with_dense_layers(trace, num_layers, _INT32, "SGLang")


def from_sglang(
    payload: str,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    num_layers: int,
    *,
    start: int = 0,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "sglang",
) -> RoutingTrace:
    """Read SGLang's `routed_experts`. All that it does not say must be known from elsewhere.

    Args:
        payload: base64 of int32 `[T, D, K]`.
        tokens: prompt and output token ids, P + O of them: T must be P + O - 1 - `start`.
        layout: the model's layout, `moetrace.layout_of(model)`.
        num_layers: D, decoder layers of the model, dense ones too.
        start: `routed_experts_start_len` of the request.
        order, fingerprint, engine: what the trace is to say of itself.

    Raises:
        FormatError: it is not base64, or has not exactly that many ids, or a layer that does not route holds an expert.
        TraceError: an id is out of range or twice in a route (rows that SGLang never wrote hold zeros).
    """
    data = decode_base64(payload, "int32")
    layers, num_rows = places_of(layout, num_layers, "SGLang"), rows_from(tokens, start)
    shape = (num_rows, num_layers, layout.top_k)
    if len(data) != _INT32.itemsize * math.prod(shape):
        raise FormatError(
            "the payload has not one row for each token",
            expected=f"{num_rows} rows from position {start} on of {num_layers} layers * {layout.top_k} int32",
            got=f"{len(data)} bytes, {len(data) / (_INT32.itemsize * num_layers * layout.top_k):g} rows",
            fix="Pass all tokens, prompt and output, the request's routed_experts_start_len, and this model's layers.",
        )
    ids_TDK = np.frombuffer(data, _INT32).reshape(shape)
    dense_TDK = np.delete(ids_TDK, layers, axis=1)
    if not np.isin(dense_TDK, (0, MISSING_ID)).all():
        raise FormatError(
            "a layer that does not route names an expert",
            expected=f"zeros in all layers but {layers}",
            fix="Pass the layout of the model that made the payload.",
        )
    return RoutingTrace.build(
        ids_TDK[:, layers], layout, tokens, start=start, order=order, fingerprint=fingerprint, engine=engine
    )
