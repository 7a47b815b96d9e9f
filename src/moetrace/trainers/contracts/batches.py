"""Contracts of trainers that take whole batches: the rows of sequences at the places of their tokens.

Axes: B rows and S columns of a batch, N = B * S tokens of it in memory order, D decoder layers, L MoE layers, K experts
per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import numpy as np

from moetrace.batch import Segment, segments_of, to_numpy
from moetrace.errors import FormatError, LayoutMismatchError, ReplayError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, as_traces
from moetrace.trainers.contracts.contract import Captured, Contract, Facts, Missing


@dataclass(frozen=True)
class BatchContract(Contract):
    """What one trainer takes for a batch.

    Attributes:
        side: where the trainer counts on padding, if it does. None: on either side, or on both.
    """

    side: Literal["left", "right"] | None = None

    def write_batch(
        self,
        traces: Sequence[RoutingTrace],
        input_ids: Any,
        num_layers: int | None = None,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        cu_seqlens: Any = None,
        missing: Missing = "error",
    ) -> np.ndarray:
        """The rows of a batch: `[B, S, D, K]` or `[B, S, L, K]`, C order; padding as `pad` says.

        Args:
            traces: one for each sequence, in memory order.
            input_ids: `[B, S]` token ids.
            attention_mask, position_ids, cu_seqlens: how sequences lie in it, see `moetrace.batch.segments_of`.
            num_layers, missing: as in `write`.

        Raises:
            ReplayError: the batch contradicts itself, is padded on the wrong side, or has not one trace a sequence.
            LayoutMismatchError: the traces come from different models.
            MoetraceError: as `write`.
        """
        traces = as_traces(traces)
        input_ids_BS, segments = self._segments(input_ids, attention_mask, position_ids, cu_seqlens)
        if len(traces) != len(segments):
            raise ReplayError(
                "each sequence of the batch needs one trace", expected=f"{len(segments)} traces", got=len(traces)
            )
        layout = _one_model(traces)
        _, width = self.axis(layout, num_layers)
        ids_NDK = np.empty((input_ids_BS.size, width, layout.top_k), self.written_dtype(layout))
        ids_NDK[:] = self.fillers(len(ids_NDK), layout, ids_NDK.dtype)
        tokens_N = input_ids_BS.reshape(-1)
        for trace, segment in zip(traces, segments, strict=True):
            ids_NDK[segment.start : segment.stop] = self.write(
                trace, tokens_N[segment.start : segment.stop], num_layers, missing=missing, first_row=segment.start
            )
        return ids_NDK.reshape(*input_ids_BS.shape, width, layout.top_k)

    def read_batch(
        self,
        payload: Any,
        input_ids: Any,
        layout: MoeLayout,
        num_layers: int | None = None,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        cu_seqlens: Any = None,
        captured: Sequence[Captured] | None = None,
        **facts: Unpack[Facts],
    ) -> list[RoutingTrace]:
        """One trace for each sequence of a batch; what stands in padding is not looked at.

        Args:
            payload: `[B, S, D, K]` or `[B, S, L, K]`, an array or a tensor on the CPU.
            input_ids, attention_mask, position_ids, cu_seqlens: as in `write_batch`.
            captured: for each sequence what `read` takes.
            layout, num_layers, order, fingerprint, engine: as in `read`.

        Raises:
            ReplayError: the batch contradicts itself, or is padded on the wrong side.
            FormatError, TraceError: as `read`.
        """
        input_ids_BS, segments = self._segments(input_ids, attention_mask, position_ids, cu_seqlens)
        ids = to_numpy(payload)
        if ids.ndim != 4 or ids.shape[:2] != input_ids_BS.shape:
            raise FormatError(
                f"the shape of {self.payload} does not fit input_ids",
                expected=f"{list(input_ids_BS.shape)} and two more axes: layers, experts per token",
                got=list(ids.shape),
            )
        said: Sequence[Captured | None] = [None] * len(segments) if captured is None else captured
        if len(said) != len(segments):
            raise FormatError(
                f"captured has not one entry for each sequence of {self.payload}",
                expected=f"{len(segments)} entries",
                got=len(said),
            )
        ids_N, tokens_N = ids.reshape(-1, *ids.shape[2:]), input_ids_BS.reshape(-1)
        places = [slice(segment.start, segment.stop) for segment in segments]
        return [
            self.read(ids_N[place], tokens_N[place], layout, num_layers, captured=rows, **facts)
            for place, rows in zip(places, said, strict=True)
        ]

    def _segments(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, cu_seqlens: Any
    ) -> tuple[np.ndarray, list[Segment]]:
        input_ids_BS = to_numpy(input_ids)
        segments = segments_of(
            input_ids_BS, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
        )
        for number, segment in enumerate(segments):
            edge = segment.stop if self.side == "left" else segment.start
            if self.side is not None and edge % input_ids_BS.shape[1]:
                raise ReplayError(
                    f"sequence {number} is not where {self.trainer} looks for it",
                    expected=f"padding on the {self.side} only",
                )
        return input_ids_BS, segments


def _one_model(traces: Sequence[RoutingTrace]) -> MoeLayout:
    for trace in traces[1:]:
        trace.layout.require_same(traces[0].layout, "the batch's first trace")
    fingerprints = sorted({trace.fingerprint for trace in traces} - {""})
    if len(fingerprints) > 1:
        raise LayoutMismatchError("the traces come from different models", expected="one fingerprint", got=fingerprints)
    return traces[0].layout
