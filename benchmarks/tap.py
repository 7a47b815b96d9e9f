"""What the tap costs: one forward (and backward) plain, under record, and under replay, alternating in one process.

    python benchmarks/tap.py [--device cpu] [--rounds 30] [--out benchmarks/results/tap-cpu.json]

Two models: the tiny checkpoint, and a Qwen3-MoE layer shape of the device's size (random weights). Medians over rounds;
the spread is the range of the middle half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from common import cpu_name, keep
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moetrace
import moetrace.replayer

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "cpu": {"hidden_size": 512, "num_hidden_layers": 8, "moe_intermediate_size": 128, "num_experts": 64},
    "cuda": {"hidden_size": 2048, "num_hidden_layers": 12, "moe_intermediate_size": 768, "num_experts": 128},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a batch of two sequences")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kind = torch.device(args.device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    shape = Qwen3MoeConfig(
        vocab_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts_per_tok=8,
        **SHAPES[kind],
    )
    with torch.device(args.device):
        models = {
            "tiny-qwen3-moe": AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-qwen3-moe", dtype=dtype),
            "qwen3-moe shape": AutoModelForCausalLM.from_config(shape, dtype=dtype),
        }
    results = {name: measure(model.to(args.device), args) for name, model in models.items()}
    facts = {
        "hardware": torch.cuda.get_device_name()
        if kind == "cuda"
        else f"{torch.get_num_threads()} threads, {cpu_name()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": str(dtype),
        "tokens": args.tokens,
        "rounds": args.rounds,
        "shape": SHAPES[kind],
        "results": results,
    }
    print(json.dumps(results, indent=1))
    keep(args.out, **facts)
    return 0


def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds and ratios to plain, for forward alone and for forward with backward."""
    ids_BS = torch.randint(0, 256, (2, args.tokens // 2))
    device_ids_BS = ids_BS.to(args.device)
    with torch.no_grad(), moetrace.record(model) as recording:
        model(input_ids=device_ids_BS, use_cache=False)
    routes = moetrace.replayer.align(recording.traces(ids_BS), ids_BS)
    contexts: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "record": lambda: moetrace.record(model),
        "replay": lambda: moetrace.replay(model, routes, on_shift="ignore"),
    }

    def forward(context: Callable[[], Any]) -> None:
        with torch.no_grad(), context():
            model(input_ids=device_ids_BS, use_cache=False)

    def train(context: Callable[[], Any]) -> None:
        with context():
            loss = model(input_ids=device_ids_BS, use_cache=False).logits.float().square().mean()
        loss.backward()
        model.zero_grad()

    results: dict[str, Any] = {}
    for title, step in (("forward", forward), ("forward and backward", train)):
        times: dict[str, list[float]] = {name: [] for name in contexts}
        for number in tqdm(range(args.rounds + 3), desc=title, leave=False):
            for name, context in contexts.items():
                began = time.perf_counter()
                step(context)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if number >= 3:  # the first are warm-up
                    times[name].append(1e3 * (time.perf_counter() - began))
        medians = {name: statistics.median(values) for name, values in times.items()}
        quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
        results[title] = {
            "median_ms": {name: round(value, 3) for name, value in medians.items()},
            "middle_half_ms": {name: [round(q[0], 3), round(q[2], 3)] for name, q in quartiles.items()},
            "ratio_to_plain": {name: round(value / medians["plain"], 4) for name, value in medians.items()},
        }
    return results


if __name__ == "__main__":
    sys.exit(main())
