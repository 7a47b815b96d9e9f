"""Where each sequence lies in a training batch: padded on either side, packed, or jagged.

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


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a batch and the sequences that they belong to.

    Attributes:
        tokens_N: `[N]` int64 token ids in memory order.
        shape: (B, S); (1, N) for a jagged batch.
        segments: its sequences in memory order.
        lengths: of the rows of a jagged batch, or None.
    """

    tokens_N: np.ndarray
    shape: tuple[int, int]
    segments: list[Segment]
    lengths: tuple[int, ...] | None = None

    def flags(self, values: Any, name: str) -> np.ndarray:
        """`[N]` bool of a mask that lies as the batch does; `ReplayError` unless it does."""
        values_BS, lengths = to_rows(values)
        alike = lengths is None and values_BS.shape == self.shape
        if not alike and _lengths_of(values_BS.shape, lengths) != _lengths_of(self.shape, self.lengths):
            raise ReplayError(
                f"{name} does not fit input_ids",
                expected=f"shape {self.shape}" if self.lengths is None else f"rows of {self.lengths} tokens",
                got=f"shape {values_BS.shape}" if lengths is None else f"rows of {lengths}",
            )
        return values_BS.astype(bool).reshape(-1)


def _lengths_of(shape: tuple[int, ...], lengths: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of the rows of what may be jagged; jagged rows of one length are those of a plain batch."""
    return shape[1:2] * shape[0] if lengths is None and len(shape) == 2 else lengths or ()


def batch_of(
    input_ids: Any, *, attention_mask: Any = None, position_ids: Any = None, cu_seqlens: Any = None
) -> TokenBatch:
    """Read a batch as a model would be called with it.

    Args:
        input_ids: `[B, S]`, or jagged: a `torch.nested` tensor or a list of sequences of unequal length, which the
            model gets packed in this order (`[1, N]`).
        attention_mask, position_ids, cu_seqlens: see `segments_of`; of a jagged batch none is needed.

    Raises:
        ReplayError: the arguments contradict each other.
    """
    input_ids_BS, lengths = to_rows(input_ids)
    if lengths is not None:
        own = np.cumsum((0, *lengths))
        if cu_seqlens is not None and not np.array_equal(to_numpy(cu_seqlens), own):
            raise ReplayError(
                "cu_seqlens is not that of the jagged batch", expected=own.tolist(), got=to_numpy(cu_seqlens).tolist()
            )
        cu_seqlens = own
    segments = segments_of(
        input_ids_BS, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
    )
    rows, columns = input_ids_BS.shape
    return TokenBatch(input_ids_BS.reshape(-1), (rows, columns), segments, lengths)


def to_rows(values: Any) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """A batch as one array: as it is, or `[1, N]` and the lengths of its rows where these are unequal."""
    if getattr(values, "is_nested", False):
        values = _without_holes(values.detach()).cpu().unbind()
        rows = [to_numpy(row) for row in values]
    elif isinstance(values, list | tuple) and values and all(hasattr(row, "__len__") for row in values):
        rows = [to_numpy(row) for row in values]
        if len({row.shape for row in rows}) == 1:
            return np.stack(rows), None
    else:
        return to_numpy(values), None
    if any(row.ndim != 1 or not len(row) for row in rows):
        raise ReplayError(
            "a jagged batch has one sequence in each row",
            expected="rows of at least one token",
            got=f"rows of shape {sorted({row.shape for row in rows})}",
        )
    return np.concatenate(rows)[None], tuple(map(len, rows))


def _without_holes(nested: Any) -> Any:
    """Refuse a jagged view: its values, which a model would be called with, hold more tokens than its rows."""
    if not nested.is_contiguous():
        raise ReplayError(
            "the jagged batch has holes",
            expected="a contiguous nested tensor",
            got=f"{type(nested).__name__} over values of which some are in no row",
            fix="Build it by torch.nested.nested_tensor([...], layout=torch.jagged), or pass cu_seqlens and a mask.",
        )
    return nested


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
    each sequence. Packed with padding between the sequences: `cu_seqlens` at which the padded ones begin
    (`cu_seqlens_q_padded`) and an `attention_mask` with one run of ones between each two. Neither: each row is one
    whole sequence.

    Raises:
        ReplayError: the arguments contradict each other or the batch.
    """
    shape = input_ids_BS.shape
    if input_ids_BS.ndim != 2:
        raise ReplayError("input_ids must be a batch", expected="shape [B, S]", got=f"shape {shape}")
    if not input_ids_BS.size:
        raise ReplayError("input_ids is empty", expected="at least one token", got=f"shape {shape}")
    positions_BS = None if position_ids is None else _positions(to_rows(position_ids)[0], shape)
    if cu_seqlens is not None:
        segments = _from_boundaries(to_numpy(cu_seqlens), input_ids_BS.size)
        if attention_mask is not None:
            segments = _from_mask(to_rows(attention_mask)[0], shape, segments)
    elif attention_mask is not None:
        whole = [Segment(row * shape[1], (row + 1) * shape[1]) for row in range(shape[0])]
        segments = _from_mask(to_rows(attention_mask)[0], shape, whole)
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


def _from_mask(mask_BS: np.ndarray, shape: tuple[int, ...], places: list[Segment]) -> list[Segment]:
    """The one run of ones in each place: a row, or what is between two boundaries."""
    if mask_BS.shape != shape or not np.isin(mask_BS, (0, 1)).all():
        raise ReplayError(
            "attention_mask does not fit input_ids",
            expected=f"shape {shape} of ones and zeros",
            got=f"shape {mask_BS.shape}, values up to {mask_BS.max(initial=0)}",
            fix="For packed batches pass cu_seqlens or position_ids.",
        )
    mask_N = mask_BS.astype(bool).reshape(-1)
    segments = []
    for row, place in enumerate(places):
        ones = np.flatnonzero(mask_N[place.start : place.stop])
        if not len(ones) or ones[-1] - ones[0] + 1 != len(ones):
            raise ReplayError(
                f"attention_mask row {row} is not one run of ones",
                expected="padding on the left or on the right only",
                got=f"{len(ones)} ones with holes" if len(ones) else "no token",
            )
        segments.append(Segment(place.start + int(ones[0]), place.start + int(ones[-1]) + 1))
    if mask_N.sum() != sum(map(len, segments)):
        raise ReplayError(
            "attention_mask has ones outside of all boundaries",
            expected=f"zeros from token {places[-1].stop} on",
            got=f"{int(mask_N[places[-1].stop :].sum())} ones",
        )
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
