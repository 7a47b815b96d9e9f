"""Where the routers of one engine step leave their ids.

Axes: L MoE layers, N tokens of a step, K experts per token. A step is one batched forward; its tokens are packed.
"""

from __future__ import annotations

import torch

from moetrace.errors import CaptureError
from moetrace.layout import MoeLayout
from moetrace.routers import RouterSite, RoutingSession, Selection
from moetrace.trace import Order

NO_EXPERT = -1


class Staging(RoutingSession):
    """A static buffer `[L, capacity, K]` int64 that the routers' own top-k writes to: no copy, no kernel of ours.

    Its address never changes, so the writes can live in a CUDA graph: a replayed graph writes here again without any
    Python. Tokens beyond a step's own (padding) are overwritten freely and never committed.

    The commit takes the ids away and leaves `NO_EXPERT`: a step that does not write (a router that did not run, or a
    compiler that lost the tap) finds no row of the step before it.
    """

    def __init__(self, layout: MoeLayout, capacity: int, device: torch.device) -> None:
        self.layout = layout
        shape = (layout.num_layers, capacity, layout.top_k)
        self.ids_LNK = torch.full(shape, NO_EXPERT, dtype=torch.int64, device=device)
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

    def indices_out(self, site: RouterSite, num_tokens: int) -> torch.Tensor:
        self.require_room(num_tokens)
        return self.ids_LNK[site.index, :num_tokens]

    def on_selection(self, selection: Selection) -> None:
        if not selection.in_place:  # a gradient or a second session was in the way
            self.indices_out(selection.site, selection.indices_NK.shape[0]).copy_(selection.indices_NK)
        if not selection.sorted:
            self.order = "set"
