"""What every reader asks of a payload, and every writer of a trace.

Axes: T rows, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Literal

import numpy as np

from moetrace.errors import FormatError, MissingRowError
from moetrace.layout import MoeLayout, as_int
from moetrace.trace import RoutingTrace

IdType = Literal["int32", "int16", "uint16", "uint8"]

MISSING_ID = -1
"""What signed payloads hold in rows that were not captured. An id that stands for no expert: all of a row or none."""


def require_id_type(layout: MoeLayout, dtype: IdType) -> None:
    """Raise `FormatError` unless every expert id of `layout` fits `dtype`."""
    if layout.num_experts - 1 > np.iinfo(dtype).max:
        raise FormatError(
            f"expert ids of this model do not fit {dtype}",
            expected=f"a type that holds {layout.num_experts - 1}",
            got=dtype,
            fix="Ask for int32, which holds the ids of every model.",
        )


def decode_base64(text: object, of: str) -> bytes:
    """Bytes of a base64 text: the standard alphabet, padded, nothing else."""
    if not isinstance(text, str):
        raise FormatError(f"the payload is not base64 of {of}", expected="a string", got=type(text).__name__)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"the payload is not base64 of {of} ({error})") from error
    tail = data[(len(data) - 1) // 3 * 3 :]  # Python overlooks padding and bits that are too much there
    if text[-4:] != encode_base64(tail):
        raise FormatError(f"the payload is not base64 of {of}", expected=f"{len(data)} bytes", got=f"...{text[-8:]!r}")
    return data


def encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def rows_from(tokens: Sequence[int] | np.ndarray, start: int) -> int:
    """T = P + O - 1 - `start`: the last token was never an input."""
    start = as_int(start, "start")
    if not 0 <= start <= len(tokens):
        raise FormatError(
            "start is no position of these tokens",
            expected=f"0 <= start <= {len(tokens)}",
            got=start,
            fix="Pass all tokens, prompt and output, and the start that was asked for.",
        )
    return max(len(tokens) - 1 - start, 0)


def require_ids(payload: object, dtypes: Sequence[np.dtype], shape: tuple[int, int, int], of: str) -> np.ndarray:
    """`payload` as the array (or tensor on the CPU) that it is: of one of these types, of exactly this shape."""
    if not (hasattr(payload, "dtype") and hasattr(payload, "shape")):  # a list has no type to be strict about
        raise FormatError(f"the payload is not {of}", expected="an array", got=type(payload).__name__)
    try:
        ids = np.asarray(payload)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"the payload is not an array on the CPU ({error})", expected=of) from error
    if ids.dtype not in dtypes:
        names = " or ".join(dtype.name for dtype in dtypes)
        raise FormatError(f"the ids of {of} have another type", expected=names, got=ids.dtype)
    require_shape(ids.shape, shape, of)
    return ids


def require_shape(got: tuple[int, ...], shape: tuple[int, int, int], of: str) -> None:
    """Raise `FormatError` unless a payload has one row for each token but the last, these layers and this K."""
    if got != shape:
        raise FormatError(
            f"the shape of {of} does not fit the tokens and the model",
            expected=f"{list(shape)}: rows, layers, experts per token",
            got=list(got),
            fix="Pass all tokens, prompt and output, the start that was asked for, and the layout of this model.",
        )


def places_of(layout: MoeLayout, num_layers: int, engine: str) -> list[int]:
    """Where the layers of `layout` are among all D decoder layers."""
    layers, num_layers = list(layout.layers), as_int(num_layers, "num_layers")
    if len(set(layers)) != len(layers) or layers[-1] >= num_layers:
        raise FormatError(
            f"the model's MoE layers have no place in {engine}'s payload",
            expected=f"different decoder layers below {num_layers}",
            got=layers,
            fix="Pass the number of all decoder layers. Two routers in a layer need /generate, which names its layers.",
        )
    return layers


def with_dense_layers(trace: RoutingTrace, num_layers: int, dtype: np.dtype, engine: str) -> np.ndarray:
    """`[T, D, K]`: every decoder layer, zeros in those that do not route."""
    ids_TDK = np.zeros((trace.num_rows, num_layers, trace.layout.top_k), dtype)
    ids_TDK[:, places_of(trace.layout, num_layers, engine)] = trace.experts_TLK
    return ids_TDK


def captured_rows(ids_TLK: np.ndarray, layout: MoeLayout) -> np.ndarray:
    """`[T]` bool: the rows that are not `MISSING_ID` throughout. A row that is so in part is refused."""
    missing_TLK = ids_TLK == MISSING_ID
    if not missing_TLK.any():
        return np.ones(len(ids_TLK), bool)
    valid_T = ~missing_TLK.all(axis=(1, 2))
    torn_TLK = missing_TLK & valid_T[:, None, None]
    if torn_TLK.any():
        row, layer, _ = np.argwhere(torn_TLK)[0]
        number = layout.layers[layer] if layer < layout.num_layers else layer
        raise FormatError(
            f"row {row} is captured in part: layer {number} is missing",
            expected=f"{MISSING_ID} in all of a row or nowhere",
            got=ids_TLK[row, layer].tolist(),
            fix="Report it to the engine's developers: such a row must not be used.",
        )
    return valid_T


def require_all_captured(trace: RoutingTrace, engine: str) -> None:
    """Raise `MissingRowError` unless every row was captured, for payloads that have no place to say so."""
    missing = np.flatnonzero(~trace.valid_T)
    if len(missing):
        raise MissingRowError(
            f"{engine}'s payload cannot say which rows are missing",
            expected="every row captured",
            got=f"{len(missing)} of {trace.num_rows} missing, the first at position {trace.start + missing[0]}",
            fix="Use /generate, whose payload has a validity bitmap, or a container.",
        )


def require_from_first(trace: RoutingTrace, engine: str) -> None:
    """Raise `FormatError` unless the trace begins at position 0, for payloads that always do."""
    if trace.start != 0:
        raise FormatError(f"{engine}'s payload begins at the first token", expected="start 0", got=trace.start)
