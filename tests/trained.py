"""Small models as they are trained: with activation checkpoints of either kind, or without."""

from __future__ import annotations

from typing import Any

import pytest
from families import build

CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])


def made(name: str = "mixtral", reentrant: bool | None = None) -> Any:
    """A small model in training mode, with activation checkpoints of either kind or without."""
    model = build(name).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model
