"""One rank of `test_parallel_engine.py`: serve a dye checkpoint under a parallel plan; rank 0 asks and saves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import EngineError, RequestError

KNOBS: dict[str, Any] = {"enable_return_routed_experts": True, "dtype": "float32", "page_size": 16}


def serve(engine: TransformersEngine) -> dict[str, Any]:
    """Rollouts with shared prefixes and forks, one aborted, and what is refused under a plan."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 96, 40).tolist()
    running = []
    for number in range(8):
        prompt = (prefix if number % 2 else []) + rng.integers(0, 96, int(rng.integers(2, 30))).tolist()
        running.append(engine.submit(prompt, SamplingParams(10, n=1 + number % 2), return_routes=True))
    endless = engine.submit([1, 2, 3], SamplingParams(400), return_routes=True)
    hot = SamplingParams(20, do_sample=True, temperature=1e6, top_p=0.1)
    running += [engine.submit([7, 8], replace(hot, seed=seed), return_routes=True) for seed in (None, 3)]
    results = [result for generation in running for result in generation.results(120)]
    engine.abort(endless.request_id)
    refused = []
    score = partial(engine.submit, [1, 2], SamplingParams(0), return_prompt_logprobs=True)
    for call in (engine.pause, lambda: engine.update_weights({}, "1"), score):
        try:
            call()
        except (EngineError, RequestError) as error:
            refused.append(str(error))
    return {"results": [facts(result) for result in [*results, endless.result(120)]], "refused": refused}


def keep_samples(engine: TransformersEngine) -> list[list[int]]:
    """A list that grows by what this rank samples in each step."""
    samples, io = list[list[int]](), engine._manager.batch_processor.inputs_and_outputs
    own = io.prepare_batch_update

    def keep() -> Any:
        requests, tokens, logprobs = own()
        samples.append(tokens[: sum(request.has_new_token for request in requests)])
        return requests, tokens, logprobs

    io.prepare_batch_update = keep
    return samples


def facts(result: GenerateResult) -> dict[str, Any]:
    trace = result.trace
    assert trace is not None
    return {
        "tokens": result.prompt_tokens + result.output_tokens,
        "experts": trace.experts_TLK.tolist(),
        "valid": bool(trace.valid_T.all()),
        "reason": result.finish_reason,
    }


if __name__ == "__main__":
    checkpoint, plan, out = sys.argv[1:]
    engine = TransformersEngine.load(checkpoint, EngineConfig(**KNOBS, kv_cache_tokens=2048, parallel=plan))
    samples = keep_samples(engine)
    if engine.is_driver:
        Path(out).write_text(json.dumps(serve(engine)))
    else:
        assert engine.layout is None  # only rank 0 of a group records
        with pytest.raises(EngineError, match="rank 0"):
            engine.submit([1], SamplingParams(1))
    engine.close()
    Path(out).with_suffix(f".{dist.get_rank()}.samples").write_text(json.dumps(samples))
    dist.destroy_process_group()
