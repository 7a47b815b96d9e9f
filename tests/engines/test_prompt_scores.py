"""Log-probabilities of prompts are those of a forward of the prompt alone, however it was cut and batched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dye import Dye
from tapped import NAMES
from test_transformers_engine import CAPTURE, TINY, assert_dyed
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from moetrace.conformance import zoo
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine, prompt_scores
from moetrace.engines.transformers.prompt_scores import PromptScores, keeping_outputs, logprobs_of
from moetrace.errors import EngineError, RequestError
from moetrace.recorder import StepSlots

TEXT = b"In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness"
SCORE = SamplingParams(0)


@pytest.fixture(scope="module")
def reference() -> Any:
    """Log-probabilities of a prompt's tokens but the first, by a batch-1 eager forward."""
    eager = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()

    def logprobs(prompt: list[int]) -> np.ndarray:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = eager(ids).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()

    return logprobs


@pytest.fixture(scope="module")
def make_engine() -> Iterator[Any]:
    made = []

    def make(**knobs: Any) -> TransformersEngine:
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        made.append(TransformersEngine(model, EngineConfig(**{**CAPTURE, **knobs})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def engine(make_engine) -> TransformersEngine:
    return make_engine(max_batch_tokens=48)


@pytest.fixture(scope="module")
def dyed() -> Iterator[TransformersEngine]:
    model = Dye().model()
    model.generation_config.eos_token_id = 20
    engine = TransformersEngine(model, EngineConfig(**CAPTURE))
    yield engine
    engine.close()


def score(engine: TransformersEngine, prompt: list[int], sampling: SamplingParams = SCORE) -> GenerateResult:
    return engine.submit(prompt, sampling, return_prompt_logprobs=True).result(60)


def assert_scored(reference: Any, result: GenerateResult) -> None:
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    np.testing.assert_allclose(np.array(result.prompt_logprobs[1:], float), reference(result.prompt_tokens), atol=2e-4)


@pytest.mark.parametrize("knobs", [{}, {"prefix_sharing": False}, {"enable_return_routed_experts": False}], ids=str)
@pytest.mark.parametrize("max_batch_tokens", [7, 64, 512])
def test_chunks_batches_and_shared_prefixes_change_nothing(
    reference, make_engine, max_batch_tokens: int, knobs: dict
) -> None:
    engine = make_engine(max_batch_tokens=max_batch_tokens, **knobs)
    others = [engine.submit(list(TEXT[:50]), SamplingParams(12)) for _ in range(2)]
    running = []
    for i, (start, stop) in enumerate([(0, 1), (0, 2), (0, 45), (40, 73), (0, 48), (9, 90), (0, 100), (0, 100)]):
        sampling = SamplingParams(i % 3, do_sample=True, temperature=3.0, top_k=9)
        running.append(engine.submit(list(TEXT[start:stop]), sampling, return_prompt_logprobs=True))
    for i, generation in enumerate(running):
        result = generation.result(60)
        assert_scored(reference, result)
        assert len(result.output_tokens) == i % 3
    assert all(other.result(60).prompt_logprobs is None for other in others)


def test_a_prompt_whose_pages_are_there_already_is_computed_again_and_then_shared(reference, engine) -> None:
    prompt = list(TEXT[:70])
    for _ in range(3):
        assert_scored(reference, score(engine, prompt))
    shared = engine.submit(prompt, SamplingParams(5), return_routes=True).result(60)
    assert shared.trace is not None
    assert shared.trace.valid_T.all()
    assert_scored(reference, score(engine, prompt + shared.output_tokens))


def test_forks_have_the_scores_of_their_one_prompt(reference, engine) -> None:
    sampling = SamplingParams(6, n=3, do_sample=True)
    results = engine.submit(list(TEXT[:60]), sampling, return_prompt_logprobs=True).results(60)
    for result in results:
        assert_scored(reference, result)
    assert len({tuple(result.prompt_logprobs) for result in results}) == 1


def test_preempted_requests_are_scored_too(reference, make_engine) -> None:
    engine = make_engine(kv_cache_tokens=192, max_batch_tokens=48)
    offloading, preempted = engine._loop._offloading, list[int]()
    own = offloading.offload_requests

    def count_and_offload() -> object:
        preempted.append(1)
        return own()

    offloading.offload_requests = count_and_offload
    running = [
        engine.submit(list(TEXT[i : i + 40]), SamplingParams(60, ignore_eos=True), return_prompt_logprobs=True)
        for i in range(8)
    ]
    for generation in running:
        assert_scored(reference, generation.result(60))
    assert preempted


def test_a_position_is_scored_once_and_a_gap_is_never_filled() -> None:
    scores = PromptScores([5, 6, 7, 8, 9])
    assert scores.due(0, 3) == range(3)
    assert scores.targets(range(3)) == [6, 7, 8]
    scores.add(torch.tensor([-1.0, -2.0, -3.0]), None)
    assert not scores.is_complete
    assert scores.values() == [None, -1.0, -2.0, -3.0, None]
    assert not scores.due(0, 3)  # computed again after a preemption
    assert scores.due(0, 9) == range(3, 4)
    assert not PromptScores([5, 6, 7]).due(1, 2)  # the position before was never seen
    scores.add(torch.tensor([-4.0]), None)
    assert scores.is_complete
    assert not scores.due(0, 9)
    assert PromptScores([5]).is_complete
    assert PromptScores([5]).values() == [None]


def test_rows_of_a_step_are_those_of_positions_that_are_not_scored_yet(dyed) -> None:
    """Such as of a prompt that was preempted in its middle, and comes again from its first position or a later one."""
    scores = dyed._scorer.watch("preempted", list(range(10)))
    scores.add(torch.zeros(4), None)
    step = [
        FutureRequestState(RequestState(name, list(range(10)), position_offset=start), False, {}, count)
        for name, start, count in [("other", 0, 5), ("preempted", 2, 6), ("other", 7, 3), ("preempted", 4, 6)]
    ]
    due = [(part.positions, part.row) for part in dyed._scorer._due_in(step)]
    assert due == [(range(4, 8), 5 + 2), (range(4, 9), 5 + 6 + 3)]
    dyed._scorer.drop("preempted")


def test_new_weights_in_the_middle_of_a_prompt_score_what_comes_after_them(reference, make_engine) -> None:
    """Their log-probabilities are those of the weights that computed them."""
    held, chunks, two = make_engine(max_batch_tokens=16), list[int](), threading.Event()

    def pause_after_two_chunks(step: Any, *args: Any) -> None:
        chunks.append(1)
        if len(chunks) == 2:
            held.pause()
            two.set()
        step(*args)

    held._loop.join(held._loop._processor, "_generation_step", pause_after_two_chunks)
    generation = held.submit(list(TEXT[:60]), SCORE, return_prompt_logprobs=True)
    assert two.wait(60)
    state = {name: tensor.clone() for name, tensor in held._model.state_dict().items()}
    state["lm_head.weight"] *= 0.5
    held.update_weights(state, "halved")
    held.resume()
    result = generation.result(60)
    assert result.prompt_logprobs is not None
    expected = reference(result.prompt_tokens)
    np.testing.assert_allclose(result.prompt_logprobs[1:33], expected[:32], atol=2e-4)
    assert np.abs(np.array(result.prompt_logprobs[33:]) - expected[32:]).max() > 0.1


def test_logits_come_some_at_a_time(reference, engine, monkeypatch) -> None:
    sizes = list[int]()
    engine._model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    monkeypatch.setattr(prompt_scores, "_MOST_LOGITS", 10 * engine.vocab_size)
    assert_scored(reference, score(engine, list(TEXT[:45])))
    assert sizes == [1, 10, 10, 10, 10, 4]


def test_nothing_more_runs_while_nobody_asks(dyed, monkeypatch) -> None:
    heads, steps = list[int](), list[int]()
    handle = dyed._model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output.shape[1]))
    own = dyed._capture.after_forward

    def count(step: StepSlots) -> None:
        steps.append(len(step.tokens_N))
        own(step)

    monkeypatch.setattr(dyed._capture, "after_forward", count)
    monkeypatch.setattr(prompt_scores, "keeping_outputs", None)
    dyed.submit(list(range(40)), SamplingParams(5), return_routes=True).result(60)
    handle.remove()
    assert len(heads) == len(steps) == 5
    assert not dyed._scorer._asking


def test_a_scoring_request_generates_nothing_and_has_every_row(dyed) -> None:
    for prompt in ([19], list(range(18)), [*range(10, 20), 19]):  # the token that is dropped ends sequences
        sampling = SamplingParams(0, stop_token_ids=(20,), stop_sequences=((19, 20),))
        result = dyed.submit(prompt, sampling, return_routes=True, return_prompt_logprobs=True).result(60)
        assert (result.output_tokens, result.logprobs, result.finish_reason) == ([], [], "length")
        trace = result.trace
        assert trace is not None
        assert trace.num_rows == trace.num_valid == len(prompt) == trace.num_tokens
        np.testing.assert_array_equal(trace.experts_TLK, Dye().routes(prompt))
        later = dyed.submit([*prompt, 3, 4], SamplingParams(2), return_routes=True).result(60).trace
        assert trace.concat(later.slice(len(prompt), later.stop)).num_rows == len(prompt) + 3
        assert result.prompt_logprobs is not None
        assert len(result.prompt_logprobs) == len(prompt)


def test_a_scored_prompt_may_fill_the_window(dyed) -> None:
    prompt = [token % 96 for token in range(dyed.max_model_len)]
    result = dyed.submit(prompt, SCORE, return_routes=True, return_prompt_logprobs=True).result(60)
    assert result.trace is not None
    np.testing.assert_array_equal(result.trace.experts_TLK, Dye().routes(prompt))
    assert min(result.prompt_logprobs[1:96]) > -1e-3
    assert result.prompt_logprobs[96] > -1e-3  # 95 is followed by 0
    with pytest.raises(RequestError, match=r"longer than the model's window.*at most 512"):
        dyed.submit([*prompt, 1], SCORE, return_routes=True)


def test_an_aborted_request_has_what_was_computed(dyed) -> None:
    dyed.pause()
    generation = dyed.submit(list(range(9)), SCORE, return_routes=True, return_prompt_logprobs=True)
    dyed.abort(generation.request_id)
    result = generation.result(60)
    dyed.resume()
    assert (result.finish_reason, result.output_tokens) == ("abort", [])
    assert result.prompt_logprobs == [None] * 9
    assert result.trace is not None
    assert (result.trace.num_rows, result.trace.num_valid) == (9, 0)
    assert not dyed._scorer._asking


def test_scores_that_were_lost_fail_their_request_alone(dyed, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(PromptScores, "due", lambda self, start, count: range(0))
        with pytest.raises(EngineError, match="log-probabilities of the prompt are missing"):
            score(dyed, [1, 2, 3])
    assert_dyed(Dye(), dyed.submit([1, 2, 3], SamplingParams(4), return_routes=True).result(60))


def test_what_cannot_be_scored_is_refused_by_name(dyed, monkeypatch) -> None:
    with pytest.raises(RequestError, match="nothing is to be generated, and nothing of the prompt to be returned"):
        dyed.submit([1, 2], SCORE)
    with pytest.raises(RequestError, match="n is out of range: expected 1 where nothing is generated"):
        SamplingParams(0, n=2)
    with monkeypatch.context() as patched:
        patched.setattr(dyed._scorer._runner, "supports_logits_to_keep", lambda model: False)
        with pytest.raises(RequestError, match=r"head cannot run by itself.*got Qwen3MoeForCausalLM"):
            score(dyed, [1, 2])


@pytest.mark.parametrize("name", NAMES)
def test_every_familys_head_runs_alone_as_after_its_body(name: str) -> None:
    """Soft caps and scales after the head count; nothing here knows of them."""
    model: Any = zoo.tiny(zoo.architecture(name))
    if model.base_model is model or not model._supports_logits_to_keep():
        pytest.skip("refused by name")
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except TypeError as error:
        if transformers.__version__ != "5.17.0":
            raise
        pytest.skip(f"the model itself does not run so in this release ({error})")
    with torch.no_grad(), keeping_outputs(model.base_model) as outputs:
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        (output,) = outputs
        scored = logprobs_of(
            model, {"input_ids": ids, "use_cache": False}, output, list(range(2, 11)), ids[0, 3:].tolist()
        )
    expected = logits.log_softmax(-1)[2:11].gather(1, ids[0, 3:, None])[:, 0]
    np.testing.assert_allclose(scored, expected, atol=1e-4)
    assert "forward" not in vars(model.base_model)
