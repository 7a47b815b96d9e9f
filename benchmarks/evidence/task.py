"""The task: sort digits. `7 0 7 3 =` is answered by `0 3 7 7 END`; the reward is 1 for the whole answer, else 0.

Axes: B sequences, S columns of a batch padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SEPARATOR, END, PAD = 10, 11, 12
VOCABULARY = 16


def make_prompts(count: int, shortest: int, longest: int, *entropy: int) -> list[list[int]]:
    """`count` prompts of random digits, the same for the same `entropy` numbers."""
    rng = np.random.default_rng(entropy)
    lengths = rng.integers(shortest, longest + 1, count)
    return [[*rng.integers(0, 10, length).tolist(), SEPARATOR] for length in lengths]


def answer(prompt: Sequence[int]) -> list[int]:
    """The one right answer."""
    return [*sorted(prompt[:-1]), END]


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, on the CPU.

    Attributes:
        ids_BS, mask_BS: int64 tokens, and 1 where there is one.
        answer_BS: float32, 1 where token s + 1 belongs to the answer: what the logits of column s are judged by.
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    answer_BS: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Batch:
        shape = (len(prompts), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
        ids_BS, mask_BS, answer_BS = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids_BS[row, : len(p) + len(a)] = torch.tensor([*p, *a])
            mask_BS[row, : len(p) + len(a)] = 1
            answer_BS[row, len(p) - 1 : len(p) + len(a) - 1] = 1
        return cls(ids_BS, mask_BS, answer_BS)

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the sequences, no wider than they need."""
        width = int(self.mask_BS[rows].sum(1).max())
        return Batch(self.ids_BS[rows, :width], self.mask_BS[rows, :width], self.answer_BS[rows, :width])
