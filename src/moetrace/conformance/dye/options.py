"""The knobs of a dye checkpoint. The command line reads names, defaults and help from here. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moetrace.errors import DyeError
from moetrace.ranges import require_ranges


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DyeOptions:
    """Sizes and numbers of a dye checkpoint.

    Raises:
        DyeError: a value is out of range. Whether they fit an architecture and each other shows later.
    """

    num_experts: int = _knob(64, "experts of a layer, E")
    top_k: int = _knob(8, "experts of a token, K")
    num_layers: int = _knob(4, "decoder layers")
    dense_first: int = _knob(0, "how many of them, the first ones, have no experts")
    shared_experts: int = _knob(0, "shared experts of a layer; 0: as few as the architecture can have")
    num_groups: int = _knob(1, "groups of experts")
    top_groups: int = _knob(1, "groups that a token uses")
    bias: bool = _knob(False, "give every second expert a bias in advance, so that who forgets it chooses others")
    eos: bool = _knob(True, "let the last token end a sequence")
    vocab_size: int = _knob(16384, "least size of the vocabulary: so many positions are told apart")
    window: int = _knob(32768, "longest sequence")
    dtype: str = _knob("bfloat16", "float32, bfloat16 or float16")
    weight_version: int = _knob(0, "each version routes otherwise: write two to test an update of weights")

    def __post_init__(self) -> None:
        require_ranges(self, DyeError, shared_experts=0, vocab_size=2, window=2)
