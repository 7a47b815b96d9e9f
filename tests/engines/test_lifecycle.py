"""What a rollout does to a running engine: forks, stops, aborts, pauses, new weights. Every row stays right."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from safetensors.torch import load_file, save_file
from test_transformers_engine import CAPTURE, assert_dyed, count_computed, generate, prompts_of
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.engines.transformers import capture as capture_module
from moetrace.engines.transformers import delivery as delivery_module
from moetrace.engines.transformers.capture import CaptureCounts, CapturedRows
from moetrace.engines.transformers.delivery import Delivery
from moetrace.engines.transformers.pending import Pending
from moetrace.engines.transformers.stopping import Stops
from moetrace.errors import CaptureError, EngineError, RequestError, WeightsError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

TINY = "models/tiny-qwen3-moe"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def dye() -> Dye:
    return Dye()


@pytest.fixture
def make_engine():
    engines = []

    def make(model: Any, tokenizer: Any = None, **knobs: Any) -> TransformersEngine:
        knobs = {**CAPTURE, "kv_cache_tokens": 1 << 15, **knobs}
        engines.append(TransformersEngine(model.to(DEVICE), EngineConfig(**knobs), tokenizer))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_partial(dye: Dye, result: GenerateResult, reason: str = "abort") -> None:
    """Whatever was computed has its row, and the row is right."""
    assert result.finish_reason == reason
    tokens = result.prompt_tokens + result.output_tokens
    assert result.output_tokens == dye.continuation(result.prompt_tokens[-1], len(result.output_tokens))
    assert len(result.logprobs) == len(result.output_tokens)
    trace = result.trace
    assert trace is not None
    assert trace.num_rows == len(tokens) - 1
    np.testing.assert_array_equal(trace.experts_TLK[trace.valid_T], dye.routes(tokens)[:-1][trace.valid_T])
    if result.output_tokens:
        assert trace.valid_T.all()


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("n", [2, 5])
def test_forks_return_n_sequences_each_with_all_its_rows(dye: Dye, make_engine, n: int, prefix_sharing: bool) -> None:
    engine = make_engine(dye.model(), prefix_sharing=prefix_sharing)
    computed = count_computed(engine)
    prompts = [prompt for prompt in prompts_of(dye, 8, shared=40, seed=3) if len(prompt) > 1]
    generations = [engine.submit(prompt, SamplingParams(9, n=n), return_routes=True) for prompt in prompts]
    for prompt, generation in zip(prompts, generations, strict=True):
        results = generation.results(60)
        assert len(results) == n
        for result in results:
            assert result.prompt_tokens == prompt
            assert len(result.output_tokens) == 9
            assert_dyed(dye, result)
    assert len(computed) < sum(len(prompt) + n * 9 for prompt in prompts)  # prompts were computed once
    assert not engine._capture._histories


def test_forks_of_a_sampled_request_differ(make_engine) -> None:
    engine = TransformersEngine.load(TINY, EngineConfig(**CAPTURE))
    try:
        sampling = SamplingParams(12, do_sample=True, temperature=4.0, n=8)
        results = engine.submit(list(b"And God said"), sampling).results(60)
        assert len({tuple(result.output_tokens) for result in results}) > 1
        assert len({result.output_tokens[0] for result in results}) > 1  # the first token is sampled for each
    finally:
        engine.close()


@pytest.mark.parametrize("prompt", [[7], list(range(33)), list(range(32))], ids=len)
def test_forks_with_nothing_left_to_compute_before_the_fork(dye: Dye, make_engine, prompt: list[int]) -> None:
    engine = make_engine(dye.model(), page_size=16)
    for _ in range(2):  # the second time, all full pages of the prompt are there already
        for result in engine.submit(prompt, SamplingParams(3, n=3), return_routes=True).results(60):
            assert len(result.output_tokens) == 3
            assert_dyed(dye, result)


def test_such_forks_beside_requests_that_compute(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), page_size=16)
    known = list(range(32))

    def generate_together(new: int, *wishes: tuple[list[int], int]) -> None:
        engine.pause()  # so that all are admitted to one step
        running = [engine.submit(prompt, SamplingParams(new, n=n), return_routes=True) for prompt, n in wishes]
        engine.resume()
        for generation, (_, n) in zip(running, wishes, strict=True):
            results = generation.results(60)
            assert [len(result.output_tokens) for result in results] == [new] * n
            for result in results:
                assert_dyed(dye, result)

    generate_together(1, (known, 1), *(([9] * length, 1) for length in range(20, 26)))  # a step of more tokens
    generate_together(6, ([5], 1), ([7], 3), (known, 4), ([*known, 1, 2], 2), ([9, 8, 7], 3))
    generate_together(6, ([7], 3), ([9, 8], 2), ([6], 2))  # fewer tokens than requests


def test_forks_in_a_starved_cache(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), kv_cache_tokens=256, max_batch_tokens=48)
    prompts = [prompt for prompt in prompts_of(dye, 10, shared=20, longest=30) if len(prompt) > 1]
    generations = [engine.submit(prompt, SamplingParams(40, n=3), return_routes=True) for prompt in prompts]
    for generation in generations:
        for result in generation.results(120):
            assert_dyed(dye, result)


def test_a_stop_token_ends_a_sequence_and_is_its_last(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    result = engine.submit([5, 6], SamplingParams(20, stop_token_ids=(11, 90)), return_routes=True).result(60)
    assert result.output_tokens == [7, 8, 9, 10, 11]
    assert result.finish_reason == "stop"
    assert_dyed(dye, result)


class Letters:
    """A tokenizer of which token v is letter v; two tokens are parts of one character."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)


def test_a_stop_text_ends_a_sequence_at_the_token_that_completes_it(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), Letters())
    for n in (1, 3):
        sampling = SamplingParams(60, stop=("XYZ", "JKL"), n=n)
        for result in engine.submit([3, 4], sampling, return_routes=True).results(60):
            assert result.output_tokens == [5, 6, 7, 8, 9, 10, 11]  # F G H I J K L
            assert result.finish_reason == "stop"
            assert_dyed(dye, result)


def test_a_stop_text_that_spans_the_prompt_does_not_count(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), Letters())
    result = engine.submit([3, 4], SamplingParams(6, stop=("EF",)), return_routes=True).result(60)
    assert (len(result.output_tokens), result.finish_reason) == (6, "length")


class Torn(Letters):
    """It has no letter for tokens from 12 on."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        if max(tokens, default=0) >= 12:
            raise self._error("id is out of range")
        return super().decode(tokens, skip_special_tokens=skip_special_tokens)


class Panic(BaseException):
    """As Rust's comes to Python."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_a_tokenizer_that_fails_ends_its_request_and_no_other(
    dye: Dye, make_engine, error: type[BaseException]
) -> None:
    engine = make_engine(dye.model(), Torn(error))
    other = engine.submit([3, 4], SamplingParams(200), return_routes=True)
    for tokens in (1, 300):  # at the last token, and before
        failing = engine.submit([10, 11], SamplingParams(tokens, stop=("Z",), n=1 + tokens % 2), return_routes=True)
        for future in failing.futures:
            with pytest.raises(RequestError, match="does not decode"):
                future.result(60)
    assert_dyed(dye, other.result(60))
    assert_dyed(dye, engine.submit([3, 4], SamplingParams(5, stop=("Z",)), return_routes=True).result(60))
    assert engine.is_healthy()
    assert not engine._delivery.pending
    assert not engine._capture._histories


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_delivery_dies_waiting_requests_fail_and_health_says_so(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    engine._delivery._finish = None
    engine.pause()
    generations = [engine.submit([1, 2], SamplingParams(2)) for _ in range(2)]
    engine.resume()
    for generation in generations:
        with pytest.raises(EngineError, match="stopped"):
            generation.result(60)
    assert not engine.is_healthy()
    with pytest.raises(EngineError, match="stopped"):
        engine.submit([1, 2], SamplingParams(2))


def deliver(
    outputs: list[Any], at_rest: threading.Event, *, routes: tuple[str, ...] = ()
) -> tuple[Delivery, dict[str, Pending]]:
    """A delivery of these outputs by an engine that stops with the first of them; and who waits, some with routes."""
    layout, begins = MoeLayout((0,), 4, 2), threading.Event()
    pending = {
        name: Pending(
            [1], SamplingParams(2), Future(), name in routes, frozenset(), Stops(None, SamplingParams(2)), None
        )
        for name in {output.request_id for output in outputs}
    }
    trace = RoutingTrace.build(np.array([[[0, 1]], [[0, 1]]]), layout, [1, 3, 4])
    rows = CapturedRows(trace.experts_TLK, trace.valid_T, np.zeros(2, np.int32))
    capture: Any = SimpleNamespace(
        collect=lambda *_: rows, trace_of=lambda *_: trace, drop=lambda _: None, counts=CaptureCounts()
    )
    outputs = [None, *outputs]
    all_of_them = len(outputs)

    def get_result(timeout: float) -> Any:
        assert begins.wait(60)
        return outputs.pop(0) if outputs else None

    manager = SimpleNamespace(
        is_running=lambda: len(outputs) == all_of_them,
        background_thread_status=SimpleNamespace(fatal_error=None),
        get_result=get_result,
    )
    scorer: Any = SimpleNamespace(drop=lambda _: None)
    delivery = Delivery(manager, capture, scorer, ["0"], "an engine", at_rest)
    delivery.pending |= pending
    begins.set()
    return delivery, pending


def finished(name: str) -> GenerationOutput:
    return GenerationOutput(name, generated_tokens=[3, 4], logprobs=[0, 0], status=RequestStatus.FINISHED)


def test_what_an_engine_delivered_before_it_stopped_reaches_who_waits() -> None:
    """It may stop between a look at the empty queue and one at its health."""
    delivery, pending = deliver([finished("one"), finished("two")], threading.Event(), routes=("two",))
    assert pending["one"].future.result(60).output_tokens == [3, 4]
    assert pending["two"].future.result(60).trace is not None
    delivery.join()


def test_traces_wait_for_a_rest_of_the_generation_thread_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_MOST_PATIENCE_S", 60)
    at_rest = threading.Event()
    outputs = [finished("traced"), finished("other"), finished("traced too")]
    delivery, pending = deliver(outputs, at_rest, routes=("traced", "traced too"))
    assert pending["other"].future.result(60).trace is None
    assert not pending["traced"].future.done()
    at_rest.set()
    for name in ("traced", "traced too"):
        assert pending[name].future.result(60).trace is not None
    delivery.join()


def test_what_others_stream_holds_up_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_MOST_PATIENCE_S", 0)
    traced = threading.Event()
    streamed: Any = SimpleNamespace(request_id="streamed", is_finished=lambda: not traced.wait(60))
    delivery, pending = deliver([finished("traced"), streamed, finished("streamed")], traced, routes=("traced",))
    pending["streamed"].on_progress = None
    streamed.generated_tokens, streamed.logprobs = [3], [0]
    assert pending["traced"].future.result(20).trace is not None
    traced.set()
    assert pending["streamed"].future.result(20).output_tokens == [3, 4]
    delivery.join()


def test_rows_that_cannot_leave_fail_their_requests_at_once(
    dye: Dye, make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(capture_module, "_PULL_TIMEOUT_S", 3600)
    engine = make_engine(dye.model())
    engine._capture._store.take = fail
    engine.pause()
    running = [engine.submit([1, 2], SamplingParams(tokens), return_routes=True) for tokens in (3, 3, 90)]
    engine.resume()
    for generation in running:
        with pytest.raises((CaptureError, EngineError), match="Send"):
            generation.result(60)


def test_a_generation_thread_that_never_rests_holds_up_no_trace() -> None:
    delivery, pending = deliver([finished("traced")], threading.Event(), routes=("traced",))
    assert pending["traced"].future.result(60).trace is not None
    delivery.join()


def test_the_generation_thread_rests_where_it_waits_and_where_it_has_nothing_to_do(dye: Dye, make_engine) -> None:
    """As with asynchronous batching, where it waits for the device apart from launching."""
    engine = make_engine(dye.model())
    loop, processor, seen = engine._loop, engine._manager.batch_processor, list[tuple[str, bool]]()

    def note(what: str) -> Any:
        def noted(own: Any, *args: Any) -> Any:
            seen.append((what, loop.at_rest.is_set()))
            return own(*args)

        return noted

    loop.join(processor.inputs_and_outputs, "prepare_batch_update", note("waits"))
    loop.join(processor.inputs_and_outputs, "prepare_batch_update", loop._wait)
    loop.join(processor, "_generation_step", note("launches"))
    assert loop.at_rest.is_set()
    engine.submit([1, 2], SamplingParams(4)).result(60)
    assert loop.at_rest.wait(60)
    assert {at_rest for what, at_rest in seen if what == "waits"} == {True}
    assert {at_rest for what, at_rest in seen[2:] if what == "launches"} == {False}


def test_stop_texts_in_real_text() -> None:
    engine = TransformersEngine.load(TINY, EngineConfig(**CAPTURE))
    try:
        prompt = AutoTokenizer.from_pretrained(TINY).encode("In the beginning God created the heaven and")
        whole = engine.submit(prompt, SamplingParams(40)).result(60)
        text = bytes(whole.output_tokens).decode()
        stop = text[10:14]
        cut = engine.submit(prompt, SamplingParams(40, stop=(stop,)), return_routes=True).result(60)
        assert cut.output_tokens == whole.output_tokens[: text.index(stop) + len(stop)]
        assert cut.trace is not None
        assert cut.trace.valid_T.all()
    finally:
        engine.close()


def test_a_run_of_stop_tokens_ends_a_sequence_where_it_is_complete(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    for n in (1, 3):
        sampling = SamplingParams(60, stop_sequences=((10, 12), (9, 10, 11), (4, 5)), n=n)
        for result in engine.submit([3, 4], sampling, return_routes=True).results(60):
            assert result.output_tokens == [5, 6, 7, 8, 9, 10, 11]
            assert result.finish_reason == "stop"
            assert_dyed(dye, result)


def test_before_the_fewest_tokens_nothing_stops_a_sequence(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), Letters())
    ways: list[dict[str, Any]] = [
        {"stop_token_ids": (7, 12, 30)},
        {"stop": ("H", "M", "e")},
        {"stop_sequences": ((6, 7), (11, 12))},
    ]
    for stops in ways:
        sampling = SamplingParams(60, min_new_tokens=5, **stops)
        result = engine.submit([3, 4], sampling, return_routes=True).result(60)
        assert result.output_tokens == [5, 6, 7, 8, 9, 10, 11, 12]
        assert result.finish_reason == "stop"
        assert_dyed(dye, result)


def test_end_of_sequence_has_no_probability_before_the_fewest_tokens(make_engine) -> None:
    dye = Dye()
    dye.config.eos_token_id = 10
    model = dye.model()
    engine = make_engine(model)
    plain = engine.submit([7, 8], SamplingParams(9), return_routes=True)
    fewest = [engine.submit([7, 8], SamplingParams(9, min_new_tokens=m), return_routes=True) for m in (2, 3, 6)]
    ignoring = engine.submit([7, 8], SamplingParams(5, min_new_tokens=5, ignore_eos=True))
    assert plain.result(60).output_tokens == [9, 10]
    assert fewest[0].result(60).output_tokens == [9, 10]  # two tokens are enough
    for generation, count in zip(fewest[1:], (3, 6), strict=True):
        result = generation.result(60)
        tokens = result.prompt_tokens + result.output_tokens
        assert len(result.output_tokens) >= count
        assert 10 not in result.output_tokens[: count - 1]
        assert result.trace is not None
        np.testing.assert_array_equal(result.trace.experts_TLK, dye.routes(tokens[:-1]))
        assert result.logprobs[1] < -5  # that of the model, which wanted to end
    assert ignoring.result(60).output_tokens == [9, 10, 11, 12, 13]
    sampled = SamplingParams(40, do_sample=True, temperature=1e6, top_k=3, min_new_tokens=40)
    assert len(engine.submit([7, 8], sampled).result(60).output_tokens) == 40


def test_stop_texts_without_a_tokenizer_are_refused(dye: Dye, make_engine) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        make_engine(dye.model()).submit([1], SamplingParams(4, stop=("x",)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("stop", ("",)),
        ("stop_sequences", ((),)),
        ("min_new_tokens", -1),
        ("min_new_tokens", 17),
        ("temperature", 1e-4),
        ("temperature", 1e7),
        ("temperature", float("nan")),
    ],
)
def test_new_sampling_parameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stops", [{"stop_token_ids": (96,)}, {"stop_sequences": ((3, -1),)}])
def test_stop_tokens_outside_the_vocabulary_are_refused(dye: Dye, make_engine, stops: Any) -> None:
    with pytest.raises(RequestError, match="stop token at position"):
        make_engine(dye.model()).submit([1], SamplingParams(4, **stops))


def test_the_coldest_and_the_hottest_draw_leave_the_engine_alive(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    for temperature in (1e-3, 1e6):
        engine.submit([1], SamplingParams(3, do_sample=True, temperature=temperature, top_p=1e-9)).result(60)
    assert engine.is_healthy()


@pytest.mark.parametrize("wait_s", [0.0, 0.02, 0.1, 0.3])
def test_aborted_requests_return_what_there_is(dye: Dye, make_engine, wait_s: float) -> None:
    engine = make_engine(dye.model(), max_batch_tokens=32, kv_cache_tokens=2048)
    prompts = prompts_of(dye, 20, shared=40, seed=5)
    generations = [
        engine.submit(p, SamplingParams(200, n=1 + i % 2), return_routes=True) for i, p in enumerate(prompts)
    ]
    time.sleep(wait_s)
    kept = generations[3]
    for generation in generations:
        if generation is not kept:
            engine.abort(generation.request_id)
    for generation in generations:
        for result in generation.results(60):
            if generation is kept:
                assert_dyed(dye, result)
            else:
                assert_partial(dye, result)
    assert not engine._capture._histories
    assert engine.submit([1, 2], SamplingParams(3)).result(60).output_tokens == [3, 4, 5]


def test_preempted_requests_go_on_after_everything_that_ran_was_aborted(dye: Dye, make_engine) -> None:
    """transformers admits nobody after a preemption until a request finishes; an aborted one counts too."""
    engine = make_engine(dye.model(), kv_cache_tokens=160, max_batch_tokens=48)
    loop = engine._loop
    generations = [engine.submit(prompt, SamplingParams(90), return_routes=True) for prompt in prompts_of(dye, 6)]
    while not loop._scheduler.block_new_requests:
        time.sleep(0.001)
    loop.call(lambda: [engine.abort(name) for name in list(loop._scheduler.active_requests)]).result(60)
    results = [generation.result(60) for generation in generations]
    assert {result.finish_reason for result in results} == {"abort", "length"}
    for result in results:
        assert_partial(dye, result, result.finish_reason)


def test_aborting_everything_twice_and_a_stranger_is_harmless(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    generation = engine.submit([1, 2], SamplingParams(400), return_routes=True)
    engine.abort()
    engine.abort()
    engine.abort("nobody")
    assert_partial(dye, generation.result(60))
    done = engine.submit([1, 2], SamplingParams(3), return_routes=True)
    assert_dyed(dye, done.result(60))
    engine.abort(done.request_id)
    assert_dyed(dye, done.result(60))


def test_a_future_that_somebody_cancels_harms_nobody(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    generation = engine.submit([1, 2], SamplingParams(30), return_routes=True)
    assert not generation.futures[0].cancel()  # abort ends a request
    assert_dyed(dye, generation.result(60))
    assert_dyed(dye, generate(engine, [[4, 5]])[0])


def test_prefixes_of_aborted_requests_are_shared_with_right_rows(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), max_batch_tokens=16)
    prompt = prompts_of(dye, 1, seed=8, longest=90)[0] + list(range(60))
    first = engine.submit(prompt, SamplingParams(300), return_routes=True)
    time.sleep(0.15)
    engine.abort()
    assert_partial(dye, first.result(60))
    for result in generate(engine, [prompt, prompt[:40], [*prompt, 3]]):
        assert_dyed(dye, result)


def test_a_paused_engine_computes_nothing_and_then_goes_on(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    computed = count_computed(engine)
    running = [engine.submit(prompt, SamplingParams(300), return_routes=True) for prompt in prompts_of(dye, 4)]
    time.sleep(0.05)
    engine.pause()
    time.sleep(0.3)
    before = len(computed)
    waiting = engine.submit([1, 2, 3], SamplingParams(4), return_routes=True)
    aborted = engine.submit([4, 5], SamplingParams(4), return_routes=True)
    engine.abort(aborted.request_id)
    engine.abort(running[0].request_id)
    assert_partial(dye, aborted.result(60))
    assert_partial(dye, running[0].result(60))
    time.sleep(0.3)
    assert len(computed) == before
    assert not waiting.futures[0].done()
    engine.resume()
    for generation in [waiting, *running[1:]]:
        assert_dyed(dye, generation.result(60))


def test_a_paused_engine_can_be_closed(dye: Dye) -> None:
    engine = TransformersEngine(dye.model(), EngineConfig(**CAPTURE))
    engine.pause()
    generation = engine.submit([1, 2, 3], SamplingParams(4), return_routes=True)
    engine.close()
    assert_dyed(dye, generation.result(1))


def test_an_engine_that_is_being_closed_is_not_paused(dye: Dye) -> None:
    """It would never have finished what is queued."""
    engine = TransformersEngine(dye.model(), EngineConfig(**CAPTURE))
    running = engine.submit([1, 2, 3], SamplingParams(300), return_routes=True)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="being closed"):
        engine.pause()
    closing.join(60)
    assert not closing.is_alive()
    assert_dyed(dye, running.result(1))


@pytest.mark.parametrize("prompt", [1, 17, 30, 31, 46])
@pytest.mark.parametrize("n", [1, 2])
def test_a_sequence_may_be_as_long_as_the_engine_says(dye: Dye, make_engine, prompt: int, n: int) -> None:
    """Alone in the cache, to its last place."""
    engine = make_engine(dye.model(), kv_cache_tokens=64, max_batch_tokens=40)
    assert 62 <= engine.max_model_len <= 64
    sampling = SamplingParams(engine.max_model_len - prompt, n=n)
    for result in engine.submit(list(range(prompt)), sampling, return_routes=True).results(60):
        assert_dyed(dye, result)


def test_a_hybrid_model_too_may_fill_its_cache(make_engine) -> None:
    engine = make_engine(gpt_oss(), kv_cache_tokens=256, max_batch_tokens=64)
    result = engine.submit([1], SamplingParams(engine.max_model_len - 1), return_routes=True).result(60)
    assert len(result.output_tokens) == engine.max_model_len - 1
    assert result.trace is not None
    assert result.trace.valid_T.all()


def test_a_prompt_that_is_shared_as_a_whole_is_written_again_in_no_page(dye: Dye, make_engine) -> None:
    engine, prompt = make_engine(dye.model(), weight_version="first"), list(range(16))

    def later() -> None:
        engine._versions.append("later")
        engine._capture.set_version(1)

    first = engine.submit(prompt, SamplingParams(200), return_routes=True)
    time.sleep(0.1)
    engine._loop.call(later).result(60)
    assert_dyed(dye, engine.submit(prompt, SamplingParams(3), return_routes=True).result(60))
    trace = first.result(60).trace
    assert trace is not None
    assert [span.version for span in trace.weight_spans] == ["first", "later"]


def after_step(engine: TransformersEngine, number: int, call: Any) -> None:
    """`call()` on a thread of its own; what it wants of the generation thread is done before the next step."""
    steps = itertools.count(1)

    def step(own: Any, model: Any) -> None:
        own(model)
        if next(steps) == number:
            threading.Thread(target=call).start()
            while engine._loop._tasks.empty():
                time.sleep(0.001)

    engine._loop.join(engine._manager.batch_processor, "_generation_step", step)


def rerouted(dye: Dye) -> tuple[Dye, dict[str, torch.Tensor]]:
    """A dye of the same shape that routes otherwise, and its weights."""
    other = Dye()
    other.route = lambda token, layer: dye.route((token + 31) % dye.vocab, layer)  # type: ignore[method-assign]
    return other, other.model().state_dict()


def test_new_weights_number_the_rows_and_old_pages_are_not_served_as_new(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), weight_version="old")
    other, weights = rerouted(dye)
    prompts = prompts_of(dye, 6, shared=64)
    for result in generate(engine, prompts):
        assert_dyed(dye, result)
    assert engine.submit([1], SamplingParams(2)).result(60).weight_version == "old"
    engine.update_weights(weights, "new")
    assert engine.weight_version == "new"
    assert engine.submit([1], SamplingParams(2)).result(60).weight_version == "new"  # known without a trace too
    for result in generate(engine, prompts) + generate(engine, prompts):
        assert_dyed(other, result)
        assert result.trace is not None
        assert result.trace.weight_spans == (WeightSpan(0, "new"),)


def _last_version(result: GenerateResult) -> str | None:
    assert result.trace is not None
    return result.trace.weight_version(result.trace.num_rows - 1)


def test_a_request_under_way_has_rows_of_both_weights_and_says_where(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), weight_version="old")
    other, weights = rerouted(dye)
    prompts = prompts_of(dye, 6, shared=64)
    running = [engine.submit(prompt, SamplingParams(300), return_routes=True) for prompt in prompts]
    time.sleep(0.1)
    engine.update_weights(weights, "new")
    later = [engine.submit(prompt, SamplingParams(5), return_routes=True) for prompt in prompts]
    split_somewhere = 0
    for generation in running:
        result = generation.result(60)
        tokens = (result.prompt_tokens + result.output_tokens)[:-1]
        trace = result.trace
        assert trace is not None
        assert trace.valid_T.all()
        spans = list(trace.weight_spans)
        split_somewhere += len(spans) == 2
        assert [span.version for span in spans] in (["old", "new"], ["new"], ["old"])
        split = spans[1].start if len(spans) == 2 else 0 if spans[0].version == "new" else len(tokens)
        np.testing.assert_array_equal(trace.experts_TLK[:split], dye.routes(tokens)[:split])
        np.testing.assert_array_equal(trace.experts_TLK[split:], other.routes(tokens)[split:])
    assert split_somewhere
    for generation in later:
        assert_dyed(other, generation.result(60))
        assert generation.result().weight_version == "new"
    assert all(gen.result().weight_version == _last_version(gen.result()) for gen in running)
    for result in generate(engine, prompts):  # pages that were completed across the update are not shared either
        assert_dyed(other, result)


def test_forks_of_a_prompt_that_new_weights_interrupt_bring_no_old_page(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), max_batch_tokens=12, max_running_requests=12)
    other, weights = rerouted(dye)
    prompt = prompts_of(dye, 1, shared=64)[0]
    after_step(engine, 2, lambda: engine.update_weights(weights, "new"))
    for result in engine.submit(prompt, SamplingParams(40, n=3), return_routes=True).results(60):
        assert result.trace is not None
        assert len(result.trace.weight_spans) == 2
    assert_dyed(other, engine.submit(prompt, SamplingParams(3), return_routes=True).result(60))


def test_rows_of_a_prompt_under_way_are_those_computed_so_far(dye: Dye, make_engine) -> None:
    """Its pages hold rows of who had them before, perhaps of the very same tokens."""
    engine = make_engine(dye.model(), kv_cache_tokens=128, max_batch_tokens=20, max_running_requests=16)
    other, weights = rerouted(dye)
    prompt, read = list(range(60)), []
    for _ in range(4):
        engine.submit(prompt, SamplingParams(2), return_routes=True).result(60)
        engine.update_weights(weights, "new")
    engine.pause()
    running = engine.submit(prompt, SamplingParams(2), return_routes=True)
    after_step(engine, 1, lambda: read.append(engine.read_routes(running, 0, [], 0)))
    engine.resume()
    assert_dyed(other, running.result(60))
    assert read[0].num_rows <= 20
    np.testing.assert_array_equal(read[0].experts_TLK, other.routes(prompt)[: read[0].num_rows])


def broken(weights: dict[str, torch.Tensor]) -> list[tuple[str, dict[str, torch.Tensor]]]:
    name = "model.layers.1.mlp.gate.weight"
    return [
        ("missing", {key: value for key, value in weights.items() if key != name}),
        ("not the model's", {**weights, "extra": torch.zeros(1)}),
        ("shape", {**weights, name: weights[name][:, :-1]}),
        ("kind of numbers", {**weights, name: weights[name].long()}),
        ("not finite", {**weights, name: weights[name] * float("nan")}),
    ]


@pytest.mark.parametrize("case", range(5))
def test_weights_that_do_not_fit_change_nothing(dye: Dye, make_engine, case: int) -> None:
    engine = make_engine(dye.model(), weight_version="old")
    message, weights = broken(rerouted(dye)[1])[case]
    with pytest.raises(EngineError, match=message):
        engine.update_weights(weights, "new")
    assert engine.weight_version == "old"
    assert_dyed(dye, generate(engine, [[1, 2, 3]])[0])


def test_new_weights_for_an_engine_that_died_are_an_error_not_a_hang(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())

    def die() -> bool:
        raise RuntimeError("out of memory, say")

    engine._manager.batch_processor.prepare_next_batch = die
    with pytest.raises(EngineError, match="stopped"):
        engine.update_weights(rerouted(dye)[1], "new")


def test_new_weights_from_a_checkpoint_folder(dye: Dye, make_engine, tmp_path) -> None:
    engine = make_engine(dye.model())
    other = rerouted(dye)[0]
    other.model().save_pretrained(tmp_path)
    engine.update_weights(str(tmp_path), "new")
    assert_dyed(other, generate(engine, [[1, 2, 3]])[0])


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(dye: Dye, make_engine, tmp_path) -> None:
    rerouted(dye)[0].model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    engine = make_engine(dye.model())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(WeightsError, match=r"1 missing, among them model\.layers\.1\.mlp\.gate\.weight"):
            engine.update_weights(str(path), "new")
    assert_dyed(dye, generate(engine, [[1, 2, 3]])[0])
    with pytest.raises(EngineError, match="lacks weights"):
        TransformersEngine.load(str(tmp_path))


def gpt_oss(window: int = 16) -> GptOssForCausalLM:
    """Alternating sliding-window and full attention."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=window,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return GptOssForCausalLM(config).eval()


def test_hybrid_attention_keeps_every_row_beyond_the_window(make_engine) -> None:
    """GPT-OSS, against batch-1 eager forwards of the same tokens; no two of its random scores are close."""
    import moetrace

    model = gpt_oss()
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, int(n)).tolist() for n in rng.integers(1, 60, 6)]
    engine = make_engine(model, max_batch_tokens=40)
    generations = [engine.submit(p, SamplingParams(50, n=1 + i % 2), return_routes=True) for i, p in enumerate(prompts)]
    results = [result for generation in generations for result in generation.results(120)]
    engine.close()
    for result in results:
        tokens = torch.tensor([result.prompt_tokens + result.output_tokens], device=DEVICE)
        with torch.no_grad(), moetrace.record(model) as recording:
            model(input_ids=tokens[:, :-1], use_cache=False)
        assert result.trace is not None
        assert result.trace.valid_T.all()
        (expected,) = recording.traces(tokens[:, :-1])
        np.testing.assert_array_equal(result.trace.experts_TLK, expected.experts_TLK)


def test_a_model_with_sliding_attention_only_is_refused_beyond_its_window_and_right_within() -> None:
    dye = Dye(num_layers=3)
    dye.config.layer_types = None
    dye.config.sliding_window = 64
    model = dye.model()
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"] * 3, 64
    with pytest.raises(CaptureError, match="sliding"):
        TransformersEngine(model, EngineConfig(**CAPTURE))
    engine = TransformersEngine(model, EngineConfig(**CAPTURE, max_model_len=64))
    try:
        for result in generate(engine, prompts_of(dye, 8, longest=50)):
            assert_dyed(dye, result)
    finally:
        engine.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_capture_lives_inside_torch_compile(make_engine) -> None:
    """The whole forward is one graph of torch.compile, taps included."""
    dye = Dye(vocab=48, num_experts=16, num_layers=2)
    engine = make_engine(dye.model(), compile_level=1, max_batch_tokens=32, kv_cache_tokens=1024)
    assert engine._manager.batch_processor.model_runner._compiled_varlen is not None
    for result in generate(engine, prompts_of(dye, 6, longest=40)):
        assert_dyed(dye, result)


def test_many_threads_submit_abort_pause_and_update(dye: Dye, make_engine) -> None:
    """No deadlock, no lost future; rows are those of one of the two weights."""
    engine = make_engine(dye.model(), weight_version="0", kv_cache_tokens=1024)
    other, weights = rerouted(dye)
    own = {name: tensor.clone() for name, tensor in dye.model().state_dict().items()}
    stop = threading.Event()

    def trouble() -> None:
        for i in range(1, 7):
            engine.pause()
            engine.update_weights(weights if i % 2 else own, str(i))
            engine.resume()
            time.sleep(0.05)
        stop.set()

    thread = threading.Thread(target=trouble)
    thread.start()
    rng = np.random.default_rng(1)
    generations = []
    while not stop.is_set():
        prompt = rng.integers(0, dye.vocab, int(rng.integers(1, 40))).tolist()
        generations.append(engine.submit(prompt, SamplingParams(int(rng.integers(1, 30)), n=2), return_routes=True))
        if rng.random() < 0.3:
            engine.abort(generations[int(rng.integers(len(generations)))].request_id)
        time.sleep(0.005)
    thread.join()
    for generation in generations:
        for result in generation.results(120):
            trace, tokens = result.trace, result.prompt_tokens + result.output_tokens
            assert trace is not None
            spans = [*trace.weight_spans, WeightSpan(trace.num_rows, "")]
            routes = [dye.routes(tokens)[:-1], other.routes(tokens)[:-1]]
            for span, following in itertools.pairwise(spans):
                rows = slice(span.start, following.start)
                valid = trace.valid_T[rows]
                expected = routes[int(span.version) % 2][rows]
                np.testing.assert_array_equal(trace.experts_TLK[rows][valid], expected[valid])
