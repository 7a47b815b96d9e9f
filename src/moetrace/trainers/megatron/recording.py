"""The routes that one forward of a Megatron-Core model took, as routes to replay or as traces.

Axes: L MoE layers on this rank, N tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megatron.core
import numpy as np
import torch

from moetrace.batch import segments_of, to_numpy
from moetrace.errors import RouterError
from moetrace.layout import MoeLayout
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.trace import RoutingTrace
from moetrace.trainers.megatron.routers import LocalRouter, LocalRouters


class Recording:
    """One forward's routes on this rank; made by `Replayer.record`."""

    def __init__(self, routers: LocalRouters) -> None:
        self.forwards = 0
        self._routers = routers
        self._ids: dict[int, torch.Tensor] = {}

    def begin(self, routers: Sequence[LocalRouter], ids: torch.Tensor | None) -> None:
        """Nothing to prepare."""

    def choose(self, router: LocalRouter, scores_NE: torch.Tensor, live_NK: torch.Tensor, again: bool) -> torch.Tensor:
        """Keep what the router chose, best first; called by its port."""
        if not again:
            if router.layer in self._ids:
                raise RouterError(
                    f"router {router.name} ran twice in one recording",
                    expected="one forward of each chunk",
                    fix="Open a context for each microbatch.",
                )
            # Megatron-Core leaves the ids unsorted where no gradient is computed (since 0.17).
            by_score_NK = scores_NE.detach().gather(1, live_NK).sort(dim=1, descending=True, stable=True).indices
            self._ids[router.layer] = live_NK.gather(1, by_score_NK)
        return live_NK

    def watch(self, output: torch.Tensor) -> None:
        """Nothing to wait for."""

    @property
    def layout(self) -> MoeLayout:
        """Of the MoE layers on this rank, which need not be all of the model's."""
        return MoeLayout(self._routers.layers, self._routers.num_experts, self._routers.top_k)

    @property
    def routes(self) -> AlignedRoutes:
        """To replay on this very rank, in the order in which its routers see their tokens. Waits for the device.

        Every token has a row, padding too: it is what the router chose for it.

        Raises:
            RouterError: a chunk did not run, or this rank has no MoE layer.
        """
        experts_LNK = self._experts()
        tokens = experts_LNK.shape[1]
        return AlignedRoutes(
            experts_LNK=experts_LNK,
            mode_N=np.full(tokens, TokenMode.REPLAY, np.uint8),
            sequence_N=np.full(tokens, -1, np.int32),
            position_N=np.full(tokens, -1, np.int32),
            layout=self.layout,
            fingerprint="",
            order="rank",
        )

    def traces(
        self, input_ids: Any, *, attention_mask: Any = None, position_ids: Any = None, cu_seqlens: Any = None
    ) -> list[RoutingTrace]:
        """One trace for each sequence of the batch, with a row for every token; see `segments_of` for the arguments.

        Raises:
            RouterError: this rank's routers saw a part of the batch only, or a chunk did not run.
        """
        input_ids_BS = to_numpy(input_ids)
        segments = segments_of(
            input_ids_BS, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
        )
        experts_LNK = self._experts()
        if experts_LNK.shape[1] != input_ids_BS.size:
            raise RouterError(
                "the routers of this rank saw another number of tokens than the batch has",
                expected=f"{input_ids_BS.size} tokens",
                got=experts_LNK.shape[1],
                fix="Under context or sequence parallelism a rank sees a part of it; `routes` can be replayed there.",
            )
        rows, columns = input_ids_BS.shape
        order_N = np.arange(input_ids_BS.size).reshape(columns, rows).T.reshape(-1)
        experts_NLK = experts_LNK.transpose(1, 0, 2)[order_N]
        tokens_N = input_ids_BS.reshape(-1)
        return [
            RoutingTrace.build(
                experts_NLK[segment.start : segment.stop],
                self.layout,
                tokens_N[segment.start : segment.stop],
                order="rank",
                engine=f"megatron_core {megatron.core.__version__}",
            )
            for segment in segments
        ]

    def _experts(self) -> np.ndarray:
        lacking = sorted(set(self._routers.layers) - set(self._ids))
        if lacking or not self._ids:
            raise RouterError(
                "no whole forward was recorded",
                expected=f"MoE layers {list(self._routers.layers)}, at least one",
                got=f"no row of layers {lacking}",
            )
        ids = [self._ids[layer] for layer in self._routers.layers]
        return torch.stack([layer_NK.to(ids[0].device) for layer_NK in ids]).cpu().numpy().astype(self.layout.dtype)
