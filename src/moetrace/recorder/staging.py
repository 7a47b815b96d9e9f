"""Where the routers of one engine step leave their ids, and how those become rows.

Axes: L MoE layers, N tokens of a step, K experts per token. A step is one batched forward; its tokens are packed.
"""

from __future__ import annotations

import numpy as np
import torch

from moetrace.errors import CaptureError
from moetrace.layout import MoeLayout
from moetrace.routers import Selection
from moetrace.trace import Order

_TORCH_DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.uint16}


def torch_dtype(layout: MoeLayout) -> torch.dtype:
    """`layout.dtype` as a torch dtype."""
    return _TORCH_DTYPES[layout.dtype]


class Staging:
    """A static buffer `[L, capacity, K]` int64 that the routers of a step write to.

    Its address never changes, so the writes can live in a CUDA graph: a replayed graph writes here again without any
    Python. Tokens beyond a step's own (padding) are overwritten freely and never committed.
    """

    supplies_routes = False

    def __init__(self, layout: MoeLayout, capacity: int, device: torch.device) -> None:
        self.layout = layout
        self.ids_LNK = torch.zeros(layout.num_layers, capacity, layout.top_k, dtype=torch.int64, device=device)
        self.order: Order = "rank"

    @property
    def capacity(self) -> int:
        """Most tokens a step can have."""
        return self.ids_LNK.shape[1]

    def require_room(self, num_tokens: int) -> None:
        """Raise `CaptureError` for a step that staging cannot hold."""
        if num_tokens > self.capacity:
            raise CaptureError(
                "a step has more tokens than staging holds", expected=f"<= {self.capacity}", got=num_tokens
            )

    def on_selection(self, selection: Selection) -> None:
        tokens = selection.indices_NK.shape[0]
        self.require_room(tokens)
        self.ids_LNK[selection.site.index, :tokens].copy_(selection.indices_NK)
        if not selection.sorted:
            self.order = "set"


def commit_rows(staging: Staging, num_tokens: int) -> torch.Tensor:
    """The rows of a step's first `num_tokens` tokens: `[N, L, K]`, narrowed to `layout.dtype`, one kernel.

    Launched on the current stream right after the step, before the next step can overwrite staging.
    """
    staging.require_room(num_tokens)
    ids_NLK = staging.ids_LNK[:, :num_tokens].permute(1, 0, 2)
    rows_NLK = torch.empty(ids_NLK.shape, dtype=torch_dtype(staging.layout), device=ids_NLK.device)
    return rows_NLK.copy_(ids_NLK)
