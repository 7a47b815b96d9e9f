"""vLLM and the embedded engine side by side, each with and without routed experts, on the same work.

    python benchmarks/engines.py --out benchmarks/results/engines.json

Random bfloat16 weights of a Qwen3-30B-A3B shape with few layers, 256 requests of 64 + 128 tokens at once, greedy, no
end-of-sequence. Each engine runs in a process of its own, one after the other, and has the GPU to itself; the embedded
one alternates between capture off and on, vLLM starts anew for each, since that is a flag of its start. Medians.
--attention says what the embedded engine attends with; vLLM has FlashAttention 3 of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common import keep, large_shape, roll_out, warm_up

ENGINES = ("embedded", "vllm off", "vllm on")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=10, help="of each, after some to warm up")
    parser.add_argument("--attention", default="sdpa", help="of the embedded engine (%(default)s)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one engine (%(default)g)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(embedded(args) if args.only == "embedded" else vllm(args, args.only == "vllm on")))
        return 0
    results: dict[str, Any] = {}
    for name in ENGINES:
        results |= in_a_process(name, args.timeout)
        print(json.dumps(results, indent=1), flush=True)
        keep(
            args.out,
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm")},
            shape={"layers": args.layers, "experts": 128, "top_k": 8, "hidden_size": 2048},
            work={"requests": args.requests, "prompt": args.prompt, "new": args.new},
            results=results,
        )
    return int(any("error" in result for result in results.values()))


def in_a_process(name: str, timeout: float) -> dict[str, Any]:
    """What one engine measures, or why it does not. Nothing of it is left: vLLM computes in a child of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {name: {"error": f"no result in {timeout:g} s"}}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        return {name: {"error": f"ended with {process.returncode}"}}
    return json.loads(printed.splitlines()[-1])


def config_of(args: argparse.Namespace) -> Any:
    """The shape."""
    return large_shape(args.layers, eos_token_id=None, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16")


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """The same random tokens for every engine."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 151936, (args.requests, args.prompt), generator=generator).tolist()


def timed(rollout: Callable[[], Any], args: argparse.Namespace) -> list[float]:
    """Tokens per second of each round."""
    rates = []
    for _ in range(3):  # warm-up: in a first run, one round of it left vLLM's rounds apart by a factor of three
        rollout()
    for _ in range(args.rounds):
        began = time.perf_counter()
        rollout()
        rates.append(args.requests * args.new / (time.perf_counter() - began))
    return rates


def summary(rates: list[float], **facts: Any) -> dict[str, Any]:
    """The median, the range, and all in their order."""
    every = [round(rate, 1) for rate in rates]
    return {
        "median_tokens_per_s": statistics.median(every),
        "range": [min(every), max(every)],
        "rounds": every,
        **facts,
    }


def vllm(args: argparse.Namespace, routes: bool) -> dict[str, Any]:
    """vLLM's rate. No prefix is cached, so that every round computes its prompts."""
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    with tempfile.TemporaryDirectory() as folder:
        config_of(args).save_pretrained(folder)
        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_return_routed_experts=routes,
            enable_prefix_caching=False,
            max_num_seqs=args.requests,
            max_num_batched_tokens=8192,
            max_model_len=4096,
            max_cudagraph_capture_size=args.requests,
            gpu_memory_utilization=0.8,
        )
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts_of(args)]
        sampling = SamplingParams(max_tokens=args.new, temperature=0, ignore_eos=True, detokenize=False)

        def rollout() -> None:
            results = engine.generate(prompts, sampling, use_tqdm=False)
            outputs = [result.outputs[0] for result in results]
            assert all(len(output.token_ids) == args.new for output in outputs)
            if routes:
                assert all(len(output.routed_experts) == args.prompt + args.new - 1 for output in outputs)

        rates = timed(rollout, args)
    name = f"vllm {'on' if routes else 'off'}"
    return {name: summary(rates, hardware=torch.cuda.get_device_name(), attention="vLLM's own choice")}


def embedded(args: argparse.Namespace) -> dict[str, Any]:
    """The embedded engine's rates, off and on in turn, over one model."""
    import torch
    from transformers import AutoModelForCausalLM

    from moetrace.engines.config import EngineConfig
    from moetrace.engines.requests import SamplingParams
    from moetrace.engines.transformers import TransformersEngine

    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            config_of(args), dtype=torch.bfloat16, attn_implementation=args.attention
        )
    tokens = -(-(args.prompt + args.new) // 256) * 256 * args.requests * 5 // 4
    prompts, sampling = prompts_of(args), SamplingParams(args.new, do_sample=False, ignore_eos=True)
    rates: dict[str, list[float]] = {"off": [], "on": []}
    engines = {
        name: TransformersEngine(
            model.eval(),
            EngineConfig(
                enable_return_routed_experts=name == "on",
                prefix_sharing=False,
                kv_cache_tokens=tokens,
                max_batch_tokens=8192,
                max_running_requests=args.requests,
                seed=0,
            ),
        )
        for name in rates
    }

    def rollout(name: str) -> None:
        results = roll_out(engines[name], prompts, [sampling] * len(prompts), name == "on")
        assert all(len(result.output_tokens) == args.new for result in results)

    for name, engine in engines.items():
        warm_up(engine, partial(rollout, name))
    for _ in range(args.rounds):
        for name, some in rates.items():
            began = time.perf_counter()
            rollout(name)
            some.append(args.requests * args.new / (time.perf_counter() - began))
    for engine in engines.values():
        engine.close()
    facts = {"hardware": torch.cuda.get_device_name(), "attention": args.attention}
    return {f"embedded {name}": summary(some, **facts) for name, some in rates.items()}


if __name__ == "__main__":
    sys.exit(main())
