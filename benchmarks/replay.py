"""What replay costs a training step: forward, backward and optimiser, plain, under record, and under replay.

    python benchmarks/replay.py --layers 4 --tokens 16384
    python benchmarks/replay.py --device cpu        the same with the tiny model

Add --out FILE.json. On a GPU: random bfloat16 weights of Qwen3-30B-A3B's layers (as many as asked), activation
checkpointing, AdamW. Routes are the model's own record, with a share replaced by others as a rollout's differ; with
`--differing 0` the experts get the load that they have without replay, and what is left is replay's own cost. Replay
begins with traces, so that alignment and upload are in the step. Variants alternate in one process, in an order that
changes from round to round. Medians; the spread is the range of the middle half.

`replay` has the shift alarm, as by default: counted on the device behind the forward, judged by the host when it has
queued the backward. If the device has not finished the forward by then, the host waits for that, with a backward's
work still queued. `replay, no alarm` has on_shift="ignore". Waits are counted by the profiler, and by
torch.cuda.set_sync_debug_mode, which also sees copies that wait, but no wait for an event.

Axes: L MoE layers, T rows of a trace, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import cpu_name, keep, large_shape, timed
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import moetrace
from moetrace.replayer import monitor as monitors
from moetrace.replayer import session as sessions
from moetrace.replayer.alarm import ShiftAlarm
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.replayer.upload import RoutesUpload
from moetrace.routers import ModelTap

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="tokens of a step; 16384 on a GPU, 512 on a CPU")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of a step")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each variant")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd needs no state in memory")
    parser.add_argument(
        "--differing",
        type=float,
        default=0.1,
        help="share of routers whose recorded set differs from the live one (arXiv 2510.11370 measures about 10 %%)",
    )
    parser.add_argument("--parts", action="store_true", help="also where the host's time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.tokens = args.tokens or (16384 if on_gpu(args) else 512)
    model = load(args)
    results = measure(model, args)
    facts = {
        "hardware": torch.cuda.get_device_name() if on_gpu(args) else cpu_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
        "shape": {
            name: getattr(model.config, name)
            for name in ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok")
        },
        "tokens": args.tokens,
        "differing": args.differing,
        "rounds": args.rounds,
        "results": results,
    }
    print(json.dumps(results, indent=1))
    keep(args.out, **facts)
    return 0


def on_gpu(args: argparse.Namespace) -> bool:
    return torch.device(args.device).type == "cuda"


def load(args: argparse.Namespace) -> Any:
    """The tiny model on a CPU, random weights of the large shape on a GPU; with activation checkpointing."""
    torch.manual_seed(0)
    if not on_gpu(args):
        model: Any = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-qwen3-moe", dtype=torch.float32)
    else:
        config = large_shape(args.layers, vocab_size=32768)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=args.attention, experts_implementation="grouped_mm"
            )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step, tokens a second, peak memory and waits, for each variant."""
    shape, generator = (args.sequences, args.tokens // args.sequences), torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids_BS.to(args.device), "use_cache": False}
    traces = routes_of(model, ids_BS, inputs, args.differing)
    contexts: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "record": lambda: moetrace.record(model),
        "replay": lambda: moetrace.replay(model, traces, input_ids=ids_BS),
        "replay, no alarm": lambda: moetrace.replay(model, traces, input_ids=ids_BS, on_shift="ignore"),
    }
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = kind(model.parameters(), lr=1e-6, fused=True)  # type: ignore[call-arg]

    def step(context: Callable[[], Any]) -> None:
        with context():
            hidden = model.get_decoder()(**inputs).last_hidden_state
        loss = hidden.float().square().mean()  # no logits: a head is not what is measured
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {name: [] for name in contexts}
    host: dict[str, list[float]] = {name: [] for name in contexts}
    peaks: dict[str, int] = dict.fromkeys(contexts, 0)
    names = list(contexts)
    for number in tqdm(range(args.rounds + WARM_UP), desc="rounds", mininterval=2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wait(args, reset_peak=True)
            began = time.perf_counter()
            step(contexts[name])
            queued = time.perf_counter()
            wait(args)
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))
                host[name].append(1e3 * (queued - began))
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() if on_gpu(args) else 0)
    results = summary(times) | {
        "tokens_per_s": {name: round(1e3 * args.tokens / statistics.median(values)) for name, values in times.items()},
        "host_ms": {name: round(statistics.median(values), 2) for name, values in host.items()},
    }
    steps = {name: partial(step, context) for name, context in contexts.items()}
    if on_gpu(args):
        results["peak_MiB"] = {name: round(peak / 2**20, 1) for name, peak in peaks.items()}
        results["waits_per_step"] = {name: count_waits(run) for name, run in steps.items()}
        results["gpu_per_step"] = {name: count_kernels(run) for name, run in steps.items()}
    if args.parts:
        results["replay_parts_host_ms"] = parts(steps["replay"])
    return results


def routes_of(model: Any, ids_BS: torch.Tensor, inputs: dict[str, Any], differing: float) -> list[Any]:
    """The model's own routes, T = tokens - 1 rows each, with a share of them altered by one expert."""
    with torch.no_grad(), moetrace.record(model) as recording:
        model.get_decoder()(**inputs)
    generator = np.random.default_rng(0)
    traces = []
    for trace in recording.traces(ids_BS):
        trace = trace.slice(0, trace.num_tokens - 1)
        ids_TLK = trace.experts_TLK.astype(np.int64)
        present = np.zeros((*ids_TLK.shape[:2], trace.layout.num_experts), bool)
        np.put_along_axis(present, ids_TLK, True, axis=-1)
        absent_TL = np.where(present, -1.0, generator.random(present.shape)).argmax(-1)
        differs_TL = generator.random(absent_TL.shape) < differing
        ids_TLK[..., -1] = np.where(differs_TL, absent_TL, ids_TLK[..., -1])
        traces.append(moetrace.RoutingTrace.build(ids_TLK, trace.layout, trace.tokens, fingerprint=trace.fingerprint))
    return traces


def wait(args: argparse.Namespace, reset_peak: bool = False) -> None:
    if on_gpu(args):
        torch.cuda.synchronize()
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()


def count_waits(step: Callable[[], None]) -> dict[str, int]:
    """How often the host waits for the device in one step: calls of CUDA, and what torch itself warns of."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        step()
    calls = [event for event in profile.key_averages() if event.key.startswith("cuda") and "Synchronize" in event.key]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    warned = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    torch.cuda.synchronize()
    return {"profiler": sum(event.count for event in calls), "sync_debug_mode": warned}


def count_kernels(step: Callable[[], None]) -> dict[str, float]:
    """Kernels and copies of one step, and the device's milliseconds in them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return {
        "kernels": sum(event.count for event in events),
        "ms": round(sum(event.device_time_total for event in events) / 1e3, 2),
    }


def parts(step: Callable[[], None]) -> dict[str, float]:
    """Host milliseconds in each part of a replay, in one step: the last of three."""
    watched = {
        "align": (sessions, "align"),
        "find the taps": (sessions, "tap_model"),
        "prepare them": (ModelTap, "_prepare"),
        "upload": (RoutesUpload, "on"),
        "select": (sessions.ReplaySession, "on_selection"),
        "count": (OverlapMonitor, "_count"),
        "send the counts": (monitors, "_to_host"),
        "judge them": (ShiftAlarm, "judge"),
    }
    with timed(watched) as times:
        for _ in range(3):
            for values in times.values():
                values.clear()
            step()
    return {name: round(sum(values), 3) for name, values in times.items() if values}


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, the middle half, and each variant against plain: of medians, and the median of the rounds' own."""
    medians = {name: statistics.median(some) for name, some in times.items()}
    ratios = {name: [a / b for a, b in zip(some, times["plain"], strict=True)] for name, some in times.items()}
    return {
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "middle_half_ms": {name: middle_half(some, 2) for name, some in times.items()},
        "ratio_to_plain": {name: round(value / medians["plain"], 4) for name, value in medians.items()},
        "paired_ratio": {name: round(statistics.median(some), 4) for name, some in ratios.items()},
        "paired_ratio_middle_half": {name: middle_half(some, 4) for name, some in ratios.items()},
    }


def middle_half(values: list[float], digits: int) -> list[float]:
    return [round(q, digits) for q in statistics.quantiles(values, n=4)[::2]]


if __name__ == "__main__":
    sys.exit(main())
