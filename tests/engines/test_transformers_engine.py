"""The embedded engine returns the right rows, or says why it will not."""

from __future__ import annotations

import json
import shutil
import threading
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moetrace
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import CaptureOffError, EngineError, NotMoeError, RequestError, WeightsError
from moetrace.recorder import StepSlots
from moetrace.routers import find_routers
from moetrace.trace import RoutingTrace, WeightSpan

TINY = "models/tiny-qwen3-moe"
CAPTURE: dict[str, Any] = {"enable_return_routed_experts": True, "page_size": 16, "seed": 0}


def generate(
    engine: TransformersEngine, prompts: list[list[int]], max_new_tokens: int = 12, **sampling: object
) -> list[GenerateResult]:
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    futures = [engine.submit(prompt, params, return_routes=True) for prompt in prompts]
    return [future.result(timeout=120) for future in futures]


def prompts_of(dye: Dye, count: int, shared: int = 0, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Random prompts; every second one begins with the same `shared` tokens."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, dye.vocab, shared).tolist()
    lengths = rng.integers(1, longest, count)
    return [(prefix if i % 2 else []) + rng.integers(0, dye.vocab, n).tolist() for i, n in enumerate(lengths)]


def count_computed(engine: TransformersEngine) -> list[int]:
    """A list that grows by every token the engine computes from now on (on a CPU, where steps have no padding)."""
    capture, tokens = engine._capture, list[int]()
    assert capture is not None
    own = capture.after_forward

    def count(step: StepSlots) -> None:
        tokens.extend(step.tokens_N.tolist())
        own(step)

    capture.after_forward = count  # type: ignore[method-assign]
    return tokens


def leave_nan_in_padding(model: Any) -> list[int]:
    """Let attention put out NaN for padding, as flash attention may, which leaves those rows as memory was. The list
    grows by the rows of each step in which it did."""
    rows: list[int] = []

    def leave(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
        hidden_ND, ends = output[0].view(-1, output[0].shape[-1]), kwargs["cu_seq_lens_q"]
        if kwargs["block_table"] is None:
            rows.append(len(hidden_ND))
            is_padding_N = torch.arange(len(hidden_ND), device=hidden_ND.device) >= ends[-1]
            hidden_ND.masked_fill_(is_padding_N[:, None], torch.nan)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(leave, with_kwargs=True)
    return rows


def assert_dyed(dye: Dye, result: GenerateResult) -> None:
    """Every row is there and is the closed form's, in rank order."""
    trace = result.trace
    assert trace is not None
    tokens = result.prompt_tokens + result.output_tokens
    assert result.output_tokens == dye.continuation(result.prompt_tokens[-1], len(result.output_tokens))
    assert trace.num_rows == len(tokens) - 1
    assert trace.valid_T.all()
    assert trace.layout.layers == dye.layers
    assert trace.order == "rank"
    np.testing.assert_array_equal(trace.experts_TLK, dye.routes(tokens[:-1]))


@pytest.fixture(scope="module")
def dye() -> Dye:
    return Dye()


@pytest.fixture
def make_engine(request: pytest.FixtureRequest):
    def make(model: torch.nn.Module, **knobs: object) -> TransformersEngine:
        engine = TransformersEngine(model, EngineConfig(**{**CAPTURE, **knobs}))  # type: ignore[arg-type]
        request.addfinalizer(engine.close)
        return engine

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_are_right_in_rank_order_greedy_and_sampled(dye: Dye, make_engine, dtype, do_sample) -> None:
    engine = make_engine(dye.model(dtype))
    for result in generate(engine, prompts_of(dye, 12), do_sample=do_sample, temperature=0.7, top_p=0.9, top_k=5):
        assert_dyed(dye, result)


@pytest.mark.parametrize("max_batch_tokens", [5, 16, 33])
def test_chunked_prefill_puts_every_chunk_at_its_own_positions(dye: Dye, make_engine, max_batch_tokens) -> None:
    engine = make_engine(dye.model(), max_batch_tokens=max_batch_tokens)
    for result in generate(engine, prompts_of(dye, 8, longest=120)):
        assert_dyed(dye, result)


def test_reused_prefixes_bring_the_rows_of_whoever_computed_them(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), max_batch_tokens=64)
    computed = count_computed(engine)
    prompts = prompts_of(dye, 10, shared=50)
    first = generate(engine, prompts)
    again = generate(engine, [result.prompt_tokens + result.output_tokens for result in first])
    for result in first + again:
        assert_dyed(dye, result)
    assert engine.capture is not None
    assert engine.capture.rows - len(computed) > 400  # so many rows were returned but not computed again


def test_a_fully_cached_prompt_still_has_all_its_rows(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    prompt = prompts_of(dye, 1, longest=2)[0] * 64  # four pages, nothing left over
    for _ in range(3):
        assert_dyed(dye, generate(engine, [prompt])[0])


def test_a_page_given_to_another_request_does_not_keep_its_old_rows(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), kv_cache_tokens=128)
    for seed in range(12):  # each round evicts the pages of the one before
        for result in generate(engine, prompts_of(dye, 4, shared=32, longest=40, seed=seed)):
            assert_dyed(dye, result)


def test_preempted_requests_return_every_row(dye: Dye, make_engine, caplog) -> None:
    engine = make_engine(dye.model(), kv_cache_tokens=160, max_batch_tokens=48)
    offload = engine._manager.batch_processor.offloading_manager
    offloaded = []
    original = offload.offload_requests

    def count_and_offload() -> object:
        offloaded.append(1)
        return original()

    offload.offload_requests = count_and_offload
    for result in generate(engine, prompts_of(dye, 12, longest=30), max_new_tokens=60):
        assert_dyed(dye, result)
    assert offloaded, "the cache was not small enough to preempt anything"


def test_prefix_sharing_can_be_turned_off(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), prefix_sharing=False)
    computed = count_computed(engine)
    for result in generate(engine, prompts_of(dye, 8, shared=50)):
        assert_dyed(dye, result)
    assert engine.capture.rows == len(computed)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 30), st.booleans()), min_size=1, max_size=10),
    seed=st.integers(0, 2**16),
)
def test_any_mix_of_requests_returns_the_right_rows(shared_engine, dye: Dye, lengths, seed) -> None:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, dye.vocab, 40).tolist()
    futures = []
    for length, max_new_tokens, shares in lengths:
        prompt = (prefix if shares else []) + rng.integers(0, dye.vocab, length).tolist()
        futures.append(shared_engine.submit(prompt, SamplingParams(max_new_tokens), return_routes=True))
    for future in futures:
        assert_dyed(dye, future.result(timeout=120))


@pytest.fixture(scope="module")
def shared_engine(dye: Dye):
    knobs = {**CAPTURE, "kv_cache_tokens": 512, "max_batch_tokens": 40}
    engine = TransformersEngine(dye.model(), EngineConfig(**knobs))
    yield engine
    engine.close()


def test_requests_submitted_from_many_threads_do_not_mix(shared_engine, dye: Dye) -> None:
    results: list[GenerateResult] = []

    def client(seed: int) -> None:
        results.extend(generate(shared_engine, prompts_of(dye, 4, shared=20, seed=seed)))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    for result in results:
        assert_dyed(dye, result)


def test_rows_and_logprobs_equal_a_batch_1_eager_forward(make_engine) -> None:
    engine = make_engine(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32))
    texts = [b"In the beginning God", b"And the LORD spake unto Moses, saying,", b"Blessed are they that", b"Z"]
    results = generate(engine, [list(text) for text in texts], max_new_tokens=40, do_sample=True, temperature=0.8)
    eager = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for result in results:
        ids = torch.tensor([result.prompt_tokens + result.output_tokens])
        with torch.no_grad(), moetrace.record(eager) as recording:
            logits = eager(ids).logits[0] / 0.8
        reference = recording.traces(ids)[0]
        assert isinstance(result.trace, RoutingTrace)
        # Two float32 passes with other kernels: a tie may fall the other way, a misplaced row would differ everywhere.
        comparison = moetrace.compare(result.trace, reference)
        assert comparison.tokens == result.trace.num_rows == ids.shape[1] - 1
        assert comparison.router_mismatch < 0.01
        for layer in range(1, 4):
            shuffled = np.roll(reference.experts_TLK, layer, axis=1)
            assert (shuffled == reference.experts_TLK).mean() < 0.5, "this text could not tell layers apart"
        logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(result.prompt_tokens) - 1 :, 0]
        np.testing.assert_allclose(result.logprobs, logprobs, atol=2e-3)
        assert result.trace.fingerprint == reference.fingerprint


def test_greedy_takes_the_most_likely_token_and_reports_its_untruncated_logprob(make_engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    engine = make_engine(model)
    prompt = list(b"And it came to pass")
    (result,) = generate(engine, [prompt], max_new_tokens=1)
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)(
            torch.tensor([prompt])
        ).logits[0, -1].log_softmax(-1)  # fmt: skip
    assert result.output_tokens == [int(logprobs.argmax())]
    assert result.logprobs[0] == pytest.approx(float(logprobs.max()), abs=1e-3)
    assert result.logprobs[0] < -1e-4


def test_top_k_1_samples_the_most_likely_token_of_each_request_in_a_mixed_batch(make_engine) -> None:
    engine = make_engine(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32))
    prompt = list(b"And God said, Let there be")
    greedy = engine.submit(prompt, SamplingParams(20))
    first = engine.submit(prompt, SamplingParams(20, do_sample=True, top_k=1))
    wild = [engine.submit(prompt, SamplingParams(20, do_sample=True, temperature=3.0)) for _ in range(4)]
    assert first.result(60).output_tokens == greedy.result(60).output_tokens
    assert len({tuple(future.result(60).output_tokens) for future in wild}) == 4


def test_the_vocabulary_is_sorted_only_while_a_request_truncates(dye: Dye, make_engine, monkeypatch) -> None:
    engine = make_engine(dye.model())
    sorts, own = [], torch.sort

    def sort(scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sorts.extend([1] * (scores.shape[-1] == dye.vocab))
        return own(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "sort", sort)
    for sampling in (SamplingParams(5), SamplingParams(5, do_sample=True, temperature=0.7, n=2)):
        engine.submit([1, 2], sampling).results(60)
    assert not sorts
    for sampling in (SamplingParams(5, do_sample=True, top_p=0.9), SamplingParams(5, do_sample=True, top_p=0.5, n=2)):
        engine.submit([1, 2], sampling).results(60)
    assert len(sorts) >= 10
    seen = len(sorts)
    engine.submit([1, 2], SamplingParams(5, do_sample=True)).result(60)
    assert len(sorts) == seen


def test_an_end_of_sequence_token_stops_a_request_and_ignore_eos_does_not(dye: Dye, make_engine) -> None:
    model = dye.model()
    model.generation_config.eos_token_id = 20
    engine = make_engine(model)
    (stopped,) = generate(engine, [[15]], max_new_tokens=30)
    assert stopped.output_tokens == [16, 17, 18, 19, 20]
    assert stopped.finish_reason == "stop"
    assert_dyed(dye, stopped)
    (ignored,) = generate(engine, [[15]], max_new_tokens=30, ignore_eos=True)
    assert len(ignored.output_tokens) == 30
    assert ignored.finish_reason == "length"
    assert_dyed(dye, ignored)


def test_a_one_token_prompt_with_one_new_token_has_one_row(dye: Dye, shared_engine) -> None:
    (result,) = generate(shared_engine, [[7]], max_new_tokens=1)
    assert_dyed(dye, result)
    assert result.trace is not None
    assert result.trace.num_rows == 1


def test_the_trace_names_its_weights_engine_and_model(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model(), weight_version="step-7")
    trace = generate(engine, [[1, 2, 3]])[0].trace
    assert trace is not None
    assert trace.weight_spans == (WeightSpan(0, "step-7"),)
    assert trace.engine.startswith("transformers 5.")
    assert len(trace.fingerprint) == 64


@pytest.mark.parametrize(("num_experts", "dtype"), [(255, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_expert_counts_at_the_dtype_edges_keep_every_id(make_engine, num_experts, dtype) -> None:
    dye = Dye(vocab=300, num_experts=num_experts, top_k=4, num_layers=3)
    result = generate(make_engine(dye.model()), [list(range(230, 300))])[0]
    assert_dyed(dye, result)
    assert result.trace is not None
    assert result.trace.experts_TLK.dtype == dtype
    assert result.trace.experts_TLK.max() == num_experts - 1


def test_with_capture_off_nothing_is_hooked_and_routes_are_refused(dye: Dye, make_engine) -> None:
    model = dye.model()
    engine = make_engine(model, enable_return_routed_experts=False)
    assert engine.submit([1, 2], SamplingParams(5)).result(60).output_tokens == [3, 4, 5, 6, 7]
    assert engine.layout is None
    assert all("forward" not in vars(site.module) for site in find_routers(model))
    assert "prepare_batch_tensors" not in vars(engine._manager.batch_processor.inputs_and_outputs)
    with pytest.raises(CaptureOffError, match="--enable-return-routed-experts"):
        engine.submit([1, 2], SamplingParams(5), return_routes=True)


def test_a_request_that_does_not_ask_gets_no_trace(shared_engine) -> None:
    assert shared_engine.submit([1], SamplingParams(2)).result(60).trace is None


def test_nothing_is_kept_of_finished_requests(shared_engine) -> None:
    generate(shared_engine, [[1, 2, 3]] * 5)
    shared_engine.submit([1], SamplingParams(2)).result(60)
    assert not shared_engine._capture._histories
    assert not shared_engine._delivery.pending


def test_closing_leaves_the_model_as_it_was(dye: Dye) -> None:
    model = dye.model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    engine = TransformersEngine(model, EngineConfig(**CAPTURE))
    processor = engine._manager.batch_processor
    assert "_generation_step" in vars(processor)
    assert all("forward" in vars(site.module) for site in find_routers(model))  # tapped once, not step by step
    generate(engine, [[1, 2, 3]])
    engine.close()
    engine.close()
    assert "_generation_step" not in vars(processor)
    assert "_get_forward_fn" not in vars(processor.model_runner)
    assert "free_blocks" not in vars(processor.cache)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(attributes) for name, attributes in before.items()
    }
    assert model.config._attn_implementation == attention
    with pytest.raises(EngineError, match="stopped"):
        engine.submit([1], SamplingParams(1))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([3, 96], {}, r"position 1 is out of range.*0 <= id < 96.*got 96"),
        ([-1], {}, "position 0 is out of range"),
        ([1] * 512, {}, "longer than the model's window.*at most (511|509)"),
        ([1] * 500, {"max_new_tokens": 13}, "max_new_tokens does not fit.*at most (12|10) after a prompt of 500"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    shared_engine, dye: Dye, prompt, params, message
) -> None:
    with pytest.raises(RequestError, match=message):
        shared_engine.submit(prompt, SamplingParams(**params))
    assert_dyed(dye, generate(shared_engine, [[1, 2, 3]])[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", -3), ("seed", 2**63), ("temperature", 0.0), ("top_p", 1.5), ("top_k", 0)],
)
def test_sampling_parameters_out_of_range_are_refused(name, value) -> None:
    with pytest.raises(RequestError, match=f"{name} is out of range"):
        SamplingParams(**{name: value})


def test_when_the_generation_thread_dies_waiting_requests_fail_and_health_says_so(dye: Dye, make_engine) -> None:
    engine = make_engine(dye.model())
    processor = engine._manager.batch_processor

    def explode(model: torch.nn.Module) -> None:
        raise RuntimeError("out of memory, say")

    processor._generation_step = explode
    with pytest.raises((EngineError, RequestError), match=r"out of memory|stopped"):
        engine.submit([1, 2], SamplingParams(5)).result(timeout=60)
    engine._delivery._thread.join(timeout=60)
    assert not engine.is_healthy()
    with pytest.raises(EngineError, match="stopped"):
        engine.submit([1, 2], SamplingParams(5))


def dense_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


def test_routes_of_a_dense_model_are_refused_without_naming_a_flag_that_it_refuses(make_engine) -> None:
    engine = make_engine(dense_model(), enable_return_routed_experts=False)
    for asking in (lambda: engine.submit([1, 2], SamplingParams(5), return_routes=True), engine.start_capture):
        with pytest.raises(CaptureOffError, match=r"is a dense model.*Ask without them") as caught:
            asking()
        assert "--enable" not in str(caught.value)


def test_a_dense_model_with_capture_is_refused_before_its_weights_load(tmp_path, monkeypatch) -> None:
    dense_model().save_pretrained(tmp_path)

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(NotMoeError, match=r"dense model.*llama"):
        TransformersEngine.load(str(tmp_path), EngineConfig(**CAPTURE))


def test_an_unknown_model_path_is_refused() -> None:
    with pytest.raises(EngineError, match=r"no model at '\./nowhere'.*no such folder"):
        TransformersEngine.load("./nowhere")


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("model.safetensors", b"\x08\x00\x00\x00", "cannot load the model"),
        ("config.json", None, "cannot read the model"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_our_words(tmp_path, file, data, message) -> None:
    """A copy that was interrupted, and a number of layers that is none."""
    folder = shutil.copytree(TINY, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "five"}
    (folder / file).write_bytes(data or json.dumps(config).encode())
    with pytest.raises(EngineError, match=message):
        TransformersEngine.load(str(folder))
    engine = TransformersEngine.load(TINY)
    with pytest.raises(WeightsError, match="the old ones stay"):
        engine.update_weights(str(folder), "1")
    engine.close()


@pytest.mark.parametrize(("knob", "value"), [("device", "tpu9"), ("max_model_len", 5000)])
def test_knobs_that_the_machine_or_the_model_does_not_have_are_refused(knob, value) -> None:
    with pytest.raises(EngineError, match=str(value)):
        TransformersEngine.load(TINY, EngineConfig(**{knob: value}))


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("dtype", "int8"),
        ("parallel", "pp"),
        ("max_model_len", 1),
        ("kv_cache_tokens", 0),
        ("kv_cache_tokens", -64),
        ("page_size", 0),
        ("page_size", 3),
        ("max_batch_tokens", 0),
        ("max_running_requests", 0),
        ("cpu_offload_gib", -1.0),
        ("cpu_offload_gib", float("nan")),
        ("compile_level", -1),
        ("compile_level", 4),
        ("seed", 2**63),
    ],
)
def test_knobs_out_of_range_are_refused(knob, value) -> None:
    with pytest.raises(EngineError, match=rf"^{knob} is (unknown|out of range): expected .*, got {value}\.$"):
        EngineConfig(**{knob: value})


def test_the_least_of_every_knob_serves(dye: Dye, make_engine) -> None:
    least = {"kv_cache_tokens": 1, "page_size": 4, "max_batch_tokens": 1, "max_running_requests": 1}
    [result] = generate(make_engine(dye.model(), **least, seed=-(2**63)), [[1]], 1)
    assert_dyed(dye, result)


def test_two_engines_in_one_process_do_not_mix() -> None:
    dyes = [Dye(num_experts=32, top_k=4), Dye(num_experts=16, top_k=2)]
    engines = [TransformersEngine(dye.model(), EngineConfig(**CAPTURE)) for dye in dyes]
    futures = [[engine.submit([i, 5], SamplingParams(20), return_routes=True) for i in range(6)] for engine in engines]
    for dye, own in zip(dyes, futures, strict=True):
        for future in own:
            assert_dyed(dye, future.result(timeout=120))
    for engine in engines:
        engine.close()
