"""Payloads of other engines, as `RoutingTrace` and back: one file for each engine, what they share in `checks.py`.

Readers are strict: length, type, layers, shape and ids must be what the engine sends for these tokens and this model,
and what only the client knows is an argument. Writers refuse what the payload has no place for. See docs/dialects.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace.dialects.checks import MISSING_ID, IdType, require_id_type
from moetrace.dialects.lightllm import AxisOrder, describe, from_lightllm, lightllm_parts, to_lightllm
from moetrace.dialects.megatron import from_megatron, from_megatron_http, to_megatron, to_megatron_http
from moetrace.dialects.sglang import from_sglang, sglang_ids, to_sglang
from moetrace.dialects.trtllm import from_trtllm, to_trtllm
from moetrace.dialects.vllm import from_vllm, from_vllm_http, to_vllm, to_vllm_http
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

__all__ = [
    "DIALECTS",
    "MISSING_ID",
    "AxisOrder",
    "Dialect",
    "IdType",
    "describe",
    "dialect_of",
    "from_lightllm",
    "from_megatron",
    "from_megatron_http",
    "from_sglang",
    "from_trtllm",
    "from_vllm",
    "from_vllm_http",
    "lightllm_parts",
    "require_id_type",
    "sglang_ids",
    "to_lightllm",
    "to_megatron",
    "to_megatron_http",
    "to_sglang",
    "to_trtllm",
    "to_vllm",
    "to_vllm_http",
]


@dataclass(frozen=True)
class Dialect:
    """One payload by name, for code that does not know beforehand which engine it talks to.

    Attributes:
        name: as in `DIALECTS`.
        reader, writer: the functions of this package.
        every_layer: the layer axis counts all decoder layers, dense ones too.
        has_start: a payload may begin later than at the first token; the request said where.
        says_missing: rows that were not captured can be told apart.
    """

    name: str
    reader: Callable[..., RoutingTrace]
    writer: Callable[..., Any]
    every_layer: bool = False
    has_start: bool = False
    says_missing: bool = False

    def read(
        self, payload: Any, tokens: Sequence[int] | np.ndarray, layout: MoeLayout, num_layers: int, *, start: int = 0
    ) -> RoutingTrace:
        """The payload as a trace. `num_layers`, of all decoder layers, and `start` are what the client knows.

        Raises:
            FormatError: the payload is not of this dialect, these tokens and this model, or cannot have that start.
            TraceError: an id is out of range or twice in a route.
        """
        if start != 0 and not self.has_start:
            raise FormatError(f"{self.name} payloads begin at the first token", expected="start 0", got=start)
        return self.reader(
            payload,
            tokens,
            layout,
            **({"num_layers": num_layers} if self.every_layer else {}),
            **({"start": start} if self.has_start else {}),
        )

    def write(self, trace: RoutingTrace, num_layers: int) -> Any:
        """The trace as a payload.

        Raises:
            FormatError: the payload has no place for its layers, ids or start.
            MissingRowError: nor for a row that was not captured.
        """
        return self.writer(trace, **({"num_layers": num_layers} if self.every_layer else {}))


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("lightllm", from_lightllm, to_lightllm, says_missing=True),
        Dialect("sglang", from_sglang, to_sglang, every_layer=True, has_start=True),
        Dialect("vllm", from_vllm, to_vllm, every_layer=True, has_start=True),
        Dialect("vllm-http", from_vllm_http, to_vllm_http, every_layer=True, has_start=True),
        Dialect("trtllm", from_trtllm, to_trtllm, says_missing=True),
        Dialect("megatron", from_megatron, to_megatron),
        Dialect("megatron-http", from_megatron_http, to_megatron_http),
    )
}
"""Every payload by name. LightLLM's is read in both its forms and written in the first."""


def dialect_of(name: str) -> Dialect:
    """Raises `FormatError` for a name that is not in `DIALECTS`."""
    if name not in DIALECTS:
        raise FormatError("the dialect is unknown", expected=", ".join(DIALECTS), got=name)
    return DIALECTS[name]
