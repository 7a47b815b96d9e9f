"""Which tokens and layers of a batch one rank of a parallel plan has.

Every slice is a permutation of some tokens or a choice of layers, made on the CPU before the step. Slice in the order
of the plan: context parallel, then sequence parallel, then `sequence_first()` where the model's activations are
`[S, B, H]` (Megatron-Core), and layers whenever.

Axes: N tokens of the batch in memory order, B rows and S columns of it, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from moetrace.batch import to_numpy
from moetrace.errors import ReplayError
from moetrace.layout import MoeLayout
from moetrace.replayer.routes import AlignedRoutes

Kind = Literal["contiguous", "zigzag"]


def context_parallel(
    routes: AlignedRoutes, rank: int, size: int, kind: Kind = "contiguous", cu_seqlens: Any = None
) -> AlignedRoutes:
    """What one context-parallel rank has of a batch.

    Each row of the batch, or each sequence of a packed batch where `cu_seqlens` is given, is cut by itself.

    Args:
        routes: of the whole batch, in memory order.
        rank, size: of the context-parallel group.
        kind: "contiguous": `size` pieces, one for each rank (Ulysses, all-gather). "zigzag": `2 * size` pieces, rank r
            has pieces r and 2 * size - 1 - r, which balances causal attention: Megatron-Core's
            `get_batch_on_this_cp_rank`, TransformerEngine's `thd_get_partitioned_indices`, PyTorch's head-tail
            balancer.
        cu_seqlens: `[n + 1]` boundaries at which a packed batch is cut, from 0 to N; where sequences are padded to a
            multiple of the pieces these are the padded boundaries (`cu_seqlens_q_padded`).

    Raises:
        ReplayError: a row or sequence is no multiple of the number of pieces, or other arguments do not fit.
    """
    rows, columns = routes.require_batch()
    if cu_seqlens is None:
        bounds = [row * columns for row in range(rows + 1)]
    else:
        bounds, rows = to_numpy(cu_seqlens).tolist(), 1
        if not bounds or bounds[-1] != routes.num_tokens:
            raise ReplayError(
                "the boundaries to cut at do not end with the batch",
                expected=f"cu_seqlens from 0 to {routes.num_tokens}",
                got=bounds,
                fix="Pass the padded boundaries (cu_seqlens_q_padded).",
            )
    index_N = context_parallel_index(bounds, rank, size, kind)
    return routes.take(index_N, shape=(rows, len(index_N) // rows))


def context_parallel_index(bounds: Sequence[int], rank: int, size: int, kind: Kind = "contiguous") -> np.ndarray:
    """The tokens of one context-parallel rank, as int64 numbers in its order.

    Args:
        bounds: where rows or sequences begin and end, ascending from 0.
        rank, size, kind: see `context_parallel`.

    Raises:
        ReplayError: see `context_parallel`.
    """
    _require_rank(rank, size)
    if kind not in ("contiguous", "zigzag"):
        raise ReplayError("kind is unknown", expected="'contiguous' or 'zigzag'", got=repr(kind))
    if len(bounds) < 2 or bounds[0] != 0 or any(stop < start for start, stop in pairwise(bounds)):
        raise ReplayError("boundaries must ascend from 0", expected="0, ..., N", got=list(bounds))
    pieces, mine = (size, [rank]) if kind == "contiguous" else (2 * size, [rank, 2 * size - 1 - rank])
    parts = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        width = (stop - start) // pieces
        if width * pieces != stop - start:
            raise ReplayError(
                f"row or sequence {number} cannot be cut into {pieces} equal pieces ({kind}, {size} ranks)",
                expected=f"a multiple of {pieces} tokens",
                got=stop - start,
                fix="Pad every row, or every sequence of a packed batch, before the routes are aligned.",
            )
        parts += [np.arange(start + piece * width, start + (piece + 1) * width) for piece in mine]
    return np.concatenate(parts)


def sequence_parallel(routes: AlignedRoutes, rank: int, size: int) -> AlignedRoutes:
    """What one rank of a tensor-parallel group has where activations are split along the sequence.

    Columns `rank * S / size` to `(rank + 1) * S / size` of every row: what Megatron-Core's `sequence_parallel` and
    PyTorch's `SequenceParallel` scatter. A router that gets its input gathered again sees the whole batch: do not slice
    for it.

    Raises:
        ReplayError: S is no multiple of `size`, or other arguments do not fit.
    """
    return context_parallel(routes, rank, size)


def pipeline(routes: AlignedRoutes, layers: Iterable[int]) -> AlignedRoutes | None:
    """The routes of some decoder layers: those of a pipeline stage, or of one virtual stage of it.

    Args:
        routes: of any tokens.
        layers: absolute numbers of the stage's decoder layers from 0 on, dense ones included; see `pipeline_layers`.

    Returns:
        The routes with a `layout` of those layers, in ascending order; without a fingerprint, which is that of the
        whole model, unless all layers are there. None where the stage has dense layers only.

    Raises:
        ReplayError: no layer is named, or one twice.
    """
    wanted = list(layers)
    if not wanted or len(set(wanted)) != len(wanted):
        raise ReplayError("a stage has some layers, each once", expected="distinct layer numbers", got=wanted)
    chosen = [place for place, layer in enumerate(routes.layout.layers) if layer in set(wanted)]
    if not chosen:
        return None
    if len(chosen) == routes.layout.num_layers:
        return routes
    layout = routes.layout
    numbers = tuple(layout.layers[place] for place in chosen)
    return replace(
        routes,
        experts_LNK=routes.experts_LNK[chosen],
        layout=MoeLayout(numbers, layout.num_experts, layout.top_k),
        fingerprint="",
    )


def pipeline_layers(
    num_layers: int,
    rank: int,
    size: int,
    *,
    chunk: int = 0,
    chunks: int = 1,
    first: int | None = None,
    last: int | None = None,
) -> range:
    """The absolute decoder-layer numbers of a pipeline stage, as Megatron-Core splits a model.

    With several chunks (virtual stages, interleaved schedule) each rank has `chunks` runs of layers: first comes chunk
    0 of all ranks, then chunk 1 of all ranks, and so on. Where a model is split otherwise
    (`pipeline_model_parallel_layout`, embedding or loss counted as layers), name the layers to `pipeline` yourself.

    Args:
        num_layers: decoder layers of the whole model, dense ones included, without draft heads.
        rank, size: of the pipeline group.
        chunk, chunks: which virtual stage of how many.
        first, last: layers on the first and on the last rank (`num_layers_in_first_pipeline_stage`, ...`last`...)
            where they differ from the others.

    Raises:
        ReplayError: the layers cannot be split so.
    """
    _require_rank(rank, size)
    _require_rank(chunk, chunks, "chunk")
    layers_of = _layers_of_ranks(num_layers, size, first, last)
    if any(count < 0 or count % chunks for count in layers_of):
        raise ReplayError(
            f"the layers of a rank cannot be split into {chunks} chunks",
            expected=f"a multiple of {chunks} on every rank",
            got=layers_of,
        )
    per_chunk = [count // chunks for count in layers_of]
    start = chunk * sum(per_chunk) + sum(per_chunk[:rank])
    return range(start, start + per_chunk[rank])


def _layers_of_ranks(num_layers: int, size: int, first: int | None, last: int | None) -> list[int]:
    given = {place: count for place, count in ((0, first), (size - 1, last)) if count is not None}
    if size == 1 and given:
        raise ReplayError("one rank has all layers", expected="neither first nor last", got=f"{first}, {last}")
    rest, others = num_layers - sum(given.values()), size - len(given)
    if rest < 0 or (rest % others if others else rest):
        raise ReplayError(
            "the layers cannot be split evenly over the pipeline",
            expected=f"a multiple of {others} layers" if others else "no layer left",
            got=f"{rest} of {num_layers}",
        )
    return [given[place] if place in given else rest // others for place in range(size)]


def _require_rank(rank: int, size: int, what: str = "rank") -> None:
    if not 0 <= rank < size:
        raise ReplayError(f"there is no such {what}", expected=f"0 <= {what} < {size}", got=rank)
