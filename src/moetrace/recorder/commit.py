"""The commit: one kernel that narrows a step's ids and scatters them to their tokens' slots; and its torch twin.

Axes: L MoE layers, N tokens of a step, K experts per token, R requests of a step, B entries of a block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moetrace.recorder.staging import NO_EXPERT

if TYPE_CHECKING:
    from moetrace.recorder.rows import RowStore


NO_TOKEN = -1
"""Of a slot that holds no row."""


@dataclass(frozen=True)
class StepSlots:
    """Where an engine puts the tokens of one step: by write index, or by block table and position.

    Attributes:
        tokens_N: integer token ids that were computed.
        stride: by how much an index or an entry grows from one page to the next.
        write_index_N: int64, the engine's index of each token's key; of a page's indices the first `page_size` are
            tokens. None where the engine writes by block table.
        block_table_RB: int32, the pages of each request, in a step with one token a request; < 0 is padding.
        positions_N: integer positions of the tokens in their sequences; used with the table.
    """

    tokens_N: torch.Tensor
    stride: int
    write_index_N: torch.Tensor | None = None
    block_table_RB: torch.Tensor | None = None
    positions_N: torch.Tensor | None = None

    def slots(self, page_size: int) -> torch.Tensor:
        """`[N]` int64 slots; < 0 where a token is padding."""
        if self.write_index_N is not None:
            entries_N, offsets_N = self.write_index_N // self.stride, self.write_index_N % self.stride
        else:
            assert self.block_table_RB is not None
            assert self.positions_N is not None
            positions_N = self.positions_N.long()
            table_NB = self.block_table_RB[: len(positions_N)]
            entries_N = table_NB.gather(1, (positions_N // page_size)[:, None]).squeeze(1).long() // self.stride
            offsets_N = positions_N % page_size
        return torch.where(entries_N < 0, -1, entries_N * page_size + offsets_N)


def commit_rows(ids_LNK: torch.Tensor, step: StepSlots, store: RowStore) -> None:
    """For every token n with a slot, write the row `ids_LNK[:, n]` and its mark (token, version) into that slot.

    A row in which an id is missing, out of range or twice in a layer is no row: its token in the mark is `NO_TOKEN`.

    Args:
        ids_LNK: int64, with room for the step's N tokens or more; those of the step are `NO_EXPERT` afterwards.
        step: N tokens and where they belong.
        store: changed in place.
    """
    if ids_LNK.is_cuda:
        from moetrace.recorder.triton_commit import launch

        launch(ids_LNK, step, store)
    else:
        commit_rows_twin(ids_LNK, step, store)


def commit_rows_twin(ids_LNK: torch.Tensor, step: StepSlots, store: RowStore) -> None:
    """What the kernel does, in torch: for CPUs, and to hold the kernel to."""
    slots_N = step.slots(store.page_size)
    kept_M = ((slots_N >= 0) & (slots_N < len(store.rows_SR))).nonzero().squeeze(1)
    ids_NLK = ids_LNK[:, : len(slots_N)].transpose(0, 1)
    sorted_NLK = ids_NLK.sort(-1).values
    wrong_N = ((ids_NLK < 0) | (ids_NLK >= store.layout.num_experts)).any(-1).any(-1)
    wrong_N |= (sorted_NLK[..., 1:] == sorted_NLK[..., :-1]).any(-1).any(-1)
    ids_NR, tokens_N = ids_NLK.flatten(1), torch.where(wrong_N, NO_TOKEN, step.tokens_N.int())
    marks_N2 = torch.stack([tokens_N, store.version_1.expand(len(slots_N))], 1)
    store.rows_SR.index_copy_(0, slots_N[kept_M], ids_NR.to(store.rows_SR.dtype)[kept_M])
    store.marks_S2.index_copy_(0, slots_N[kept_M], marks_N2[kept_M])
    ids_LNK[:, : len(slots_N)] = NO_EXPERT
