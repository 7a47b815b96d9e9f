"""The knobs of a GRPO experiment, in one place: they are written into its JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from model import Shape

VARIANTS = ("none", "R2", "R3")


@dataclass(frozen=True)
class Settings:
    """What all runs of one experiment share."""

    device: str
    rollout: str = "bfloat16"
    shape: Shape = field(default_factory=Shape)
    shortest: int = 6
    longest: int = 12
    # the warm start
    warm_batch: int = 512
    warm_lr: float = 1e-3
    warm_balance: float = 0.01
    warm_target: float = 0.25
    # GRPO
    prompts: int = 32
    samples: int = 8
    minibatches: int = 4
    epochs: int = 1
    lr: float = 5e-5
    clip: float = 0.2
    max_grad_norm: float = 1.0
    max_steps: int = 100_000

    @classmethod
    def smoke(cls, device: str, rollout: str) -> Settings:
        """Everything small enough for two CPU cores."""
        shape = Shape(layers=3, hidden=64, heads=2, experts=8, top_k=2, expert_width=32)
        return cls(device, rollout, shape, shortest=3, longest=5, warm_batch=256, warm_lr=3e-3, prompts=16, lr=1e-4)

    @property
    def sequences(self) -> int:
        """Of one rollout."""
        return self.prompts * self.samples

    @property
    def longest_answer(self) -> int:
        return self.longest + 1
