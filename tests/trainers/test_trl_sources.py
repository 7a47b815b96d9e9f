"""Wherever TRL generates, the routes that reach its batch are those of the dye checkpoint's closed form.

vLLM is a stand-in with the documented form of its answers; everything else is the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from asking import DYE, dyed_engine
from fake_vllm import FakeLLM, fake_server
from serving import serving
from traces import refused
from transformers import ContinuousBatchingConfig, GenerationConfig
from trl.generation import vllm_client, vllm_generation
from trl_runs import small_model, trainer_of

import moetrace
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.engines.transformers.batches import record_batches
from moetrace.errors import EngineError, RolloutError, RouterError
from moetrace.recorder.generation import record_generation
from moetrace.server import create_app
from moetrace.trainers.trl import ServerRollout
from moetrace.trainers.trl.rollouts import Rollout
from moetrace.trainers.trl.trainer import BATCH_KEY

BATCHING: dict[str, Any] = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 16, "max_batch_tokens": 64},
}
VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}


def generated(trainer: Any) -> list[Rollout]:
    """The sequences of one step, as TRL's batch carries them; the step was replayed."""
    seen: list[Rollout] = []
    own = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        seen.extend(inputs[BATCH_KEY])
        return own(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert trainer.state.log_history[0]["r3/coverage"] == 1
    return seen


def assert_dyed(rollouts: list[Rollout], new_tokens: int = 8) -> None:
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert rollout.trace.tokens is not None
        tokens = rollout.trace.tokens.tolist()
        prompt = tokens[: rollout.num_prompt_tokens]
        assert tokens == prompt + DYE.continuation(prompt[-1], new_tokens)
        np.testing.assert_array_equal(rollout.trace.experts_TLK, DYE.routes(tokens[:-1]))
        assert rollout.trace.valid_T.all()
        assert len(rollout.logprobs) == new_tokens


@pytest.mark.parametrize("config", [{}, BATCHING], ids=["generate", "continuous batching"])
def test_generation_by_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, DYE.model(), **config)
    rollouts = generated(trainer)
    assert_dyed(rollouts)
    assert all(-1e-3 < logprob <= 0 for rollout in rollouts for logprob in rollout.logprobs)
    assert not {"generate", "generate_batch", "init_continuous_batching"} & set(vars(trainer.model))
    assert trainer.state.log_history[0]["r3/kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("config", [{}, BATCHING], ids=["generate", "continuous batching"])
def test_sampled_sequences_have_the_routes_and_logprobs_of_a_plain_forward(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """A trained forward of one sequence alone says what is right; sampled at a temperature, ended by itself."""
    trainer = trainer_of(tmp_path, small_model(tmp_path), temperature=0.8, learning_rate=0.0, **config)
    for rollout in generated(trainer):
        tokens = torch.tensor(rollout.trace.tokens)[None]
        with torch.no_grad(), moetrace.record(trainer.model) as recording:
            logits = trainer.model(tokens).logits[0]
        assert moetrace.compare(rollout.trace, recording.traces(tokens)[0]).router_mismatch == 0
        first = rollout.num_prompt_tokens
        right = (logits / 0.8).log_softmax(-1)[first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, right.numpy(), atol=1e-5)


def tools_of(trainer: Any, results: list[list[int]]) -> Callable[..., Any]:
    """TRL's loop of tools with one round: sequence b goes on after the tokens `results[b]`, where there are any."""

    def loop(prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, logprobs: Any, *_: Any) -> Any:
        masks = [[1] * len(ids) for ids in completion_ids]
        calling = [index for index, result in enumerate(results) if result]
        given = [prompt_ids[index] + completion_ids[index] + results[index] for index in calling]
        turn, _ = trainer._generate_single_turn(given, None, {}, num_generations=1)
        for index, prompt, output in zip(calling, given, turn, strict=True):
            completion_ids[index] = prompt[len(prompt_ids[index]) :] + output
            masks[index] += [0] * len(results[index]) + [1] * len(output)
        return masks, completions, completion_ids, logprobs, len(calling), 0, [[] for _ in masks]

    return loop


def test_a_later_turn_goes_to_its_own_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both samples of a prompt are equal at first; the first one's tool says too much for TRL, and it ends there."""
    trainer = trainer_of(tmp_path, DYE.model(), max_completion_length=4)
    monkeypatch.setattr(trainer, "tools", [print])
    monkeypatch.setattr(trainer, "_tool_call_loop", tools_of(trainer, [[], [50, 51]] * 2))
    for index, rollout in enumerate(sorted(generated(trainer), key=lambda rollout: len(rollout.drawn))):
        assert rollout.trace.tokens is not None
        tokens = rollout.trace.tokens.tolist()
        first = DYE.continuation(tokens[rollout.num_prompt_tokens - 1], 4)
        later = [] if index < 2 else [50, 51, *DYE.continuation(51, 4)]
        assert tokens[rollout.num_prompt_tokens :] == first + later
        assert rollout.drawn.tolist() == [True] * 4 + ([] if index < 2 else [False] * 2 + [True] * 4)
        np.testing.assert_array_equal(rollout.trace.experts_TLK, DYE.routes(tokens[:-1]))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """The stand-in where TRL imports vLLM."""
    monkeypatch.setattr(FakeLLM, "dye", DYE, raising=False)
    monkeypatch.setattr(FakeLLM, "asked", [], raising=False)
    monkeypatch.setattr(vllm_generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    for module in (vllm_generation, vllm_client):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", lambda self, metadata, parameters: None)
    return FakeLLM


def test_vllm_in_the_process(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    trainer = trainer_of(tmp_path, DYE.model(), **VLLM)
    rollouts = generated(trainer)
    assert [options["enable_return_routed_experts"] for options in vllm.asked] == [True]
    assert vllm_generation.LLM is vllm
    assert_dyed(rollouts)
    assert {float(logprob) for rollout in rollouts for logprob in rollout.logprobs} == {-0.25}
    assert trainer.state.log_history[0]["r3/kl"] == pytest.approx(np.exp(0.25) - 1 - 0.25, rel=1e-3)


def test_vllm_as_a_server(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    with serving(fake_server(DYE)) as url:
        trainer = trainer_of(tmp_path, DYE.model(), **VLLM | {"vllm_mode": "server"}, vllm_server_base_url=url)
        assert_dyed(generated(trainer))


def test_a_vllm_server_without_routes_is_refused(tmp_path: Path, vllm: type[FakeLLM]) -> None:
    with serving(fake_server(DYE, returns_routes=False)) as url:
        trainer = trainer_of(tmp_path, DYE.model(), **VLLM | {"vllm_mode": "server"}, vllm_server_base_url=url)
        with pytest.raises(EngineError, match="--enable-return-routed-experts"):
            trainer.train()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with dyed_engine() as dyed, serving(create_app(*dyed)) as url:
        yield url


def test_our_server(tmp_path: Path, url: str) -> None:
    with moetrace.Client(url) as client:
        trainer = trainer_of(
            tmp_path, DYE.model(), more={"rollout_func": ServerRollout(client, weights=tmp_path / "w")}, max_steps=2
        )
        versions: list[str] = []
        own = client.update_weights

        def update_weights(path: str, version: str) -> str:
            versions.append(own(path, version))
            return versions[-1]

        client.update_weights = update_weights  # type: ignore[method-assign]
        rollouts = generated(trainer)
        assert client.model().weight_version == "step-1"
    assert versions == ["step-0", "step-1"]
    assert_dyed(rollouts[:4])
    assert [span.version for rollout in rollouts[4:] for span in rollout.trace.weight_spans] == ["step-1"] * 4


def test_a_server_is_given_the_trainer_s_weights(tmp_path: Path) -> None:
    """An engine that started with other weights has the trainer's after the first generation."""
    theirs = small_model(tmp_path)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.5)
    engine = TransformersEngine(theirs, EngineConfig(enable_return_routed_experts=True, seed=0))
    trainer_model = small_model(tmp_path)
    try:
        with serving(create_app(engine)) as url, moetrace.Client(url) as client:
            rollout = ServerRollout(client, weights=tmp_path / "w")
            generated(trainer_of(tmp_path, trainer_model, more={"rollout_func": rollout}, learning_rate=0.0))
        for ours, new in zip(trainer_model.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(ours, new)
    finally:
        engine.close()


def test_an_address_is_no_client() -> None:
    with refused(RolloutError, "asked by a client", expected="a moetrace.Client", got="'http://localhost:8000'"):
        ServerRollout("http://localhost:8000", weights=None)  # type: ignore[arg-type]


def test_sampling_that_the_server_does_not_have_is_refused(tmp_path: Path, url: str) -> None:
    with moetrace.Client(url) as client:
        more = {"rollout_func": ServerRollout(client, weights=None)}
        trainer = trainer_of(tmp_path, DYE.model(), more=more, repetition_penalty=1.1)
        with pytest.raises(RolloutError, match="repetition_penalty"):
            trainer.train()


def generate_with(**options: Any) -> Callable[[Any, dict], Any]:
    return lambda model, batch: model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "run",
    [generate_with(num_beams=2), generate_with(use_cache=False), lambda model, batch: None],
    ids=["beams", "no cache", "nothing"],
)
def test_generation_that_cannot_be_recorded_is_refused(run: Callable[[Any, dict], Any]) -> None:
    model, prompts = DYE.model(), [[5, 6, 7], [1, 2, 3]]
    batch = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with record_generation(model) as recording:
        run(model, batch)
    with pytest.raises(RouterError, match=r"generate did not run|nothing was generated"):
        recording.traces(prompts, [[8, 9, 10, 11], [4, 5, 6, 7]])


def test_sequences_of_one_prompt_in_a_batch_are_all_recorded() -> None:
    model = DYE.model()
    config = GenerationConfig(max_new_tokens=4, do_sample=True, num_return_sequences=2, eos_token_id=-1)
    with record_batches(model) as recording:
        batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        model.generate_batch([[5, 6, 7], [1]], generation_config=config, continuous_batching_config=batching)
    assert len(recording.sequences) == 4
    for sequence in recording.sequences:
        assert sequence.logprobs is None
        tokens = sequence.prompt_tokens + sequence.tokens
        np.testing.assert_array_equal(sequence.trace.experts_TLK, DYE.routes(tokens[:-1]))
