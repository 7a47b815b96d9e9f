"""Capture on a GPU: streams, CUDA graphs, asynchronous batching. Skipped where there is none."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from test_transformers_engine import assert_dyed, leave_nan_in_padding
from transformers.utils import is_flash_attn_3_available

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
KNOBS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "starved": {"kv_cache_tokens": 2048},
    "offloaded": {"kv_cache_tokens": 2048, "cpu_offload_gib": 0.1},
    "compiled": {"compile_level": 1},
}
needs_flash = pytest.mark.skipif(not is_flash_attn_3_available(), reason="needs flash attention 3")


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flash_attention_3", marks=needs_flash)])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_every_row_is_right_on_a_gpu(attention: str, knobs: dict[str, Any]) -> None:
    dye = Dye(vocab=512, num_experts=128, top_k=8, num_layers=5, window=1024, head_dim=64)
    model: Any = dye.model(torch.bfloat16)
    model = model.to("cuda")
    model.set_attn_implementation(attention)
    model._supports_flash_attn = attention != "sdpa"  # else the engine switches to it
    config: dict[str, Any] = {
        "enable_return_routed_experts": True,
        "kv_cache_tokens": 1 << 16,
        "max_batch_tokens": 512,
        "seed": 0,
    }
    engine = TransformersEngine(model, EngineConfig(**{**config, **knobs}))
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, dye.vocab, 300).tolist()
    futures: list[Future[GenerateResult]] = []
    for i in range(120 if attention != "sdpa" or not knobs else 40):  # without CUDA graphs it takes long
        prompt = (prefix if i % 2 else []) + rng.integers(0, dye.vocab, int(rng.integers(1, 400))).tolist()
        sampling = SamplingParams(int(rng.integers(1, 120)), do_sample=bool(i % 3), n=1 + i % 3)
        if i % 5 == 0:  # steps of several kinds side by side: each has CUDA graphs of its own, or none
            sampling = SamplingParams(0)
        elif i % 5 == 1:
            sampling = replace(sampling, do_sample=True, seed=i, temperature=50.0)
        futures += engine.submit(
            prompt, sampling, return_routes=True, return_prompt_logprobs=i % 2 == 0 or sampling.is_scoring
        ).futures
    for future in futures:
        result = future.result(timeout=120)
        tokens = result.prompt_tokens + result.output_tokens
        assert result.trace is not None
        assert result.trace.valid_T.all()
        np.testing.assert_array_equal(result.trace.experts_TLK, dye.routes(tokens)[: result.trace.num_rows])
        assert result.trace.num_rows == len(tokens) - bool(result.output_tokens)
        if result.prompt_logprobs is not None:
            assert_scored(dye, result.prompt_tokens, result.prompt_logprobs)
    drawn = [engine.submit([7], SamplingParams(50, do_sample=True, temperature=50.0, seed=1)) for _ in range(40)]
    assert len({tuple(generation.result(60).output_tokens) for generation in drawn}) == 1
    engine.close()


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flash_attention_3", marks=needs_flash)])
def test_what_lies_in_memory_is_never_read(attention: str) -> None:
    """What nobody wrote may be NaN, and zero times NaN is NaN: caches, padding, graphs and forks."""
    dye = Dye(vocab=512, num_experts=128, top_k=8, num_layers=3, window=256, head_dim=64)
    model: Any = dye.model(torch.bfloat16)
    model = model.to("cuda")
    model.set_attn_implementation(attention)
    model._supports_flash_attn = attention != "sdpa"  # else the engine switches to it
    config = EngineConfig(enable_return_routed_experts=True, kv_cache_tokens=1 << 16, max_batch_tokens=256, seed=0)
    sizes = [1 << 30, *[1 << 24] * 64, *[1 << 18] * 512, *[1 << 10] * 512]
    held = [torch.full((size // 2,), float("nan"), dtype=torch.bfloat16, device="cuda") for size in sizes]
    del held
    engine = TransformersEngine(model, config)
    rng = np.random.default_rng(0)
    running = [
        engine.submit(
            rng.integers(0, 512, int(rng.integers(3, 40))).tolist(),
            SamplingParams(12, do_sample=True, n=1 + i % 4, seed=i),
            return_routes=True,
        )
        for i in range(40)
    ]
    for result in (result for generation in running for result in generation.results(60)):
        assert result.output_tokens == dye.continuation(result.prompt_tokens[-1], 12)
        assert_dyed(dye, result)
    engine.close()


@needs_flash
@pytest.mark.parametrize("prompt", [[7], [5, 6, 7, 8, 9]], ids=len)
def test_an_engine_may_begin_with_forks(prompt: list[int]) -> None:
    """After its first step there is nothing to compute before the fork, and a step without tokens would sample from
    what lies in memory."""
    dye = Dye(vocab=512, num_experts=128, top_k=8, num_layers=3, window=256, head_dim=64)
    model: Any = dye.model(torch.bfloat16)
    config = EngineConfig(enable_return_routed_experts=True, kv_cache_tokens=1 << 14, max_batch_tokens=256, seed=0)
    padding = leave_nan_in_padding(model)
    engine = TransformersEngine(model.to("cuda"), config)
    for result in engine.submit(prompt, SamplingParams(12, do_sample=True, n=4), return_routes=True).results(60):
        assert result.output_tokens == dye.continuation(prompt[-1], 12)
        assert_dyed(dye, result)
    assert padding
    engine.close()


def assert_scored(dye: Dye, prompt: list[int], logprobs: list[float | None]) -> None:
    """Its logits are 4 sqrt(V) at the token that follows, and 0 elsewhere."""
    logit = 4 * math.sqrt(dye.vocab)
    follows = [after == (token + 1) % dye.vocab for token, after in pairwise(prompt)]
    assert logprobs[0] is None
    np.testing.assert_allclose(np.array(logprobs[1:], float), [logit * right - logit for right in follows], atol=1.0)
