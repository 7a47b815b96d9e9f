"""vLLM's payload: uint8 (E <= 256) or uint16 `[T, D, K]` over all D decoder layers; as `.npy` in base64 over HTTP.

`CompletionOutput.routed_experts` in process, `choices[].routed_experts` of `/v1/completions`,
`/v1/chat/completions` and `/inference/v1/generate`. `SamplingParams.routed_experts_prompt_start` skips the first rows;
it must be below P. Source: vllm `model_executor/layers/fused_moe/routed_experts_capturer.py` (type, shape),
`v1/core/sched/scheduler.py` (which rows), `entrypoints/openai/completion/serving.py` (`.npy`) of 0.26; pull requests
28284 and 38939. What vLLM returned in process before 0.22 is int32, and refused here.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Sequence

import numpy as np

from moetrace.dialects.checks import (
    decode_base64,
    encode_base64,
    places_of,
    require_all_captured,
    require_ids,
    require_shape,
    rows_from,
    with_dense_layers,
)
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import Order, RoutingTrace

_MAX_HEADER = 256
"""Bytes of a `.npy` header. numpy writes 118 for three axes: nobody needs more, and it is parsed as Python."""


def to_vllm(trace: RoutingTrace, num_layers: int) -> np.ndarray:
    """What `CompletionOutput.routed_experts` would hold: `[T, D, K]`, zeros in dense layers.

    Args:
        trace: what to write, all of its rows: the receiver must know its `start` (`routed_experts_prompt_start`).
        num_layers: D, decoder layers of the model, dense ones too.

    Raises:
        MissingRowError: a row was not captured. The payload has no place to say so.
        FormatError: the model's layers have no place in the payload.
    """
    require_all_captured(trace, "vLLM")
    return with_dense_layers(trace, num_layers, trace.layout.dtype, "vLLM")


def to_vllm_http(trace: RoutingTrace, num_layers: int) -> str:
    """What `choices[].routed_experts` would hold: base64 of the `.npy` of `to_vllm`, little-endian."""
    ids_TDK = to_vllm(trace, num_layers)
    file = io.BytesIO()
    np.lib.format.write_array(file, ids_TDK.astype(ids_TDK.dtype.newbyteorder("<")), version=(1, 0), allow_pickle=False)
    return encode_base64(file.getvalue())


def from_vllm(
    payload: np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    num_layers: int,
    *,
    start: int = 0,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "vllm",
) -> RoutingTrace:
    """Read `CompletionOutput.routed_experts`. What dense layers hold means nothing and is dropped.

    Args:
        payload: uint8 or uint16 `[T, D, K]`.
        tokens: prompt and output token ids, P + O of them: T must be P + O - 1 - `start`.
        layout: the model's layout, `moetrace.layout_of(model)`.
        num_layers: D, decoder layers of the model, dense ones too.
        start: `routed_experts_prompt_start` of the request.
        order: "set" for models whose routing vLLM does not sort (group-limited ones).
        fingerprint, engine: what the trace is to say of itself.

    Raises:
        FormatError: another type than E asks for, another number of rows, layers or experts per token.
        TraceError: an id is out of range or twice in a route (rows that vLLM never wrote hold zeros).
    """
    layers = places_of(layout, num_layers, "vLLM")
    shape = (rows_from(tokens, start), num_layers, layout.top_k)
    ids_TDK = require_ids(payload, [layout.dtype], shape, "vLLM's routed_experts")
    return RoutingTrace.build(
        ids_TDK[:, layers], layout, tokens, start=start, order=order, fingerprint=fingerprint, engine=engine
    )


def from_vllm_http(
    payload: str,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    num_layers: int,
    *,
    start: int = 0,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "vllm",
) -> RoutingTrace:
    """Read `choices[].routed_experts`: base64 of `.npy`. Arguments, and what is refused, as in `from_vllm`.

    The file must be what numpy writes for such an array: version 1.0, C order, little-endian, nothing after it. No
    memory is taken for what a header only declares, and nothing is unpickled.
    """
    shape = (rows_from(tokens, start), num_layers, layout.top_k)
    ids_TDK = _parse_npy(decode_base64(payload, ".npy"), layout.dtype, shape)
    return from_vllm(
        ids_TDK, tokens, layout, num_layers, start=start, order=order, fingerprint=fingerprint, engine=engine
    )


def _parse_npy(data: bytes, dtype: np.dtype, shape: tuple[int, int, int]) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}, not (1, 0)")
        length = int.from_bytes(data[8:10], "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = np.lib.format.read_array_header_1_0(file)
    except _BROKEN_HEADER as error:
        raise FormatError(f"the payload is not a .npy of expert ids ({error})") from error
    got_shape, fortran_order, got_dtype = header
    stored = dtype.newbyteorder("<")
    if got_dtype != stored or fortran_order:
        raise FormatError(
            "the .npy has another form than vLLM's",
            expected=f"{stored.str} in C order",
            got=f"{got_dtype.str} in {'Fortran' if fortran_order else 'C'} order",
            fix="uint8 up to 256 experts, uint16 above: pass the layout of this model.",
        )
    require_shape(got_shape, shape, "the .npy")
    ids = data[file.tell() :]
    if len(ids) != got_dtype.itemsize * math.prod(shape):
        raise FormatError("the .npy does not hold what it declares", expected=f"{list(shape)} ids", got=f"{len(ids)} B")
    return np.frombuffer(ids, stored).reshape(shape).astype(dtype, copy=False)


_BROKEN_HEADER = (ValueError, TypeError, SyntaxError, KeyError, EOFError, RecursionError, tokenize.TokenError)
"""What numpy raises where a header is not the literal that it should be."""
