"""Which layers of a model route, and how: `MoeLayout`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace.errors import InvalidTraceError, LayoutMismatchError

MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class MoeLayout:
    """Which decoder layers of a model route, and how.

    Attributes:
        layers: absolute numbers of the decoder layers that have routed experts, ascending. Dense layers are absent; a
            layer with several routers (JetMoE's attention and MLP) is named once for each, in the order of its modules.
        num_experts: E, routed experts per layer (shared experts are not counted).
        top_k: K, experts per token.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise InvalidTraceError("layers must be decoder-layer numbers", expected="integers", got=repr(self.layers))
        object.__setattr__(self, "layers", tuple(as_int(layer, "a layer number") for layer in self.layers))
        object.__setattr__(self, "num_experts", as_int(self.num_experts, "num_experts"))
        object.__setattr__(self, "top_k", as_int(self.top_k, "top_k"))
        if not self.layers or min(self.layers) < 0 or list(self.layers) != sorted(self.layers):
            raise InvalidTraceError(
                "layers must be decoder-layer numbers", expected="at least one, ascending", got=self.layers
            )
        if not 1 <= self.top_k <= self.num_experts <= MAX_EXPERTS:
            raise InvalidTraceError(
                "top_k and num_experts do not fit together",
                expected=f"1 <= top_k <= num_experts <= {MAX_EXPERTS}",
                got=f"top_k={self.top_k}, num_experts={self.num_experts}",
            )

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.layers)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned integer that holds E - 1: uint8 up to 256 experts, uint16 above."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row `[L, K]` as stored in a trace."""
        return self.num_layers * self.top_k * self.dtype.itemsize

    def require_same(self, other: MoeLayout, whose: str) -> None:
        """Raise `LayoutMismatchError` unless `other` (named by `whose`) is this layout."""
        if self != other:
            raise LayoutMismatchError(
                f"the trace's MoE layout is not that of {whose}",
                expected=other,
                got=self,
                fix="Replay a trace on the model that recorded it; layers are absolute decoder-layer numbers.",
            )


def fingerprint_from(
    routers: list[list[int]], *, model_type: Any, hidden_size: Any, num_hidden_layers: Any, vocab_size: Any
) -> str:
    """The fingerprint of a model, see `moetrace.routers.fingerprint_of`: of the layer, E and K of each router in their
    order, and of facts of its config."""
    facts = {
        "routers": routers,
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def as_int(value: object, what: str) -> int:
    """A whole number as a Python int; numpy's are welcome, floats and bools are not."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise InvalidTraceError(f"{what} is not a whole number", expected="an integer", got=repr(value))


def require_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise InvalidTraceError(f"{what} is not text", expected="a string", got=repr(value))
