"""Where each sequence lies in a training batch: padded on either side, or packed.

Axes: B rows and S columns of a batch, N = B * S tokens of it in memory order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moetrace.errors import ReplayError


@dataclass(frozen=True)
class Segment:
    """One sequence of a batch: flat token indices `start <= n < stop`, positions 0, 1, ... in order."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def to_numpy(values: Any) -> np.ndarray:
    """A numpy array of a tensor, array or nested list; a tensor on a GPU is copied (this waits for the GPU)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def segments_of(
    input_ids_BS: np.ndarray,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    cu_seqlens: Any = None,
) -> list[Segment]:
    """The sequences of a batch in memory order.

    Padded: `attention_mask` `[B, S]` of ones and zeros, ones contiguous in each row (left- or right-padded); one
    sequence a row. Packed: `cu_seqlens` `[n + 1]` flat boundaries, or `position_ids` `[B, S]` that restart at 0 with
    each sequence; no attention mask. Neither: each row is one whole sequence.

    Raises:
        ReplayError: the arguments contradict each other or the batch.
    """
    shape = input_ids_BS.shape
    if input_ids_BS.ndim != 2:
        raise ReplayError("input_ids must be a batch", expected="shape [B, S]", got=f"shape {shape}")
    if not input_ids_BS.size:
        raise ReplayError("input_ids is empty", expected="at least one token", got=f"shape {shape}")
    positions_BS = None if position_ids is None else _positions(to_numpy(position_ids), shape)
    if cu_seqlens is not None and attention_mask is not None:
        raise ReplayError(
            "a batch is packed or padded, not both", expected="cu_seqlens or attention_mask", got="cu_seqlens and mask"
        )
    if cu_seqlens is not None:
        segments = _from_boundaries(to_numpy(cu_seqlens), input_ids_BS.size)
    elif attention_mask is not None:
        segments = _from_mask(to_numpy(attention_mask), shape)
    elif positions_BS is not None:
        segments = _from_positions(positions_BS)
    else:
        segments = [Segment(row * shape[1], (row + 1) * shape[1]) for row in range(shape[0])]
    if positions_BS is not None:
        _require_counting_up(positions_BS.reshape(-1), segments)
    return segments


def _from_boundaries(cu_seqlens: np.ndarray, num_tokens: int) -> list[Segment]:
    bounds = np.atleast_1d(cu_seqlens).astype(np.int64)
    if cu_seqlens.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or (np.diff(bounds) <= 0).any():
        raise ReplayError("cu_seqlens must be flat boundaries", expected="0 < ... ascending", got=cu_seqlens.tolist())
    if bounds[-1] > num_tokens:
        raise ReplayError("cu_seqlens leaves the batch", expected=f"<= {num_tokens} tokens", got=int(bounds[-1]))
    return [Segment(int(a), int(b)) for a, b in pairwise(bounds)]


def _from_mask(mask_BS: np.ndarray, shape: tuple[int, ...]) -> list[Segment]:
    if mask_BS.shape != shape or not np.isin(mask_BS, (0, 1)).all():
        raise ReplayError(
            "attention_mask does not fit input_ids",
            expected=f"shape {shape} of ones and zeros",
            got=f"shape {mask_BS.shape}, values up to {mask_BS.max(initial=0)}",
            fix="For packed batches pass cu_seqlens or position_ids.",
        )
    segments = []
    for row, mask_S in enumerate(mask_BS.astype(bool)):
        ones = np.flatnonzero(mask_S)
        if not len(ones) or ones[-1] - ones[0] + 1 != len(ones):
            raise ReplayError(
                f"attention_mask row {row} is not one run of ones",
                expected="padding on the left or on the right only",
                got=f"{len(ones)} ones with holes" if len(ones) else "no token",
            )
        offset = row * shape[1]
        segments.append(Segment(offset + int(ones[0]), offset + int(ones[-1]) + 1))
    return segments


def _positions(position_ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if position_ids.shape not in (shape, (1, shape[1]), shape[1:]):
        raise ReplayError("position_ids does not fit input_ids", expected=f"shape {shape}", got=position_ids.shape)
    return np.broadcast_to(position_ids, shape)


def _from_positions(positions_BS: np.ndarray) -> list[Segment]:
    if (positions_BS[:, 0] != 0).any():
        raise ReplayError("position_ids must begin at 0 in every row", got=positions_BS[:, 0].tolist())
    bounds = np.append(np.flatnonzero(positions_BS.reshape(-1) == 0), positions_BS.size)
    return [Segment(int(a), int(b)) for a, b in pairwise(bounds)]


def _require_counting_up(positions_N: np.ndarray, segments: list[Segment]) -> None:
    for start, stop in ((segment.start, segment.stop) for segment in segments):
        if (positions_N[start:stop] != np.arange(stop - start)).any():
            raise ReplayError(
                f"position_ids of the sequence at token {start} are not 0, 1, 2, ...",
                got=positions_N[start : min(stop, start + 8)].tolist(),
                fix="Padding inside a packed batch needs cu_seqlens.",
            )
