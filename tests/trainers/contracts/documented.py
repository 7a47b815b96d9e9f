"""The contracts of trainers as they are documented, with loops, never by the package: what a sequence must look like.

Axes: n tokens of a sequence, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from payloads import CASES, Case

from moetrace.trace import RoutingTrace

Nested = list[list[list[int]]]
WHOLE = [case for case in CASES if case.start == 0]


@dataclass(frozen=True)
class Documented:
    """What a trainer documents.

    Attributes:
        limits: pairs of a type and the highest number of experts it is for, ascending.
        every_layer: the layer axis counts dense layers too.
        last: what the row of the last token holds: nothing (there is none), "spread" or "first" distinct ids, or -1.
        missing: what a row that was not captured holds, if it may be so: -1, or None.
        word: what the trainer does with such a token.
    """

    limits: tuple[tuple[str, int], ...]
    every_layer: bool
    last: str | None
    missing: int | None = None
    word: str | None = None

    def dtype(self, num_experts: int) -> str:
        return next(name for name, limit in self.limits if num_experts <= limit)

    def filler(self, kind: str, row: int, case: Case) -> list[int]:
        if kind == "-1":
            return [-1] * case.top_k
        if kind == "first":
            return list(range(case.top_k))
        return [(row * case.top_k + rank) % case.num_experts for rank in range(case.top_k)]

    def rows(self, case: Case, missing: tuple[int, ...] = (), first_row: int = 0) -> np.ndarray:
        """A sequence's rows, one after another."""
        layers = range(case.num_layers) if self.every_layer else case.layers
        ids: Nested = []
        for position in range(max(case.num_tokens - 1, 0)):
            if position in missing:
                assert self.missing is not None
                ids.append([[self.missing] * case.top_k for _ in layers])
            else:
                dense = [0] * case.top_k
                ids.append([case.route(position, layer) if layer in case.layers else dense for layer in layers])
        if self.last is not None and case.num_tokens:
            row = first_row + case.num_tokens - 1
            ids.append([self.filler(self.last, row, case) for _ in layers])
        shape = len(ids), len(layers), case.top_k
        return np.array(ids, self.dtype(case.num_experts)).reshape(shape)


DOCUMENTED: dict[str, Documented] = {
    "verl": Documented((("int16", 32768),), True, "spread"),
    "slime": Documented((("int32", 1 << 31),), True, None),
    "miles": Documented((("int32", 1 << 31),), True, None, -1, "dummy"),
    "nemo_rl": Documented((("int8", 128), ("int16", 32768), ("int32", 1 << 31)), True, "first", -1, "live"),
    "automodel": Documented((("int64", 1 << 31),), False, "spread"),
    "skyrl": Documented((("uint8", 256), ("int16", 32768), ("int32", 1 << 31)), True, None, None, "dummy"),
    "prime_rl": Documented((("uint8", 256), ("uint16", 65536)), True, "spread"),
    "maxtext": Documented((("int16", 32768),), True, "-1", -1, "dummy"),
}
"""SkyRL's sequences are prefixes: of what an engine returns, n - 1 rows."""


def trace_of(case: Case, missing: tuple[int, ...] = (), tokens: list[int] | None = None, **facts: Any) -> RoutingTrace:
    valid = np.array([position not in missing for position in case.positions], bool)
    ids = np.array(case.moe_ids(), np.int64).reshape(len(case.positions), len(case.layers), case.top_k)
    return RoutingTrace.build(
        ids, case.layout, case.tokens if tokens is None else tokens, valid_T=valid, start=case.start, **facts
    )


def shorter(case: Case, num_tokens: int) -> Case:
    """The same model and routes, fewer or more tokens."""
    return replace(case, num_tokens=num_tokens)
