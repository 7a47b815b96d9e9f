"""Payloads read for diagnosis: whatever ids are in them, right or wrong. `moetrace.dialects` reads the strict way.

Axes: T rows, L layers as the payload has them, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Rows
from moetrace.dialects import from_lightllm, from_sglang, from_vllm, from_vllm_http
from moetrace.errors import CheckError, MoetraceError


def rows_of_lightllm(payload: Any, tokens: Sequence[int], form: DyeForm) -> Rows:
    """LightLLM's `{"shape", "dtype", "data"}`, with moetrace's further keys or without."""
    try:
        dtype, shape = np.dtype(payload["dtype"]).newbyteorder("<"), payload["shape"]
        axes = payload.get("layout", "LTK" if payload["dtype"] == "int32" else "TLK")
        ids = np.frombuffer(base64.b64decode(payload["data"], validate=True), dtype).reshape(shape).astype(np.int64)
        ids_TLK = ids.transpose(1, 0, 2) if axes == "LTK" else ids
        valid_T = ~(ids_TLK == -1).all(axis=(1, 2))
        if "valid" in payload:
            bits = np.frombuffer(base64.b64decode(payload["valid"], validate=True), np.uint8)
            valid_T = np.unpackbits(bits, count=len(ids_TLK)).astype(bool)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise CheckError("routed_experts cannot be read", expected="LightLLM's payload", got=repr(error)) from error
    told = payload.get("order"), payload.get("start")
    order, start = (told[0] if told[0] in ("rank", "set") else None), (told[1] if type(told[1]) is int else None)
    refusal = _refusal(lambda: from_lightllm(payload, tokens, form.layout))
    return Rows(ids_TLK, valid_T, order=order, start=start, refusal=refusal)


def rows_of_sglang(payload: Any, tokens: Sequence[int], form: DyeForm, start: int) -> Rows:
    """SGLang's base64 of flat int32: over all decoder layers, or, where only that fits, over the MoE layers."""
    try:
        ids = np.frombuffer(base64.b64decode(payload, validate=True), "<i4").astype(np.int64)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CheckError("meta_info.routed_experts cannot be read", got=repr(error)) from error
    rows = max(len(tokens) - 1 - start, 0)
    layers = len(form.layers) if ids.size == rows * len(form.layers) * form.top_k else form.num_layers
    if ids.size % (layers * form.top_k):
        raise CheckError(
            "meta_info.routed_experts is no whole number of rows",
            expected=f"a multiple of {layers} layers * {form.top_k} ids",
            got=f"{ids.size} ids",
        )
    ids_TLK = ids.reshape(-1, layers, form.top_k)
    valid_T = ~(ids_TLK == -1).all(axis=(1, 2))
    refusal = _refusal(
        lambda: from_sglang(payload, tokens, form.layout, form.num_layers, start=start, order=form.order)
    )
    return Rows(ids_TLK, valid_T, all_layers=True, refusal=refusal)


def rows_of_vllm(payload: Any, tokens: Sequence[int], form: DyeForm, start: int) -> Rows:
    """vLLM's base64 of a `.npy` over all decoder layers."""
    try:
        array = np.load(io.BytesIO(base64.b64decode(payload, validate=True)), allow_pickle=False)
    except (TypeError, ValueError, EOFError, binascii.Error) as error:
        raise CheckError("routed_experts cannot be read", expected="base64 of a .npy file", got=repr(error)) from error
    read = partial(from_vllm_http, payload, tokens, form.layout, form.num_layers, start=start, order=form.order)
    return _rows_of_array(array, _refusal(read))


def rows_of_vllm_array(array: np.ndarray, tokens: Sequence[int], form: DyeForm, start: int) -> Rows:
    """`CompletionOutput.routed_experts`, as vLLM returns it in process."""
    read = partial(from_vllm, array, tokens, form.layout, form.num_layers, start=start, order=form.order)
    return _rows_of_array(array, _refusal(read))


def _rows_of_array(array: np.ndarray, refusal: str) -> Rows:
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise CheckError(
            "routed_experts has another form", expected="[T, L, K] integers", got=f"{array.shape} {array.dtype}"
        )
    ids_TLK = array.astype(np.int64)
    return Rows(ids_TLK, ~(ids_TLK == -1).all(axis=(1, 2)), all_layers=True, refusal=refusal)


def joined(pieces: Sequence[Rows]) -> Rows:
    """The pieces of a stream, one after another, as they came."""
    if len(pieces) == 1:
        return pieces[0]
    shapes = {piece.ids_TLK.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise CheckError("the pieces of a stream have different shapes", got=sorted(shapes))
    return Rows(
        np.concatenate([piece.ids_TLK for piece in pieces]),
        np.concatenate([piece.valid_T for piece in pieces]),
        all_layers=pieces[0].all_layers,
        order=pieces[0].order,
        start=pieces[0].start,
        seams=tuple(np.cumsum([len(piece.ids_TLK) for piece in pieces])[:-1].tolist()),
        refusal=next((piece.refusal for piece in pieces if piece.refusal), pieces[0].refusal),
    )


def _refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except MoetraceError as error:
        return str(error)
    return ""
