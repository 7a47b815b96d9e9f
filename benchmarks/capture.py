"""What capture costs the embedded engine: nothing, a copy kernel per layer ("naive"), or ours.

    python benchmarks/capture.py step --layers 48        the decode step's GPU time, by CUDA graph replays
    python benchmarks/capture.py rounds --layers 12      rollout throughput end to end, and host time per step
    python benchmarks/capture.py rounds --device cpu     the same with the tiny model

Every part takes --out FILE.json. Variants alternate in one process; random bfloat16 weights of a Qwen3-30B-A3B shape
(fewer layers as asked; --experts 256 for DeepSeek-V3's number). Medians; the spread is the range of the middle half.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from common import cpu_name, graphs_captured, keep, large_shape, roll_out, timed, warm_up
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching import requests as cb_requests
from transformers.generation.continuous_batching import utils as cb_utils

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.engines.transformers import capture as captures
from moetrace.recorder import Staging
from moetrace.shadows import shadowed

ROOT = Path(__file__).resolve().parent.parent
PROFILED = 4
"""Waits are counted on lengths so many times shorter: the profiler takes longer than the rollout."""


class NaiveStaging(Staging):
    """What engines do today: let the router allocate its indices, and copy them, layer by layer."""

    def indices_out(self, site: Any, num_tokens: int) -> Any:
        return None

    def on_selection(self, selection: Any) -> None:
        self.ids_LNK[selection.site.index, : selection.indices_NK.shape[0]].copy_(selection.indices_NK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["step", "rounds"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256, help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--cached-prompts", action="store_true", help="the same ones in every round")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for each, on average")
    parser.add_argument("--spread", type=float, default=0.5, help="lengths are drawn from new * (1 -/+ spread)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="most tokens of one step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each variant, or hundreds of graph replays")
    parser.add_argument("--against", nargs="+", choices=["naive", "ours"], default=["naive", "ours"], help="of rounds")
    parser.add_argument("--one-at-a-time", action="store_true", help="one engine in memory: start anew for each round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = load(args)
    results = {"step": step, "rounds": rounds}[args.part](model, args)
    facts = {
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else cpu_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": model.config._attn_implementation,
        "shape": {name: getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size", "num_experts")},
        "results": results,
    }
    print(json.dumps(results, indent=1))
    keep(args.out, **facts)
    return 0


def load(args: argparse.Namespace) -> Any:
    """The tiny model on a CPU, random weights of the large shape on a GPU."""
    if args.device == "cpu":
        return AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-qwen3-moe").eval()
    width = 768 * 128 // args.experts
    config = large_shape(args.layers, num_experts=args.experts, moe_intermediate_size=width, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(args.device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="flash_attention_3"
        )
    return model.eval()


def start(model: Any, args: argparse.Namespace, variant: str) -> TransformersEngine:
    """An engine with room for exactly the work at hand."""
    knobs: dict[str, Any] = {
        "seed": 0,
        "enable_return_routed_experts": variant != "off",
        "max_running_requests": args.batch,
    }
    if args.device != "cpu":
        longest = args.prompt + round(args.new * (1 + args.spread)) + 1
        tokens = -(-longest // 256) * 256 * args.batch
        knobs |= {"kv_cache_tokens": tokens * 5 // 4, "max_batch_tokens": args.batch_tokens}
    with shadowed(captures, "Staging", NaiveStaging) if variant == "naive" else nullcontext():
        return TransformersEngine(model, EngineConfig(**knobs))


def step(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One decode step of `batch` requests as three CUDA graphs over the same memory, replayed in turn."""
    engine = start(model, args, "ours")
    processor, capture = engine._manager.batch_processor, engine._capture
    assert capture is not None
    runner, io, cache = processor.model_runner, processor.inputs_and_outputs, processor.cache
    naive = NaiveStaging(capture.layout, args.batch, engine._loop.device)
    engine._loop.pause()
    engine._loop.call(lambda: None).result(60)  # the thread has started, and frees no page of ours any more

    def build() -> dict[str, torch.cuda.CUDAGraph]:
        home = cb_requests if hasattr(cb_requests, "create_warmup_future_states") else cb_utils  # 5.18 moved it
        status = cb_requests.RequestStatus.DECODING
        states = home.create_warmup_future_states(args.batch, status, 1, args.prompt, cache)
        io.prepare_batch_tensors(states, runner.logit_processor, True, args.batch, 0, use_padding=True)
        data = io.get_model_kwargs(use_padding=True)
        data["logits_to_keep"] = data["logits_indices"]
        slots, ids = engine._loop.pages.slots_of(data), io.get_cb_kwargs()
        forward = runner._forward_process_and_sample
        variants: dict[str, tuple[AbstractContextManager[None], Callable[[], None]]] = {
            "off": (nullcontext(), lambda: None),
            "naive": (capture._tap.active(naive), lambda: capture._store.commit(naive, slots)),
            "ours": (capture.forwards(), lambda: capture.after_forward(slots)),
        }
        graphs = {}
        for name, (taps, commit) in variants.items():
            with taps:
                for _ in range(2):
                    with torch.cuda.stream(io.compute_stream), torch.no_grad():
                        forward(model, data, *ids)
                        commit()
                torch.cuda.synchronize()
                graphs[name] = torch.cuda.CUDAGraph()
                pool = {"pool": runner.graph_pool_id, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graphs[name], stream=io.compute_stream, **pool), torch.no_grad():
                    forward(model, data, *ids)
                    commit()
        return graphs

    graphs = build()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    launches: dict[str, list[float]] = {name: [] for name in graphs}
    for number in tqdm(range(args.rounds * 100 + 20), desc="replays", mininterval=2):
        for name, graph in graphs.items():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(io.compute_stream):
                began.record()
                launching = time.perf_counter()
                graph.replay()
                launched = time.perf_counter()
                ended.record()
            ended.synchronize()
            if number >= 20:
                times[name].append(began.elapsed_time(ended))
                launches[name].append(1e3 * (launched - launching))
    result = summary(times, unit="ms") | {
        "replays_of_each": args.rounds * 100,
        "kernels_per_step": {name: count_kernels(graph) for name, graph in graphs.items()},
        "host_ms_per_launch": {name: round(statistics.median(some), 4) for name, some in launches.items()},
    }
    del graphs
    engine.close()
    return result


def count_kernels(graph: torch.cuda.CUDAGraph) -> int:
    """GPU kernels and copies of one replay, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def rounds(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Throughput of whole rollouts, alternating; host time of a step; synchronisations a step."""
    draw = random.Random(0)
    lengths = [round(args.new * (1 + args.spread * draw.uniform(-1, 1))) for _ in range(args.batch)]
    variants = ["off", *args.against]
    seeds = {name: count() for name in variants}
    tokens_per_s: dict[str, list[float]] = {name: [] for name in variants}
    step_ms: dict[str, list[float]] = {name: [] for name in variants}
    tail_ms: dict[str, list[float]] = {name: [] for name in variants}
    graphs = dict.fromkeys(variants, 0)
    host_ms: dict[str, dict[str, float]] = {}
    synchronisations: dict[str, dict[str, float]] = {}

    def rollout(engine: TransformersEngine, name: str, part: int = 1) -> float:
        samplings = [SamplingParams(max(length // part, 1), do_sample=True, ignore_eos=True) for length in lengths]
        seed = 0 if args.cached_prompts else next(seeds[name])  # a prompt seen before is not computed again
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt), generator=generator).tolist()
        began = time.perf_counter()
        roll_out(engine, prompts, samplings, name != "off")
        return sum(lengths) / (time.perf_counter() - began)

    engines = {} if args.one_at_a_time else {name: start(model, args, name) for name in variants}
    for number in tqdm(range(args.rounds + 2), desc="rounds", mininterval=2):
        for name in variants:
            engine = engines.get(name) or start(model, args, name)
            if args.one_at_a_time or not number:
                warm_up(engine, partial(rollout, engine, name))
            if 1 <= number <= args.rounds:
                with ends_of_steps(engine) as ends, graphs_captured(engine) as captured:
                    tokens_per_s[name].append(rollout(engine, name))
                graphs[name] += len(captured)
                tail_ms[name].append(1e3 * (time.perf_counter() - ends[-1]))
                step_ms[name] += [1e3 * (after - before) for before, after in pairwise(ends)]
            if number == args.rounds:
                host_ms[name] = time_host(engine, partial(rollout, engine, name))
            if number > args.rounds and args.device != "cpu":  # last: after the profiler every launch takes longer
                synchronisations[name] = count_synchronisations(engine, partial(rollout, engine, name, PROFILED))
            if args.one_at_a_time:
                engine.close()
                del engine
                gc.collect()
                torch.cuda.empty_cache()
    for engine in engines.values():
        engine.close()
    return summary(tokens_per_s, unit="tokens/s") | {
        "rounds_of_each": args.rounds,
        "graphs_captured": graphs,
        "work": {"requests": args.batch, "prompt": args.prompt, "new": [min(lengths), max(lengths)]},
        "step_ms": {name: shares(some) for name, some in step_ms.items()},
        "ms_after_last_step": {name: round(statistics.median(some), 3) for name, some in tail_ms.items()},
        "host_ms_per_step": host_ms,
        "synchronisations_per_step": synchronisations,
    }


@contextmanager
def ends_of_steps(engine: TransformersEngine) -> Iterator[list[float]]:
    """When the host was done with the results of each step, by `time.perf_counter`."""
    processor, ends = engine._manager.batch_processor, list[float]()
    own = processor.update_batch

    def update_batch() -> None:
        own()
        ends.append(time.perf_counter())

    with shadowed(processor, "update_batch", update_batch):
        yield ends


def shares(step_ms: list[float]) -> dict[str, float]:
    """Quantiles, and what the steps longer than twice the median take of the whole time."""
    centiles, most = statistics.quantiles(step_ms, n=100), 2 * statistics.median(step_ms)
    long = sum(ms for ms in step_ms if ms > most) / sum(step_ms)
    return {f"p{p}": round(centiles[p - 1], 3) for p in (10, 50, 90, 99)} | {"share of long ones": round(long, 4)}


def time_host(engine: TransformersEngine, rollout: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of the parts of a step on the generation thread; waiting for the device apart."""
    processor = engine._manager.batch_processor
    parts = {
        "prepare": (processor, "prepare_next_batch"),
        "launch": (processor, "_generation_step"),
        "update, with wait": (processor, "update_batch"),
        "wait": (processor.inputs_and_outputs, "prepare_batch_update"),
    }
    with timed(parts) as times:
        rollout()
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def count_synchronisations(engine: TransformersEngine, rollout: Callable[[], Any]) -> dict[str, float]:
    """Calls that make the host wait for the device (stream, event, device), per step: on the thread that launches the
    steps, and on all threads."""
    steps = 0
    processor = engine._manager.batch_processor
    own = processor._generation_step

    def launch(model: Any) -> None:
        nonlocal steps
        steps += 1
        own(model)

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with shadowed(processor, "_generation_step", launch), torch.profiler.profile(activities=activities) as profile:
        rollout()
    events = [event for event in profile.events() if event.name.startswith("cuda")]
    launching = {event.device_resource_id for event in events if "GraphLaunch" in event.name}  # of a call: its thread
    waits = [event.device_resource_id for event in events if "Synchronize" in event.name]
    on_step_path = sum(thread in launching for thread in waits)
    return {"steps": round(on_step_path / steps, 3), "all": round(len(waits) / steps, 3)}


def summary(values: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """Medians, the middle half, and `off` against each variant as a ratio <= 1 where the variant costs something."""
    medians = {name: statistics.median(some) for name, some in values.items()}
    slower_is_more = unit == "ms"
    return {
        f"median_{unit}": {name: round(value, 4) for name, value in medians.items()},
        "middle_half": {
            name: [round(q, 4) for q in statistics.quantiles(some, n=4)[::2]] if len(some) > 1 else some
            for name, some in values.items()
        },
        "ratio": {
            name: round(medians["off"] / value if slower_is_more else value / medians["off"], 5)
            for name, value in medians.items()
        },
        "paired_ratio_median": {
            name: round(
                statistics.median(a / b if slower_is_more else b / a for a, b in zip(values["off"], some, strict=True)),
                5,
            )
            for name, some in values.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
