"""GRPO with TRL and R3 on a CPU, in ten seconds: the rollout's routes replayed in training.

    python examples/grpo_trl.py [--steps 4]

TRL generates with transformers' continuous batching (packed prompts, paged attention) and trains on padded batches,
both in bfloat16, its default: two orders of the same sums, as an inference engine and a trainer have them. Against a
script of TRL one line is another, the import of GRPOTrainer. What is printed comes from the trainer's log, which TRL
sends to TensorBoard and W&B as well.

The reward is a toy: how many different words a completion has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from moetrace.errors import MoetraceError
from moetrace.trainers.trl import GRPOTrainer, ReplayConfig

ROOT = Path(__file__).resolve().parent.parent
TAU = 1.05
"""F(τ) is usually reported at τ = 2 for large models after long training; the tiny model needs a finer lens."""


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/tiny-qwen3-moe"))
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    prompts = (ROOT / "examples/prompts.txt").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
            reward_funcs=different_words,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            replay=ReplayConfig(compare_every=1, tau=TAU),
            args=GRPOConfig(
                folder,
                use_transformers_continuous_batching=True,
                transformers_continuous_batching_config={"num_blocks": 128, "max_batch_tokens": 256},
                per_device_train_batch_size=8,
                gradient_checkpointing=False,
                num_generations=4,
                max_completion_length=24,
                learning_rate=1e-5,
                max_steps=args.steps,
                logging_steps=1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    print_table([row for row in trainer.state.log_history if "r3/coverage" in row])
    return 0


def print_table(steps: list[dict[str, float]]) -> None:
    rows = [
        ("routers that differ", "router_mismatch", "{:.2%}"),
        ("tokens with any difference", "token_mismatch", "{:.2%}"),
        ("KL(rollout ‖ trainer), k3", "kl", "{:.2e}"),
        (f"extreme tokens, F({TAU})", "extreme_tokens", "{:.2%}"),
    ]
    print(f"\n{len(steps)} generations; {steps[0]['r3/coverage']:.0%} of the rows that training needs were captured")
    print(f"{'':30}{'without replay':>16}{'with replay':>16}")
    for title, key, form in rows:
        means = [sum(step[f"r3/{side}/{key}"] for step in steps) / len(steps) for side in ("without", "with")]
        print(f"{title:30}{form.format(means[0]):>16}{form.format(means[1]):>16}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MoetraceError, OSError) as error:
        sys.exit(f"grpo_trl.py: {error}")
