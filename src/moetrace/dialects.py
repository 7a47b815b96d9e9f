"""Payloads of other engines, as `RoutingTrace` and back. Axes: T rows, L MoE layers, K experts per token.

Today: LightLLM's `/generate` contract as first proposed, `{"shape": [L, T, K], "dtype": "int32", "data": base64}`,
which this project's own server speaks. Our payload adds keys that make it self-describing (`layout`, `layers`,
`start`, `valid`, ...); a client that knows only the three original ones keeps working.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrace.errors import FormatError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

MISSING_ID = -1
"""What an int32 payload holds in rows that were not captured (they are marked in `valid` too)."""


def to_lightllm(trace: RoutingTrace) -> dict[str, Any]:
    """LightLLM's layer-major int32 payload: `np.frombuffer(b64decode(data), int32).reshape(shape)` is `[L, T, K]`."""
    ids_TLK = trace.experts_TLK.astype("<i4")
    ids_TLK[~trace.valid_T] = MISSING_ID
    ids_LTK = np.ascontiguousarray(ids_TLK.transpose(1, 0, 2))
    return {
        "shape": list(ids_LTK.shape),
        "dtype": "int32",
        "data": _base64(ids_LTK),
        "layout": "LTK",
        "layers": list(trace.layout.layers),
        "num_experts": trace.layout.num_experts,
        "order": trace.order,
        "start": trace.start,
        "num_valid": trace.num_valid,
        "valid": _base64(np.packbits(trace.valid_T)),
        "token_sha256": trace.token_sha256,
        "weight_spans": [{"start": span.start, "version": span.version} for span in trace.weight_spans],
        "fingerprint": trace.fingerprint,
        "engine": trace.engine,
    }


def from_lightllm(
    payload: dict[str, Any], tokens: Sequence[int] | np.ndarray, layout: MoeLayout | None = None
) -> RoutingTrace:
    """Read LightLLM's layer-major int32 payload.

    Args:
        payload: the value of `routed_experts` in a `/generate` response.
        tokens: prompt and output token ids of that response.
        layout: needed for a payload that does not bring `layers` and `num_experts` (LightLLM's own does not).

    Raises:
        FormatError: keys are missing, or shape, dtype and data contradict each other.
        TraceError: the routes contradict the tokens or the layout.
    """
    try:
        shape, dtype, data = payload["shape"], payload["dtype"], payload["data"]
    except (KeyError, TypeError) as error:
        raise FormatError(
            "the payload is not LightLLM's", expected="keys shape, dtype, data", got=repr(error)
        ) from error
    right_shape = isinstance(shape, list | tuple) and len(shape) == 3 and all(type(n) is int and n >= 0 for n in shape)
    if dtype != "int32" or payload.get("layout", "LTK") != "LTK" or not right_shape:
        raise FormatError(
            "the payload is not layer-major int32",
            expected="dtype 'int32', shape [L, T, K]",
            got=f"dtype {dtype!r}, shape {shape}, layout {payload.get('layout', 'LTK')!r}",
        )
    try:
        ids = np.frombuffer(base64.b64decode(data, validate=True), "<i4")
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"the payload's data is not base64 of int32 ({error})") from error
    if ids.size != math.prod(shape):
        raise FormatError("the payload's data does not fill its shape", expected=f"{shape} ids", got=f"{ids.size} ids")
    ids_TLK = ids.reshape(shape).transpose(1, 0, 2)
    try:
        trace = _trace_of(ids_TLK, payload, tokens, layout)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the payload's description is broken ({error!r})") from error
    if payload.get("token_sha256", trace.token_sha256) != trace.token_sha256:
        raise TokenMismatchError(
            "the payload was recorded on other tokens", expected=payload["token_sha256"], got=trace.token_sha256
        )
    return trace


def _trace_of(
    ids_TLK: np.ndarray, payload: dict[str, Any], tokens: Sequence[int] | np.ndarray, layout: MoeLayout | None
) -> RoutingTrace:
    if "layers" in payload and "num_experts" in payload:
        own = MoeLayout(payload["layers"], payload["num_experts"], ids_TLK.shape[2])
        if layout is not None:
            own.require_same(layout, "the model")
        layout = own
    if layout is None:
        raise FormatError(
            "the payload does not say its layers and experts", fix="Pass layout=moetrace.layout_of(model)."
        )
    valid_T = (ids_TLK != MISSING_ID).all(axis=(1, 2))
    if "valid" in payload and (_unpack_valid(payload["valid"], len(valid_T)) != valid_T).any():
        raise FormatError("the payload's validity bitmap contradicts its ids", got=f"{payload['valid']!r}")
    return RoutingTrace.build(
        ids_TLK,
        layout,
        tokens,
        valid_T=valid_T,
        start=payload.get("start", 0),
        weight_spans=[WeightSpan(span["start"], span["version"]) for span in payload.get("weight_spans", [])],
        order=payload.get("order", "rank"),
        fingerprint=payload.get("fingerprint", ""),
        engine=payload.get("engine", "lightllm"),
    )


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _unpack_valid(text: str, num_rows: int) -> np.ndarray:
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != (num_rows + 7) // 8:
        raise FormatError(
            "the payload's validity bitmap has a wrong length", expected=f"{num_rows} bits", got=len(bits)
        )
    return np.unpackbits(bits, count=num_rows).astype(bool)
