"""`BatchLoop` tells its listener what transformers does to pages; against the real scheduler and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dye import Dye
from test_transformers_engine import CAPTURE, assert_dyed, leave_nan_in_padding
from transformers.generation.continuous_batching import ContinuousBatchingManager, continuous_api
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine


@pytest.fixture
def engine():
    engine = TransformersEngine(Dye().model(), EngineConfig(**CAPTURE))
    yield engine
    engine.close()


def calls_of(engine: TransformersEngine, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every call of one listener method from now on."""
    calls: list[tuple] = []
    own = getattr(engine._capture, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, *kwargs.values()))
        return own(*args, **kwargs)

    monkeypatch.setattr(engine._capture, name, spy)
    return calls


def test_equal_pages_computed_side_by_side_become_one_and_the_loser_says_which_it_had(engine, monkeypatch) -> None:
    replaced = calls_of(engine, "replaced", monkeypatch)
    freed = calls_of(engine, "freed", monkeypatch)
    prompt = list(range(40))
    engine.pause()  # so that both are admitted to one step
    running = [engine.submit(prompt, SamplingParams(4), return_routes=True) for _ in range(2)]
    engine.resume()
    for generation in running:
        assert_dyed(Dye(), generation.result(60))
    first, second = (generation.request_id for generation in running)
    assert [(request_id, index) for request_id, index, _ in replaced] == [(second, 0), (second, 1)]
    tables = {request_id: pages for request_id, pages, *_ in freed}
    assert tables[first][:2] == tables[second][:2]
    assert not {page for _, _, page in replaced} & set(tables[second])


@pytest.mark.parametrize(
    ("generated", "position_offset", "computed"),
    [([7, 8], 12, 11), ([7, 8], 11, 11), ([], 10, 9), ([], 6, 6)],
    ids=["decoding, a step in flight", "decoding", "prompt done, a step in flight", "prefilling"],
)
def test_what_a_step_in_flight_computes_for_a_preempted_request_does_not_count(
    engine, monkeypatch, generated: list[int], position_offset: int, computed: int
) -> None:
    freed = calls_of(engine, "freed", monkeypatch)
    state = RequestState("victim", initial_tokens=list(range(10)))
    state.generated_tokens, state.position_offset = generated, position_offset
    state._status = RequestStatus.DECODING if generated else RequestStatus.PREFILLING
    loop = engine._loop
    loop._scheduler.active_requests["victim"] = state
    loop.pages.table["victim"] = []
    monkeypatch.setattr(loop, "_preempting", True)
    loop._cache.free_blocks("victim")
    del loop._scheduler.active_requests["victim"]
    assert freed == [("victim", [], computed, False)]


def test_a_request_cancelled_while_a_step_is_in_flight(engine, monkeypatch) -> None:
    """It is not forked, its result is thrown away, and only what was computed counts."""
    freed = calls_of(engine, "freed", monkeypatch)
    loop, state = engine._loop, RequestState("victim", initial_tokens=list(range(10)), num_children=1)
    state.position_offset, state._status = 6, RequestStatus.PREFILLING

    def plant() -> None:
        loop._scheduler.active_requests["victim"] = state
        loop._scheduler._requests_to_fork.append(state)
        loop._scheduler.set_request_cancellation("victim")

    loop.call(plant).result(60)
    loop.call(lambda: None).result(60)
    assert freed == [("victim", [], 6, True)]
    assert state.status == RequestStatus.FINISHED
    assert not loop._scheduler._requests_to_fork


def test_a_cancelled_request_that_the_engine_does_not_know_still_gets_an_answer(engine, monkeypatch) -> None:
    """As with forks of a parent that is cancelled before it forks."""
    engine.pause()
    generation = engine.submit(list(range(20)), SamplingParams(5, n=3), return_routes=True)
    engine.abort(generation.request_id)
    for result in generation.results(60):
        assert (result.output_tokens, result.finish_reason) == ([], "abort")
        assert result.trace is not None
        assert not result.trace.valid_T.any()
    assert not engine._capture._histories


def test_graphs_with_and_without_a_commit_are_kept_apart(engine) -> None:
    """On a CPU there are none, but their keys."""
    io = engine._manager.batch_processor.inputs_and_outputs
    with_commit = io._get_graph_key()
    engine.stop_capture()
    assert io._get_graph_key() != with_commit
    engine.start_capture()
    assert io._get_graph_key() == with_commit


def test_keys_that_are_on_the_host_are_not_shared_once_they_return_to_other_weights(engine) -> None:
    loop, state = engine._loop, RequestState("away", initial_tokens=list(range(40)))
    state.is_cpu_offloaded = True

    def plant() -> None:
        loop._scheduler.waiting_requests["away"] = state
        loop.forget_prefixes()
        del loop._scheduler.waiting_requests["away"]

    loop.call(plant).result(60)
    assert "away" in loop._stale


def test_a_cache_that_nobody_wrote_holds_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.17 leaves it as memory was; what is masked is multiplied by zero, and zero times NaN is NaN."""
    model = Dye().model()
    create = ContinuousBatchingManager._create_batch_processor

    def unwritten(manager: Any) -> Any:
        known, processor = manager.batch_processor, create(manager)
        for tensor in caches(processor) if processor is not known else ():
            tensor.fill_(torch.nan)
        return processor

    def caches(processor: Any) -> list[torch.Tensor]:
        return [*getattr(processor.cache, "key_cache", ()), *getattr(processor.cache, "value_cache", ())]

    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", unwritten)
    engine = TransformersEngine(model, EngineConfig(kv_cache_tokens=256, max_batch_tokens=64))
    try:
        if not caches(engine._manager.batch_processor):
            pytest.skip("this release writes zeros itself")
        assert all(tensor.isfinite().all() for tensor in caches(engine._manager.batch_processor))
    finally:
        engine.close()


def test_what_attention_leaves_for_padding_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding's keys lie behind the others, and are multiplied by zero. Steps are padded by hand here."""
    dye = Dye()
    model: Any = dye.model()
    padding = leave_nan_in_padding(model)
    engine = TransformersEngine(model, EngineConfig(**CAPTURE))
    monkeypatch.setattr(engine._manager.batch_processor.model_runner, "pad_inputs", True)
    try:
        for prompt in (range(3), range(50), range(7, 10)):
            result = engine.submit(list(prompt), SamplingParams(4), return_routes=True).result(60)
            assert_dyed(dye, result)
            assert result.output_tokens == dye.continuation(prompt[-1], 4)
    finally:
        engine.close()
    assert set(padding) == {64}


def test_a_model_that_flash_attention_cannot_run_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **_: True)
    model: Any = Dye().model()
    engine = TransformersEngine(model, EngineConfig(kv_cache_tokens=256, max_batch_tokens=64))
    try:
        assert "flash" not in model.config._attn_implementation
        assert engine.submit([3, 4], SamplingParams(3)).result(60).output_tokens == [5, 6, 7]
    finally:
        engine.close()
    assert "_supports_flash_attn" not in vars(model)
