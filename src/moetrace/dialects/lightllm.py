"""LightLLM's payload: `{"shape", "dtype", "data"}`, which this project's own server speaks with more keys.

`routed_experts` of `/generate`. As first proposed (ModelTC/LightLLM pull request 1190, `docs/r3_routing_capture.md`):
layer-major int32 `[L, T, K]`. As it became (1298, `lightllm/common/basemodel/moe_route_info_manager.py` and
`server/core/objs/token_metadata.py`): token-major `[T, L, K]`, uint8 up to 256 experts, else int16. MoE layers only,
all P + O - 1 rows, no offset and no place to say that a row is missing; of `n` > 1 samples, one's routes only.

Our payload adds keys that make it self-describing (`layout`, `layers`, `start`, `valid`, ...); a client that knows only
the three original ones keeps working.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from moetrace.dialects.checks import (
    MISSING_ID,
    IdType,
    captured_rows,
    decode_base64,
    encode_base64,
    require_id_type,
    rows_from,
)
from moetrace.dialects.lazy import LazyIds
from moetrace.errors import FormatError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

AxisOrder = Literal["LTK", "TLK"]


def to_lightllm(trace: RoutingTrace, *, layout: AxisOrder = "LTK", dtype: IdType = "int32") -> dict[str, Any]:
    """LightLLM's payload: `np.frombuffer(b64decode(data), dtype).reshape(shape)` is `[L, T, K]`, or `[T, L, K]`.

    Args:
        trace: what to write; `start` and rows are its own.
        layout: order of the axes: "LTK" as in the documented contract, "TLK" as in later LightLLM.
        dtype: type of the ids, little-endian.

    Raises:
        FormatError: the model's expert ids do not fit `dtype`.
    """
    facts, ids = lightllm_parts(trace, layout=layout, dtype=dtype)
    return facts | {"data": encode_base64(ids.read(0, ids.nbytes).tobytes())}


def lightllm_parts(
    trace: RoutingTrace, *, layout: AxisOrder = "LTK", dtype: IdType = "int32"
) -> tuple[dict[str, Any], LazyIds]:
    """`to_lightllm` for who encodes by themselves: the payload with None as `data`, and the ids.

    Raises:
        FormatError: the model's expert ids do not fit `dtype`.
    """
    require_id_type(trace.layout, dtype)
    ids = LazyIds(trace, layer_major=layout == "LTK", dtype=dtype, missing=_missing(dtype))
    facts = {"shape": list(ids.shape), "dtype": dtype, "data": None, "layout": layout}
    return facts | describe(trace), ids


def describe(trace: RoutingTrace) -> dict[str, Any]:
    """What a payload says of a trace beside its ids and their form."""
    return {
        "layers": list(trace.layout.layers),
        "num_experts": trace.layout.num_experts,
        "order": trace.order,
        "start": trace.start,
        "num_valid": trace.num_valid,
        "valid": encode_base64(np.packbits(trace.valid_T).tobytes()),
        "token_sha256": trace.token_sha256,
        "weight_spans": [{"start": span.start, "version": span.version} for span in trace.weight_spans],
        "fingerprint": trace.fingerprint,
        "engine": trace.engine,
    }


def from_lightllm(
    payload: dict[str, Any], tokens: Sequence[int] | np.ndarray, layout: MoeLayout | None = None
) -> RoutingTrace:
    """Read LightLLM's payload, of either axis order and any of its types.

    A payload that does not say its `layout` is LightLLM's own: int32 is layer-major, narrower types are token-major.

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
    axes = payload.get("layout", "LTK" if dtype == "int32" else "TLK")
    right_shape = isinstance(shape, list | tuple) and len(shape) == 3 and all(type(n) is int and n >= 0 for n in shape)
    if dtype not in get_args(IdType) or axes not in get_args(AxisOrder) or not right_shape:
        raise FormatError(
            "the payload has another form than LightLLM's",
            expected=f"dtype {' or '.join(get_args(IdType))}, layout LTK or TLK, a shape of these three axes",
            got=f"dtype {dtype!r}, shape {shape}, layout {axes!r}",
        )
    raw, stored = decode_base64(data, dtype), np.dtype(dtype).newbyteorder("<")
    if len(raw) % stored.itemsize:
        raise FormatError(f"the payload is not base64 of {dtype}", got=f"{len(raw)} bytes")
    ids = np.frombuffer(raw, stored)
    if ids.size != math.prod(shape):
        raise FormatError("the payload's data does not fill its shape", expected=f"{shape} ids", got=f"{ids.size} ids")
    ids_TLK = ids.reshape(shape).transpose(1, 0, 2) if axes == "LTK" else ids.reshape(shape)
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
    told = {name: payload[name] for name in ("layers", "num_experts") if name in payload}
    known: dict[str, Any] = {} if layout is None else {"layers": layout.layers, "num_experts": layout.num_experts}
    if told and len(known | told) == 2:
        own = MoeLayout(**(known | told), top_k=ids_TLK.shape[2])
        if layout is not None:
            own.require_same(layout, "the model")
        layout = own
    if layout is None:
        raise FormatError(
            "the payload does not say its layers and experts", fix="Pass layout=moetrace.layout_of(model)."
        )
    require_id_type(layout, payload["dtype"])
    start = payload.get("start", 0)
    if "token_sha256" not in payload and len(ids_TLK) != rows_from(tokens, start):
        raise FormatError(
            "the payload has not one row for each token",
            expected=f"{rows_from(tokens, start)} rows",
            got=f"{len(ids_TLK)} rows",
            fix="Pass all tokens, prompt and output: P + O of them have P + O - 1 rows.",
        )
    valid_T = _valid_rows(ids_TLK, payload, layout)
    return RoutingTrace.build(
        ids_TLK,
        layout,
        tokens,
        valid_T=valid_T,
        start=start,
        weight_spans=[WeightSpan(span["start"], span["version"]) for span in payload.get("weight_spans", [])],
        order=payload.get("order", "rank"),
        fingerprint=payload.get("fingerprint", ""),
        engine=payload.get("engine", "lightllm"),
    )


def _missing(dtype: str) -> int:
    """What a row that was not captured holds: -1, in unsigned types all bits. There an expert may have this id."""
    return MISSING_ID if np.dtype(dtype).kind == "i" else int(np.iinfo(dtype).max)


def _valid_rows(ids_TLK: np.ndarray, payload: dict[str, Any], layout: MoeLayout) -> np.ndarray:
    """`[T]` bool: the rows that were captured, on which ids and bitmap must agree."""
    missing = _missing(payload["dtype"])
    told_T = _unpack_valid(payload["valid"], len(ids_TLK)) if "valid" in payload else None
    if missing == MISSING_ID:
        valid_T = captured_rows(ids_TLK, layout)
    elif told_T is None:  # LightLLM's own, which has every row
        return np.ones(len(ids_TLK), bool)
    else:
        valid_T = (ids_TLK != missing).any(axis=(1, 2))
        if missing < layout.num_experts:  # an expert has this id: the bitmap decides
            valid_T |= told_T
    if told_T is not None and (told_T != valid_T).any():
        raise FormatError("the payload's validity bitmap contradicts its ids", got=f"{payload['valid']!r}")
    return valid_T


def _unpack_valid(text: str, num_rows: int) -> np.ndarray:
    bits = np.frombuffer(decode_base64(text, "a bitmap"), np.uint8)
    if len(bits) != (num_rows + 7) // 8:
        raise FormatError(
            "the payload's validity bitmap has a wrong length", expected=f"{num_rows} bits", got=len(bits)
        )
    return np.unpackbits(bits, count=num_rows).astype(bool)
