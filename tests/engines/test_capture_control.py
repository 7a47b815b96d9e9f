"""Capture stopped and started while the engine serves: a row is right or missing, never another computation's."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from dye import Dye
from test_lifecycle import DEVICE, rerouted
from test_transformers_engine import CAPTURE, assert_dyed, generate, prompts_of

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import CaptureOffError, EngineError

DYE = Dye()


@contextmanager
def running(dye: Dye = DYE, **knobs: Any) -> Iterator[TransformersEngine]:
    model: Any = dye.model()
    engine = TransformersEngine(model.to(DEVICE), EngineConfig(**knobs))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine() -> Iterator[TransformersEngine]:
    with running(**CAPTURE, kv_cache_tokens=1 << 12, weight_version="0") as engine:
        yield engine


def test_stopped_no_step_commits_and_nobody_may_ask(engine, monkeypatch) -> None:
    commits: list[Any] = []
    monkeypatch.setattr(engine._capture._store, "commit", lambda *step: commits.append(step))
    engine.stop_capture()
    assert engine.capture is not None
    assert not engine.capture.is_on
    with pytest.raises(CaptureOffError, match="capture is stopped"):
        engine.submit([1, 2, 3], SamplingParams(4), return_routes=True)
    result = engine.submit([1, 2, 3], SamplingParams(4)).result(60)
    assert (result.output_tokens, result.trace) == ([4, 5, 6, 7], None)
    assert not commits
    assert engine.layout is not None  # what the model is has not changed


def test_started_again_every_row_is_there_also_of_prefixes_that_were_computed_while_stopped(engine) -> None:
    """With other weights meanwhile: a row of before the stop, or of an older owner of the page, would show."""
    other, weights = rerouted(DYE)
    prompts = prompts_of(DYE, 8, shared=64)
    for result in generate(engine, prompts):
        assert_dyed(DYE, result)
    engine.stop_capture()
    engine.update_weights(weights, "1")
    for future in [engine.submit(prompt, SamplingParams(12)) for prompt in prompts]:
        future.result(60)
    engine.start_capture()
    for result in generate(engine, prompts) + generate(engine, prompts):
        assert_dyed(other, result)


def test_what_is_computed_while_stopped_has_no_row_whatever_its_pages_held_before() -> None:
    """The same tokens were in the same slots before, under other weights."""
    with running(**CAPTURE, kv_cache_tokens=64, prefix_sharing=False) as engine:
        for result in generate(engine, [list(range(40))] * 2):
            assert_dyed(DYE, result)
        engine.pause()
        generation = engine.submit(list(range(40)), SamplingParams(12), return_routes=True)
        engine.stop_capture()
        engine.update_weights(rerouted(DYE)[1], "1")
        engine.resume()
        trace = generation.result(60).trace
        assert trace is not None
        assert trace.num_rows == 40 + 12 - 1
        assert not trace.valid_T.any()


def test_a_request_under_way_keeps_its_rows_misses_those_between_and_has_the_later_ones(engine) -> None:
    told = threading.Event()

    def progress(_: int, tokens: list[int], __: list[float]) -> None:
        if len(tokens) in (40, 80):
            told.set()

    generation = engine.submit([1, 2, 3], SamplingParams(400), return_routes=True, on_progress=progress)
    others = [engine.submit(prompt, SamplingParams(400), return_routes=True) for prompt in prompts_of(DYE, 4)]
    assert told.wait(60)
    engine.stop_capture()
    told.clear()
    assert told.wait(60)
    engine.start_capture()
    for result in [generation.result(60), *(other.result(60) for other in others)]:
        tokens, trace = (result.prompt_tokens + result.output_tokens)[:-1], result.trace
        assert trace is not None
        changes = np.flatnonzero(np.diff(trace.valid_T.astype(int)))
        assert len(changes) == 2  # there, missing, there
        assert trace.valid_T[0]
        assert trace.valid_T[-1]
        np.testing.assert_array_equal(trace.experts_TLK[trace.valid_T], DYE.routes(tokens)[trace.valid_T])
    first = generation.result().trace
    assert first is not None
    assert first.valid_T[: 3 + 39].all()
    assert engine.capture is not None
    assert engine.capture.missing_rows > 0
    assert engine.capture.errors == 0


def test_a_stream_of_rows_ends_at_the_stop(engine) -> None:
    seen: list[list[int]] = [[]]

    def wait_for(count: int) -> list[int]:
        while len(seen[-1]) < count:
            assert not generation.futures[0].done()
            time.sleep(0.001)
        return seen[-1]

    def progress(_: int, tokens: list[int], __: list[float]) -> None:
        seen.append(list(tokens))

    generation = engine.submit([1, 2, 3], SamplingParams(400), return_routes=True, on_progress=progress)
    before = len(wait_for(20))
    engine.stop_capture()
    tokens = wait_for(len(seen[-1]) + 20)
    trace = engine.read_routes(generation, 0, tokens, 0)
    assert trace is not None
    assert 3 + before - 1 <= trace.num_rows < 3 + len(tokens) - 1
    assert trace.valid_T.all()
    np.testing.assert_array_equal(trace.experts_TLK, DYE.routes([1, 2, 3, *tokens])[: trace.num_rows])
    engine.abort()


def test_a_failed_collection_is_counted_and_told(engine, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise EngineError("no rows")

    monkeypatch.setattr(engine._capture, "collect", fail)
    with pytest.raises(EngineError, match="no rows"):
        engine.submit([1, 2], SamplingParams(2), return_routes=True).result(60)
    assert engine.capture is not None
    assert engine.capture.errors == 1


def test_without_the_flag_there_is_nothing_to_start() -> None:
    with running() as engine:
        assert engine.capture is None
        for control in (engine.start_capture, engine.stop_capture):
            with pytest.raises(CaptureOffError, match="--enable-return-routed-experts"):
                control()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_what_was_compiled_while_stopped_records_once_started() -> None:
    dye = Dye(vocab=48, num_experts=16, num_layers=2)
    knobs = {**CAPTURE, "compile_level": 1, "max_batch_tokens": 64, "kv_cache_tokens": 1024}
    with running(dye, **knobs) as engine:
        engine.stop_capture()
        prompts = prompts_of(dye, 6, longest=40)
        for future in [engine.submit(prompt, SamplingParams(12)) for prompt in prompts]:
            future.result(120)
        engine.start_capture()
        for result in generate(engine, prompts):
            assert_dyed(dye, result)
