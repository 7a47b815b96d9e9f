"""Payloads of other engines, as `RoutingTrace` and back. Axes: T rows, L MoE layers, K experts per token.

Today: LightLLM's `/generate` contract, which this project's own server speaks: as first proposed, layer-major
`{"shape": [L, T, K], "dtype": "int32", "data": base64}`, and as it became later, token-major in narrow integers. Our
payload adds keys that make it self-describing (`layout`, `layers`, `start`, `valid`, ...); a client that knows only the
three original ones keeps working. And SGLang's: base64 of int32 `[T, D, K]` over all D decoder layers, which says
nothing of itself.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from moetrace.errors import FormatError, MissingRowError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

AxisOrder = Literal["LTK", "TLK"]
IdType = Literal["int32", "int16", "uint16", "uint8"]

MISSING_ID = -1
"""What a payload holds in rows that were not captured, in unsigned types with all bits set (65535, 255): an id that
stands K times in a row is no row. `valid` is what counts; unsigned types cannot do without it."""


def require_id_type(layout: MoeLayout, dtype: IdType) -> None:
    """Raise `FormatError` unless every expert id of `layout` fits `dtype`."""
    if layout.num_experts - 1 > np.iinfo(dtype).max:
        raise FormatError(
            f"expert ids of this model do not fit {dtype}",
            expected=f"a type that holds {layout.num_experts - 1}",
            got=dtype,
            fix="Ask for int32, which holds the ids of every model.",
        )


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
    return facts | {"data": _base64(ids)}


def lightllm_parts(
    trace: RoutingTrace, *, layout: AxisOrder = "LTK", dtype: IdType = "int32"
) -> tuple[dict[str, Any], np.ndarray]:
    """`to_lightllm` for who encodes by themselves: the payload with None as `data`, and the ids, in C order.

    Raises:
        FormatError: the model's expert ids do not fit `dtype`.
    """
    require_id_type(trace.layout, dtype)
    ids = trace.experts_TLK.transpose(1, 0, 2) if layout == "LTK" else trace.experts_TLK
    missing_T = ~trace.valid_T
    ids = ids.astype(np.dtype(dtype).newbyteorder("<"), order="C", copy=bool(missing_T.any()))
    if missing_T.any():
        ids[(slice(None), missing_T) if layout == "LTK" else missing_T] = _missing(dtype)
    facts = {
        "shape": list(ids.shape),
        "dtype": dtype,
        "data": None,
        "layout": layout,
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
    return facts, ids


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
    try:
        ids = np.frombuffer(base64.b64decode(data, validate=True), np.dtype(dtype).newbyteorder("<"))
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"the payload's data is not base64 of {dtype} ({error})") from error
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


def to_sglang(trace: RoutingTrace, num_layers: int) -> str:
    """SGLang's payload: `np.frombuffer(b64decode(text), np.int32).reshape(-1, num_layers, K)`; dense layers hold zeros.

    Args:
        trace: what to write, all of its rows: the receiver must know its `start` (SGLang's `routed_experts_start_len`).
        num_layers: D, decoder layers of the model, dense ones too.

    Raises:
        MissingRowError: a row was not captured. The payload has no place to say so.
        FormatError: the model's layers have no place in the payload.
    """
    missing = np.flatnonzero(~trace.valid_T)
    if len(missing):
        raise MissingRowError(
            "SGLang's payload cannot say which rows are missing",
            expected="every row captured",
            got=f"{len(missing)} of {trace.num_rows} missing, the first at position {trace.start + missing[0]}",
            fix="Use /generate, whose payload has a validity bitmap.",
        )
    layers = _own_layers(trace.layout, num_layers)
    ids_TDK = np.zeros((trace.num_rows, num_layers, trace.layout.top_k), "<i4")
    ids_TDK[:, layers] = trace.experts_TLK
    return _base64(ids_TDK)


def from_sglang(
    payload: str,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    num_layers: int,
    *,
    start: int = 0,
    order: Literal["rank", "set"] = "rank",
    fingerprint: str = "",
    engine: str = "sglang",
) -> RoutingTrace:
    """Read SGLang's `meta_info.routed_experts`. All that it does not say must be known from elsewhere.

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
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"the payload is not base64 ({error})", expected="meta_info.routed_experts") from error
    layers, num_rows = _own_layers(layout, num_layers), max(len(tokens) - 1 - start, 0)
    shape = (num_rows, num_layers, layout.top_k)
    if start < 0 or len(data) != 4 * math.prod(shape):
        raise FormatError(
            "the payload has not one row for each token",
            expected=f"{num_rows} rows from position {start} on of {num_layers} layers * {layout.top_k} int32",
            got=f"{len(data)} bytes, {len(data) / (4 * num_layers * layout.top_k):g} rows",
            fix="Pass all tokens, prompt and output, the request's routed_experts_start_len, and this model's layers.",
        )
    ids_TDK = np.frombuffer(data, "<i4").reshape(shape)
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


def _own_layers(layout: MoeLayout, num_layers: int) -> list[int]:
    """Where the layers of `layout` are among all `num_layers` decoder layers."""
    layers = list(layout.layers)
    if len(set(layers)) != len(layers) or layers[-1] >= num_layers:
        raise FormatError(
            "the model's MoE layers have no place in SGLang's payload",
            expected=f"different decoder layers below {num_layers}",
            got=layers,
            fix="Use /generate, whose payload names its layers.",
        )
    return layers


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
    valid_T = _valid_rows(ids_TLK, payload, layout.num_experts)
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


def _missing(dtype: str) -> int:
    return MISSING_ID if np.dtype(dtype).kind == "i" else int(np.iinfo(dtype).max)


def _valid_rows(ids_TLK: np.ndarray, payload: dict[str, Any], num_experts: int) -> np.ndarray:
    """`[T]` bool: the rows that were captured, on which ids and bitmap must agree."""
    missing = _missing(payload["dtype"])
    told_T = _unpack_valid(payload["valid"], len(ids_TLK)) if "valid" in payload else None
    if 0 <= missing < num_experts:  # an expert has this id: the bitmap decides
        told_T = np.ones(len(ids_TLK), bool) if told_T is None else told_T
        valid_T = told_T | (ids_TLK != missing).any(axis=(1, 2))
    else:
        valid_T = (ids_TLK != missing).all(axis=(1, 2))
    if told_T is not None and (told_T != valid_T).any():
        raise FormatError("the payload's validity bitmap contradicts its ids", got=f"{payload['valid']!r}")
    return valid_T


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _unpack_valid(text: str, num_rows: int) -> np.ndarray:
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != (num_rows + 7) // 8:
        raise FormatError(
            "the payload's validity bitmap has a wrong length", expected=f"{num_rows} bits", got=len(bits)
        )
    return np.unpackbits(bits, count=num_rows).astype(bool)
