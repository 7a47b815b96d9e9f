"""The mismatch of a Qwen3-30B-A3B-shaped model with random weights: rollout engine against a training forward.

One set of bfloat16 weights. The engine generates with paged attention (FlashAttention 3 where installed, with CUDA
graphs), grouped experts and a KV cache; the training forward reads the same tokens as padded batches with another
attention and the loop over experts. Weights are random, with two spreads chosen so that choices are not trivial: the
router's logits (`--router-std`; at 1.5 the best 8 of 128 have about half of the probability) and the vocabulary's
(`--head-std`). Both inputs are RMS-normalised, so a weight's standard deviation is the spread over sqrt(hidden size).

Axes: B sequences, S columns, T rows, L MoE layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from typing import Any

import numpy as np
import torch
import transformers
from processes import facts
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import is_flash_attn_3_available

from moetrace.comparison import RoutingComparison, compare, extreme_token_ratio, kl_k3, shared_experts
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.recorder import record
from moetrace.replayer import ReplayStats, replay
from moetrace.trace import RoutingTrace

_TOKENS_AT_ONCE = 1024
"""Of a training forward: its logits take 0.6 GB in float32."""


def measure(args: argparse.Namespace) -> None:
    """Generate, read the same tokens three times (live, live again, R3), and write what differs."""
    began = time.time()
    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    out = args.out / "mismatch.json"
    model = load(args)
    results, engine_facts = generate(model, args)
    print(f"{len(results)} sequences after {time.time() - began:.0f} s: {engine_facts}", flush=True)
    training = {"attention": "sdpa" if "flash" in engine_facts["attention"] else "eager", "experts": "eager"}
    model.set_attn_implementation(training["attention"])
    model.set_experts_implementation(training["experts"])
    live, own_traces, _ = read(model, results, args, None)
    again, _, _ = read(model, results, args, None)
    replayed, _, stats = read(model, results, args, [result.trace for result in results if result.trace is not None])
    sampled = [np.array(result.logprobs) for result in results]
    traces = [result.trace for result in results if result.trace is not None]
    routes = sum(map(compare, traces, own_traces), RoutingComparison())
    result = facts() | {
        "seconds": round(time.time() - began, 1),
        "weights": f"random, seed {args.seed}, router logits std {args.router_std}, head logits std {args.head_std}",
        "shape": {name: getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size", "num_experts")},
        "engine": engine_facts,
        "training_forward": training,
        "tokens": {"sequences": len(results), "rows": routes.tokens, "generated": sum(map(len, sampled))},
        "router_mismatch": routes.router_mismatch,
        "token_mismatch": routes.token_mismatch,
        "router_mismatch_per_layer": per_layer(traces, own_traces),
        "router_mismatch_under_R3": float(np.mean([some.router_mismatch for some in stats])),
        "rollout_entropy_nats": float(-np.concatenate(sampled).mean()),
        "live": distances(sampled, live),
        "R3": distances(sampled, replayed),
        "training_forward_twice": distances(live, again),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


def load(args: argparse.Namespace) -> Any:
    """Random bfloat16 weights of the large shape, or of a small one for a smoke test."""
    sizes = {"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
    if args.smoke:
        sizes = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        experts |= {"moe_intermediate_size": 32, "head_dim": 32}
    config = Qwen3MoeConfig(
        **sizes,
        **experts,
        num_hidden_layers=args.layers,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    on_gpu = torch.device(args.device).type == "cuda"
    attention = "flash_attention_3" if on_gpu and is_flash_attn_3_available() else "sdpa"
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight, std=args.router_std / config.hidden_size**0.5)
        torch.nn.init.normal_(model.lm_head.weight, std=args.head_std / config.hidden_size**0.5)
    return model.eval()


def generate(model: Any, args: argparse.Namespace) -> tuple[list[GenerateResult], dict[str, Any]]:
    """Sampled sequences with their routes; the engine is closed again, for its memory."""
    knobs: dict[str, Any] = {"max_running_requests": args.requests}
    if model.device.type == "cuda":
        pages = -(-(args.prompt + args.new) // 256)
        knobs |= {"kv_cache_tokens": 256 * pages * args.requests * 5 // 4, "max_batch_tokens": 4096}
    engine = TransformersEngine(model, EngineConfig(enable_return_routed_experts=True, seed=args.seed, **knobs))
    rng = np.random.default_rng(args.seed)
    prompts = rng.integers(0, model.config.vocab_size, (args.requests, args.prompt)).tolist()
    try:
        generations = [
            engine.submit(prompt, SamplingParams(args.new, do_sample=True, seed=number), return_routes=True)
            for number, prompt in enumerate(prompts)
        ]
        results = [generation.result(300) for generation in generations]
        config = engine._manager.continuous_batching_config
        described = {
            "name": engine.name,
            "attention": model.config._attn_implementation,
            "experts": model.config._experts_implementation,
            "cuda_graphs (varlen, decode)": list(config.cuda_graph_booleans),
        }
    finally:
        engine.close()
    if not all(result.trace is not None and result.trace.valid_T.all() for result in results):
        raise RuntimeError("a sequence came without all of its rows")
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return results, described


@torch.no_grad()
def read(
    model: Any, results: list[GenerateResult], args: argparse.Namespace, traces: list[RoutingTrace] | None
) -> tuple[list[np.ndarray], list[RoutingTrace], list[ReplayStats]]:
    """The training forward over the generated sequences: log-probabilities of their answers, routes, statistics."""
    logprobs, own_traces, stats = [], [], []
    at_once = max(1, _TOKENS_AT_ONCE // (args.prompt + args.new))
    for first in range(0, len(results), at_once):
        some = results[first : first + at_once]
        ids_BS = torch.tensor([[*result.prompt_tokens, *result.output_tokens] for result in some])
        if traces is None:
            with record(model) as recording:
                logits = model(input_ids=ids_BS.to(model.device), use_cache=False).logits
            own_traces += recording.traces(ids_BS)
        else:
            with replay(model, traces[first : first + at_once], input_ids=ids_BS, on_shift="warn") as session:
                logits = model(input_ids=ids_BS.to(model.device), use_cache=False).logits
            stats.append(session.stats())
        answers = logits[:, args.prompt - 1 : -1].float().log_softmax(-1)
        chosen = answers.gather(-1, ids_BS[:, args.prompt :, None].to(model.device))[..., 0]
        logprobs += list(chosen.cpu().numpy())
        del logits, answers
    return logprobs, own_traces, stats


def per_layer(a: list[RoutingTrace], b: list[RoutingTrace]) -> list[float]:
    """Router mismatch of each MoE layer."""
    differs = [
        shared_experts(x.experts_TLK, y.experts_TLK[: len(x.experts_TLK)]) < x.layout.top_k
        for x, y in zip(a, b, strict=True)
    ]
    return np.concatenate(differs).mean(0).round(5).tolist()


def distances(sampled: list[np.ndarray], read: list[np.ndarray]) -> dict[str, float]:
    """KL (k3), its standard error over sequences, and extreme tokens, of the generated tokens."""
    kls = [kl_k3(a, b) for a, b in zip(sampled, read, strict=True)]
    a, b = np.concatenate(sampled), np.concatenate(read)
    return {
        "kl": float(np.mean(kls)),
        "kl_standard_error": float(np.std(kls, ddof=1) / len(kls) ** 0.5),
        "mean_absolute_log_ratio": float(np.abs(a - b).mean()),
        "largest_log_ratio": float(np.abs(a - b).max()),
        **{f"extreme_{tau}": extreme_token_ratio(a, b, tau) for tau in (1.1, 1.25, 1.5, 2.0)},
    }
