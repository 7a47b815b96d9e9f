"""The trainer of the demo: replay a saved rollout in another process, with other numerics than the engine's.

    python examples/trainer.py --model models/tiny-qwen3-moe --rollout demo-output

Axes: B sequences and S columns of a right-padded batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import moetrace
from moetrace import RoutingComparison, RoutingTrace
from moetrace.errors import MoetraceError

TAU = 1.05
"""F(τ) is usually reported at τ = 2 for large models after long training; the tiny model needs a finer lens."""


@dataclass
class Batch:
    """Right-padded sequences, and which of their tokens were sampled."""

    traces: list[RoutingTrace]
    input_ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    sampled_BS: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor


@dataclass
class Pass:
    """What one pass over the rollout measured."""

    routing: RoutingComparison = field(default_factory=RoutingComparison)
    rollout: list[torch.Tensor] = field(default_factory=list)
    trainer: list[torch.Tensor] = field(default_factory=list)
    router_gradient_norm: float = 0.0

    def summary(self) -> dict[str, float]:
        rollout, trainer = torch.cat(self.rollout).numpy(), torch.cat(self.trainer).numpy()
        return {
            "routers_that_differ": self.routing.router_mismatch,
            "tokens_with_any_difference": self.routing.token_mismatch,
            "kl_k3": moetrace.kl_k3(rollout, trainer),
            "extreme_token_ratio": moetrace.extreme_token_ratio(rollout, trainer, TAU),
            "router_gradient_norm": self.router_gradient_norm,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rollout", type=Path, required=True, help="folder that examples/demo.py wrote")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    if not (args.rollout / "traces.safetensors").is_file():
        parser.error(f"--rollout: there is no {args.rollout / 'traces.safetensors'}; run examples/demo.py first")
    transformers.utils.logging.disable_progress_bar()
    traces = moetrace.load_file(args.rollout / "traces.safetensors")
    rollout = json.loads((args.rollout / "rollout.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = list(batches_of(traces, rollout, args.batch_size))

    without = run_pass(model, batches, replaying=False)
    optimizer.zero_grad()
    with_replay = run_pass(model, batches, replaying=True)
    optimizer.step()

    summary = {
        "sequences": len(traces),
        "rows": sum(trace.num_rows for trace in traces),
        "rows_missing": sum(trace.num_rows - trace.num_valid for trace in traces),
        "tau": TAU,
        "without_replay": without.summary(),
        "with_replay": with_replay.summary(),
    }
    (args.rollout / "summary.json").write_text(json.dumps(summary, indent=1))
    print_table(summary)
    return 0


def batches_of(traces: list[RoutingTrace], rollout: list[dict], size: int) -> Iterator[Batch]:
    """Right-padded batches; the reward, a toy, is how many different words a sample has."""
    rewards = np.array([len(set(sample["text"].split())) for sample in rollout], dtype=np.float32)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    for first in range(0, len(traces), size):
        chosen = range(first, min(first + size, len(traces)))
        tokens = [torch.tensor(np.array(traces[i].tokens)) for i in chosen]
        longest = max(map(len, tokens))
        mask_BS = torch.stack([torch.arange(longest) < len(ids) for ids in tokens])
        prompts_B1 = torch.tensor([[rollout[i]["prompt_tokens"]] for i in chosen])
        yield Batch(
            traces=[traces[i] for i in chosen],
            input_ids_BS=torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            mask_BS=mask_BS,
            sampled_BS=mask_BS & (torch.arange(longest) >= prompts_B1),
            rollout_logprobs=torch.tensor([logprob for i in chosen for logprob in rollout[i]["logprobs"]]),
            advantages=torch.tensor([advantages[i] for i in chosen for _ in rollout[i]["logprobs"]]),
        )


def run_pass(model: torch.nn.Module, batches: list[Batch], *, replaying: bool) -> Pass:
    """Forward and backward over the rollout; gradients are left in the model."""
    measured = Pass()
    total = sum(len(batch.rollout_logprobs) for batch in batches)
    for batch in tqdm(batches, desc=f"[3/3] training {'with' if replaying else 'without'} replay", unit="batch"):
        inputs = {"input_ids": batch.input_ids_BS, "attention_mask": batch.mask_BS.long()}
        routed: AbstractContextManager = moetrace.replay(model, batch.traces, **inputs) if replaying else nullcontext()
        with moetrace.record(model) as recording, routed:
            logits = model(**inputs, use_cache=False).logits
        for trace, used in zip(batch.traces, recording.traces(**inputs), strict=True):
            measured.routing += moetrace.compare(trace, used)
        # The distribution of token t comes from the logits at t - 1.
        logprobs_BS = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids_BS[:, 1:, None]).squeeze(2)
        logprobs = logprobs_BS[batch.sampled_BS[:, 1:]]
        ratio = (logprobs - batch.rollout_logprobs).exp()
        (-(ratio * batch.advantages).sum() / total).backward()
        measured.rollout.append(batch.rollout_logprobs)
        measured.trainer.append(logprobs.detach())
    routers = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]
    measured.router_gradient_norm = float(torch.stack([grad.norm() for grad in routers if grad is not None]).norm())
    return measured


def print_table(summary: dict) -> None:
    rows = [
        ("routers that differ", "routers_that_differ", "{:.2%}"),
        ("tokens with any difference", "tokens_with_any_difference", "{:.2%}"),
        ("KL(rollout ‖ trainer), k3", "kl_k3", "{:.2e}"),
        (f"extreme tokens, F({summary['tau']})", "extreme_token_ratio", "{:.2%}"),
        ("router gradient norm", "router_gradient_norm", "{:.4f}"),
    ]
    print(f"\n{summary['sequences']} sequences, {summary['rows']} rows, {summary['rows_missing']} missing")
    print(f"{'':30}{'without replay':>16}{'with replay':>16}")
    for title, key, form in rows:
        values = [form.format(summary[side][key]) for side in ("without_replay", "with_replay")]
        print(f"{title:30}{values[0]:>16}{values[1]:>16}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MoetraceError, OSError) as error:
        sys.exit(f"trainer.py: {error}")
