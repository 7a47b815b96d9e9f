"""Capture on a GPU: streams, CUDA graphs, asynchronous batching. Skipped where there is none."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from transformers.utils import is_flash_attn_3_available

from moetrace.engines.base import EngineConfig, GenerateResult, SamplingParams
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
    for i in range(120):
        prompt = (prefix if i % 2 else []) + rng.integers(0, dye.vocab, int(rng.integers(1, 400))).tolist()
        sampling = SamplingParams(int(rng.integers(1, 120)), do_sample=bool(i % 3), n=1 + i % 3)
        futures += engine.submit(prompt, sampling, return_routes=True).futures
    for future in futures:
        result = future.result(timeout=120)
        tokens = result.prompt_tokens + result.output_tokens
        assert result.trace is not None
        assert result.trace.valid_T.all()
        np.testing.assert_array_equal(result.trace.experts_TLK, dye.routes(tokens[:-1]))
    engine.close()
