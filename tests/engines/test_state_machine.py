"""Anything a rollout does, in any order: every row that comes back is right.

A short run belongs to the suite. The long one, of 100,000 requests and more:
MOETRACE_MACHINE_EXAMPLES=300 python -m pytest tests/engines/test_state_machine.py -s
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dye import Dye
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from transformers.utils import is_flash_attn_3_available

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, Generation, SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import CaptureOffError
from moetrace.trace import WeightSpan

EXAMPLES = int(os.environ.get("MOETRACE_MACHINE_EXAMPLES", "6"))
FEWEST, MOST = (1, 16) if EXAMPLES < 20 else (60, 160)
"""Requests submitted at once."""
FLASH = torch.cuda.is_available() and is_flash_attn_3_available()
"""Then with CUDA graphs, asynchronous batching and pages as large as its kernel wants them."""
PAGES, CHUNKS, LONG = ([256], [64, 300, 2048], 700) if FLASH else ([8, 16], [12, 40, 256], 90)
CACHES = [8 * max(PAGES), 16 * max(PAGES), 4096] if FLASH else [320, 512, 4096]
DYE = Dye(vocab=64, num_experts=32, top_k=4, num_layers=3, window=1024 if FLASH else 256, head_dim=64 if FLASH else 8)
SHIFT = 31
PREFIXES = np.random.default_rng(0).integers(0, DYE.vocab, (4, LONG)).tolist()
TOTALS = {"requests": 0, "sequences": 0, "rows": 0, "missing": 0, "aborted": 0, "updates": 0, "preemptions": 0}
TOTALS |= {"stops": 0, "unasked": 0}


class Letters:
    """Token v is letter v."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("0") + token) for token in tokens)


def routes(tokens: list[int], version: int) -> np.ndarray:
    """`[T, L, K]`: odd versions of the weights route a token as even ones route another."""
    return DYE.routes([(token + SHIFT * (version % 2)) % DYE.vocab for token in tokens])


def weights(version: int) -> dict[str, torch.Tensor]:
    dye = copy.copy(DYE)
    dye.route = lambda token, layer: DYE.route((token + SHIFT * (version % 2)) % DYE.vocab, layer)  # type: ignore[method-assign]
    return dye.model().state_dict()


WEIGHTS = [weights(0), weights(1)]


class Submitted(NamedTuple):
    """A request, whether it asked for routes, the weights it began with at the earliest, and the stops before it."""

    generation: Generation
    asked: bool
    version: int
    stops: int


class Rollouts(RuleBasedStateMachine):
    """Submits, forks, aborts, pauses, updates weights, stops and starts capture; the cache is small enough to preempt
    and to evict."""

    @initialize(
        cache=st.sampled_from(CACHES),
        chunk=st.sampled_from(CHUNKS),
        page=st.sampled_from(PAGES),
        sharing=st.booleans(),
    )
    def start(self, cache: int, chunk: int, page: int, sharing: bool) -> None:
        config = EngineConfig(
            enable_return_routed_experts=True,
            kv_cache_tokens=cache,
            max_batch_tokens=chunk,
            max_running_requests=min(chunk, 4 * MOST),
            page_size=page,
            prefix_sharing=sharing,
            weight_version="0",
            seed=0,
        )
        model: Any = DYE.model(torch.bfloat16 if FLASH else torch.float32)
        if FLASH:
            model.to("cuda").set_attn_implementation("flash_attention_3")
        self.engine = TransformersEngine(model, config, Letters())
        self.most = max(4, cache // (4 * page))  # more of them would only wait for each other
        self.version = self.stops = 0
        self.captures = True
        self.running: list[Submitted] = []
        offloading = self.engine._manager.batch_processor.offloading_manager
        own = offloading.offload_requests

        def count() -> Any:
            TOTALS["preemptions"] += 1
            return own()

        offloading.offload_requests = count

    @rule(
        count=st.integers(FEWEST, MOST),
        prefix=st.sampled_from(PREFIXES),
        shared=st.integers(0, LONG),
        own=st.integers(0, 30),
        new=st.integers(1, 40),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        stop=st.sampled_from([(), (7,), (20, 50)]),
        text=st.sampled_from([(), (), ("=>?",)]),
        seed=st.integers(0, 1 << 16),
    )
    def submit(self, count: int, prefix: list[int], shared: int, own: int, new: int, n: int, stop, text, seed) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(min(count, self.most)):
            prompt = prefix[:shared] + rng.integers(0, DYE.vocab, own + (shared == 0)).tolist()
            sampling = SamplingParams(new, n=n, stop_token_ids=stop, stop=text, do_sample=bool(seed % 2))
            generation = self.engine.submit(prompt, sampling, return_routes=self.captures)
            self.running.append(Submitted(generation, self.captures, self.version, self.stops))
            TOTALS["requests"] += 1

    @precondition(lambda self: self.running)
    @rule(first=st.floats(0, 1), share=st.floats(0, 1))
    def abort(self, first: float, share: float) -> None:
        if share > 0.95:
            return self.engine.abort()
        begin = int(first * len(self.running))
        for submitted in self.running[begin : begin + int(share * MOST) + 1]:
            self.engine.abort(submitted.generation.request_id)
        return None

    @rule()
    def pause(self) -> None:
        self.engine.pause()

    @rule()
    def resume(self) -> None:
        self.engine.resume()

    @rule()
    def update_weights(self) -> None:
        self.version += 1
        self.engine.update_weights(WEIGHTS[self.version % 2], str(self.version))
        TOTALS["updates"] += 1

    @precondition(lambda self: self.captures)
    @rule()
    def stop_capture(self) -> None:
        self.engine.stop_capture()
        self.captures, self.stops = False, self.stops + 1
        with pytest.raises(CaptureOffError, match="capture is stopped"):
            self.engine.submit([1], SamplingParams(1), return_routes=True)
        TOTALS["stops"] += 1

    @precondition(lambda self: not self.captures)
    @rule()
    def start_capture(self) -> None:
        self.engine.start_capture()
        self.captures = True

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 3 * MOST))
    def wait_for_some(self, count: int) -> None:
        self.engine.resume()
        done, self.running = self.running[:count], self.running[count:]
        self.finish(done)

    def finish(self, submitted: list[Submitted]) -> None:
        for generation, asked, version, stops in submitted:
            try:
                results = generation.results(60)
            except TimeoutError:
                self.engine.abort()
                scheduler = self.engine._manager.batch_processor.scheduler
                facts = {name: value for name, value in vars(scheduler).items() if name != "cache"}
                raise AssertionError(f"{generation.request_id} is stuck: {facts}") from None
            for result in results:
                if asked:
                    check(result, may_miss=self.stops > stops)
                    assert result.trace is not None
                    assert all(int(span.version) >= version for span in result.trace.weight_spans)
                else:
                    assert result.trace is None
                    TOTALS["unasked"] += 1

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.resume()
            self.finish(self.running)
            assert not self.engine._capture._histories  # type: ignore[union-attr]
            assert not self.engine._delivery.pending
            self.engine.close()


def check(result: GenerateResult, may_miss: bool) -> None:
    """All rows of a finished sequence are there, of an aborted one those that were computed, unless capture was stopped
    meanwhile; every one is right."""
    trace, tokens = result.trace, result.prompt_tokens + result.output_tokens
    assert trace is not None
    assert trace.num_rows == len(tokens) - 1
    assert result.output_tokens == DYE.continuation(result.prompt_tokens[-1], len(result.output_tokens))
    assert may_miss or trace.valid_T.all() or (result.finish_reason == "abort" and not result.output_tokens)
    for span, following in pairwise([*trace.weight_spans, WeightSpan(trace.num_rows, "")]):
        rows = slice(span.start, following.start)
        valid_T = trace.valid_T[rows]
        expected_TLK = routes(tokens[rows], int(span.version))
        np.testing.assert_array_equal(trace.experts_TLK[rows][valid_T], expected_TLK[valid_T])
    TOTALS["sequences"] += 1
    TOTALS["rows"] += int(trace.valid_T.sum())
    TOTALS["missing"] += int((~trace.valid_T).sum())
    TOTALS["aborted"] += result.finish_reason == "abort"


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    print(f"\n{TOTALS}")
