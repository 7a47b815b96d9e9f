"""Megatron-Core inference's payload: int16 (E <= 32768) or int32 `[T, L, K]`, one layer for each local router.

In process `DynamicInferenceRequest.routing_indices`, an array; over HTTP `choices[].moe_topk_indices` of completions
and chat. All P + O - 1 rows, or null where a block lost its routes. Source: Megatron-LM
`megatron/core/inference/inference_request.py`, `contexts/kv_block_allocator.py`,
`text_generation_controllers/text_generation_controller.py` (the types),
`text_generation_server/dynamic_text_gen_server/endpoints/completions.py`; pull requests 3034 and 4301.

Over HTTP the array was a nested list until 4301. Since then it is `["ndarray", {"data": nested list, "dtype":
"int16"}]`, as `serialize` makes it, because the endpoint unwraps tensors only; `prompt_moe_topk_indices`, a slice of
that pair, is of no use. Routers of draft heads (MTP) are in the layer axis too: pass a layout that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from moetrace.dialects.checks import require_all_captured, require_from_first, require_ids, rows_from
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import Order, RoutingTrace

_TAG = "ndarray"
_MAX_INT16_EXPERTS = 1 << 15


def to_megatron(trace: RoutingTrace) -> np.ndarray:
    """What `routing_indices` would hold.

    Raises:
        MissingRowError: a row was not captured. The payload has no place to say so.
        FormatError: the trace does not begin at the first token.
    """
    require_all_captured(trace, "Megatron-Core")
    require_from_first(trace, "Megatron-Core")
    return trace.experts_TLK.astype(_id_type(trace.layout))


def to_megatron_http(trace: RoutingTrace) -> list[Any]:
    """What `choices[].moe_topk_indices` would hold, in the form since pull request 4301. Raises as `to_megatron`."""
    ids_TLK = to_megatron(trace)
    return [_TAG, {"data": ids_TLK.tolist(), "dtype": ids_TLK.dtype.name}]


def from_megatron(
    payload: object,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    *,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "megatron_core",
) -> RoutingTrace:
    """Read `routing_indices`.

    Args:
        payload: int16 or, above 32768 experts and before pull request 4301, int32 `[T, L, K]`.
        tokens: prompt and output token ids, P + O of them: T must be P + O - 1.
        layout: the layers whose routers are in the process, in the order they were built.
        order, fingerprint, engine: what the trace is to say of itself.

    Raises:
        FormatError: another type, another number of rows, layers or experts per token.
        TraceError: an id is out of range or twice in a route (rows that Megatron-Core never wrote hold zeros).
    """
    shape = (rows_from(tokens, 0), layout.num_layers, layout.top_k)
    dtypes = [_id_type(layout), np.dtype(np.int32)]
    ids_TLK = require_ids(payload, dtypes, shape, "Megatron-Core's routing indices")
    return RoutingTrace.build(ids_TLK, layout, tokens, order=order, fingerprint=fingerprint, engine=engine)


def from_megatron_http(
    payload: object,
    tokens: Sequence[int] | np.ndarray,
    layout: MoeLayout,
    *,
    order: Order = "rank",
    fingerprint: str = "",
    engine: str = "megatron_core",
) -> RoutingTrace:
    """Read `choices[].moe_topk_indices`, of either form. Other arguments, and what is refused: `from_megatron`."""
    dtype = np.dtype(np.int32)
    if isinstance(payload, list | tuple) and len(payload) == 2 and payload[0] == _TAG:
        payload, dtype = _untagged(payload[1])
    ids_TLK = _array_of(payload, dtype, layout)
    return from_megatron(ids_TLK, tokens, layout, order=order, fingerprint=fingerprint, engine=engine)


def _untagged(content: object) -> tuple[object, np.dtype]:
    if not isinstance(content, dict) or content.keys() != {"data", "dtype"} or content["dtype"] not in _DTYPES:
        raise FormatError(
            "the payload is not an array of Megatron-Core",
            expected=f"data and a dtype of {' or '.join(_DTYPES)}",
            got=f"dtype {content.get('dtype')!r}" if isinstance(content, dict) else type(content).__name__,
        )
    return content["data"], np.dtype(content["dtype"])


_DTYPES = ("int16", "int32")


def _array_of(nested: object, dtype: np.dtype, layout: MoeLayout) -> np.ndarray:
    """`[T, L, K]` of three lists in each other; nothing but whole numbers inside, none of which changes."""
    expected = f"three lists in each other, of whole numbers that fit {dtype}"
    if not isinstance(nested, list):
        raise FormatError("the payload is not a nested list", expected=expected, got=type(nested).__name__)
    if not nested:
        return np.zeros((0, layout.num_layers, layout.top_k), dtype)
    try:
        kinds = set(map(type, chain.from_iterable(chain.from_iterable(nested))))
        ids = np.array(nested)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the payload is not a nested list of ids ({error})", expected=expected) from error
    limits = np.iinfo(dtype)
    if kinds != {int} or not limits.min <= ids.min() <= ids.max() <= limits.max:
        found = sorted(kind.__name__ for kind in kinds)
        raise FormatError("the payload is not a nested list of ids", expected=expected, got=f"{ids.dtype} of {found}")
    return ids.astype(dtype)


def _id_type(layout: MoeLayout) -> np.dtype:
    return np.dtype(np.int16 if layout.num_experts <= _MAX_INT16_EXPERTS else np.int32)
