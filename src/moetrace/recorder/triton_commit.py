"""The commit kernel. Imported on CUDA only.

One program writes one token's row: read as L runs of K int64, written as one run of L * K bytes (or pairs of bytes).
It looks at the ids on their way, and leaves `NO_EXPERT` where they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from moetrace.recorder.commit import NO_TOKEN
from moetrace.recorder.staging import NO_EXPERT

if TYPE_CHECKING:
    from moetrace.recorder.commit import StepSlots
    from moetrace.recorder.rows import RowStore

_MAX_BLOCK = 1024
_NO_EXPERT = tl.constexpr(NO_EXPERT)
_NO_TOKEN = tl.constexpr(NO_TOKEN)


@triton.jit
def _commit(  # type: ignore[no-untyped-def]  # Triton reads annotations
    ids,
    rows,
    marks,
    tokens,
    version,
    places,
    positions,
    num_slots,
    num_experts,
    layer_stride,
    table_width,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    BY_TABLE: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if BY_TABLE:
        position = tl.load(positions + n).to(tl.int64)
        place = tl.load(places + n * table_width + position // PAGE).to(tl.int64)
        offset = position % PAGE
    else:
        place = tl.load(places + n).to(tl.int64)
        offset = place % STRIDE
    slot = place // STRIDE * PAGE + offset
    kept = (place >= 0) & (slot < num_slots)  # padding has no place, or one that nobody reads
    wrong = tl.full((), 0, tl.int32)
    for first in tl.static_range(0, ROW, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        route = ids + (lane // K).to(tl.int64) * layer_stride + n * K
        value = tl.load(route + lane % K, mask=lane < ROW, other=0)
        is_wrong = (value < 0) | (value >= num_experts)
        for by in tl.static_range(1, K // 2 + 1):  # with the others of its layer, in a circle
            is_wrong |= value == tl.load(route + (lane + by) % K, mask=lane < ROW, other=-1)
        wrong = tl.maximum(wrong, tl.max((is_wrong & (lane < ROW)).to(tl.int32)))
        tl.store(rows + slot * ROW + lane, value.to(rows.dtype.element_ty), mask=(lane < ROW) & kept)
    tl.debug_barrier()  # an id is read by several threads: all of them before one writes
    for first in tl.static_range(0, ROW, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        source = ids + (lane // K).to(tl.int64) * layer_stride + n * K + lane % K
        tl.store(source, tl.full((BLOCK,), _NO_EXPERT, tl.int64), mask=lane < ROW)
    token = tl.where(wrong > 0, _NO_TOKEN, tl.load(tokens + n).to(tl.int32))
    tl.store(marks + slot * 2, token, mask=kept)
    tl.store(marks + slot * 2 + 1, tl.load(version), mask=kept)


def launch(ids_LNK: torch.Tensor, step: StepSlots, store: RowStore) -> None:
    """Run the kernel on the current stream; arguments as for `commit_rows`. It can be captured in a CUDA graph."""
    by_table = step.write_index_N is None
    places = step.block_table_RB if by_table else step.write_index_N
    assert places is not None
    row = store.rows_SR.shape[1]
    _commit[(len(step.tokens_N),)](
        ids_LNK,
        store.rows_SR,
        store.marks_S2,
        step.tokens_N,
        store.version_1,
        places,
        step.positions_N if by_table else step.tokens_N,
        len(store.rows_SR),
        store.layout.num_experts,
        ids_LNK.stride(0),
        places.stride(0),
        PAGE=store.page_size,
        STRIDE=step.stride,
        BY_TABLE=by_table,
        K=ids_LNK.shape[2],
        ROW=row,
        BLOCK=min(triton.next_power_of_2(row), _MAX_BLOCK),
        num_warps=4,
    )
