"""R3 in TRL's GRPOTrainer: each token of each sequence is replayed by its own row, wherever TRL moves it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from peft import LoraConfig, PromptTuningConfig
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl_runs import Forward, trainer_of, unlike_any, watching

import moetrace
from moetrace.errors import (
    MissingExtraError,
    MissingRowError,
    NotMoeError,
    ReplayError,
    TokenMismatchError,
    UnsupportedRouterError,
)
from moetrace.replayer import ReplayPolicy
from moetrace.routers import fingerprint_of, layout_of
from moetrace.trace import RoutingTrace
from moetrace.trainers.trl import GRPOTrainer, ReplayConfig
from moetrace.trainers.trl.metrics import Distance, shares
from moetrace.trainers.trl.rollouts import Rollout, Rollouts, response_mask

ROWS = {"policy": ReplayPolicy(rows=np.ones((2, 3), bool))}
ANY_SHIFT = ReplayConfig(on_shift="ignore", compare_every=1)
PAD, EOS = 257, 256


class Made:
    """A `rollout_func` that makes completions of all lengths up, with routes that no router would choose."""

    def __init__(self, longest: int = 9) -> None:
        self.longest, self.sequences = longest, dict[tuple[int, ...], int]()
        self.model: Any = None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        rng = np.random.default_rng(len(self.sequences))
        ids = [list(prompt.encode()) for prompt in prompts]
        outputs = [rng.integers(97, 123, 1 + index % self.longest).tolist() for index in range(len(prompts))]
        outputs = [output if index % 3 else [*output, EOS] for index, output in enumerate(outputs)]
        for prompt, output in zip(ids, outputs, strict=True):
            self.sequences[tuple(prompt + output)] = len(prompt)
        return {
            "prompt_ids": ids,
            "completion_ids": outputs,
            "logprobs": [[-1.0] * len(output) for output in outputs],
            "routing_traces": [self.trace(prompt + output) for prompt, output in zip(ids, outputs, strict=True)],
        }

    def trace(self, tokens: list[int], **facts: Any) -> RoutingTrace:
        rows = unlike_any(tokens, self.model)[:-1]
        return RoutingTrace.build(
            rows, layout_of(self.model), tokens, fingerprint=fingerprint_of(self.model), engine="test", **facts
        )


def made_trainer(folder: Path, made: Made, **config: Any) -> Any:
    more = {"rollout_func": made, **config.pop("more", {})}
    trainer = trainer_of(folder, replay=config.pop("replay", ANY_SHIFT), more=more, **config)
    made.model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    return trainer


def assert_replayed(forward: Forward, made: Made) -> None:
    """Every token that has a row, and that attention sees, reached the experts of its own row, in every layer."""
    for row, (ids_S, mask_S) in enumerate(zip(forward.input_ids_BS.tolist(), forward.mask_BS.tolist(), strict=True)):
        first = mask_S.index(1)
        sequence = ids_S[first:]
        while sequence[-1] == PAD:
            sequence.pop()
        rows_TLK = unlike_any(sequence, made.model)
        assert tuple(sequence) in made.sequences
        seen = min(sum(mask_S), len(sequence) - 1)
        assert seen >= made.sequences[tuple(sequence)]
        for layer, passes in forward.received.items():
            for ids_BSK in passes:
                assert ids_BSK[row, first : first + seen].tolist() == rows_TLK[:seen, layer].tolist()


def assert_live(forward: Forward, model: Any) -> None:
    """The routes are those of a forward without any replay."""
    with torch.no_grad(), moetrace.record(model) as recording:
        model(input_ids=forward.input_ids_BS, attention_mask=forward.mask_BS, use_cache=False)
    for layer, passes in forward.received.items():
        for ids_BSK in passes:
            assert torch.equal(ids_BSK.reshape(-1, ids_BSK.shape[-1]), recording.experts_LNK[layer])


STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 6,
    "beta": 0.1,
}
"""Two generations of 8 sequences, each used in 8 microbatches of 2; old and reference log-probabilities."""


@pytest.mark.parametrize(("masked", "checkpointing"), [(False, True), (True, False)], ids=["whole", "masked"])
def test_every_forward_of_the_policy_is_replayed_and_none_of_the_reference(
    tmp_path: Path, masked: bool, checkpointing: bool
) -> None:
    """Also where the completions that were cut are hidden from attention, and where layers are computed twice."""
    made = Made()
    options = {"mask_truncated_completions": masked, "gradient_checkpointing": checkpointing, "pad_to_multiple_of": 8}
    trainer = made_trainer(tmp_path, made, replay=ReplayConfig(on_shift="ignore", compare_every=0), **STEPS, **options)
    with watching(trainer.model) as policy, watching(trainer.ref_model) as reference:
        trainer.train()
    assert len(made.sequences) == 16
    assert len(policy) == 2 * 4 + 12  # old log-probabilities in 4 chunks of each generation, and the microbatches
    assert len(reference) == 2 * 4
    for forward in policy:
        assert sorted(forward.received) == [0, 1]
        assert_replayed(forward, made)
    passes = [len(ids) for forward in policy[-2:] for ids in forward.received.values()]
    assert passes == [2 if checkpointing else 1] * 4
    for forward in reference:
        assert_live(forward, trainer.ref_model)


def test_the_reference_of_a_lora_policy_is_the_same_model_and_not_replayed(tmp_path: Path) -> None:
    made = Made()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    once = STEPS | {"max_steps": 1, "learning_rate": 0.0}  # so that the routers can be asked again afterwards
    trainer = made_trainer(tmp_path, made, more={"peft_config": lora}, **once)
    with watching(trainer.model) as forwards:
        trainer.train()
    live = [forward for forward in forwards if not forward.enabled]
    assert len(live) == 4
    with trainer.model.disable_adapter():
        for forward in live:
            assert_live(forward, trainer.model)
    replayed = [forward for forward in forwards if forward.enabled]
    compared = replayed[4:8]  # after the old log-probabilities: what the routers do by themselves
    assert len(replayed) == 4 + 2 * 4 + 2
    for forward in replayed[:4] + replayed[8:]:
        assert_replayed(forward, made)
    for forward in compared:
        assert_live(forward, trainer.model)


def test_what_is_measured_is_in_the_log(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, Made())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["r3/coverage"] == 1
    assert first["r3/with/router_mismatch"] == first["r3/with/token_mismatch"] == 0
    assert first["r3/without/router_mismatch"] > 0.8
    assert first["r3/without/token_mismatch"] > 0.95
    assert first["r3/router_mismatch"] > 0.8
    assert first["r3/overlap"] < 0.4
    assert first["r3/with/kl"] == pytest.approx(first["r3/kl"], rel=1e-5)
    assert first["r3/with/kl"] != pytest.approx(first["r3/without/kl"], rel=1e-3)
    assert 0 < first["r3/with/extreme_tokens"] <= 1


def test_kl_and_extreme_tokens_are_those_of_the_formulas() -> None:
    rollout = [-1.0, float("nan"), -2.0]
    trainer = [-1.5, -9.0, -0.5, -3.0]
    distance = Distance(tau=2.0)
    distance.add_logprobs(
        [Rollout(1, None, np.float32(rollout), np.ones(3, bool))],  # type: ignore[arg-type]
        torch.tensor([trainer]),
        torch.tensor([[1, 1, 1, 0]]),
    )
    ratios = np.exp([-0.5, 1.5])  # trainer over rollout, where the rollout's is known
    accelerator = type("One", (), {"device": "cpu", "reduce": lambda self, sums, reduction: sums})()
    found = shares(accelerator, distance.of_routes() | distance.of_logprobs())
    assert found["kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-6)
    assert found["extreme_tokens"] == 0.5
    assert "router_mismatch" not in found


def test_a_policy_replays_the_rows_of_the_response_only(tmp_path: Path) -> None:
    made = Made()
    replay = ReplayConfig(policy=ReplayPolicy(rows="response"), on_shift="ignore", compare_every=0)
    trainer = made_trainer(tmp_path, made, replay=replay, learning_rate=0.0)
    with watching(trainer.model) as forwards:
        trainer.train()
    (forward,) = forwards
    for row, (ids_S, mask_S) in enumerate(zip(forward.input_ids_BS.tolist(), forward.mask_BS.tolist(), strict=True)):
        first, stop = mask_S.index(1), len(mask_S) - mask_S[::-1].index(1)
        tokens = ids_S[first:stop]
        replayed = slice(made.sequences[tuple(tokens)] - 1, len(tokens) - 1)
        rows_TLK = unlike_any(tokens, made.model)
        for layer, (ids_BSK,) in forward.received.items():
            assert ids_BSK[row, first:stop][replayed].tolist() == rows_TLK[replayed, layer].tolist()
            assert ids_BSK[row, first : first + replayed.start].tolist() != rows_TLK[: replayed.start, layer].tolist()


def test_eval_is_replayed_too(tmp_path: Path) -> None:
    made = Made()
    trainer = made_trainer(tmp_path, made, per_device_eval_batch_size=4, num_generations_eval=2)
    with watching(trainer.model) as forwards:
        metrics = trainer.evaluate(trainer.train_dataset)
    assert len(forwards) == 2
    for forward in forwards:
        assert_replayed(forward, made)
    assert metrics is not None
    assert any(row.get("eval_r3/coverage") == 1 for row in trainer.state.log_history)


class Bent(Made):
    """Its traces are changed by `bend` before they are handed over."""

    def __init__(self, bend: Any) -> None:
        super().__init__()
        self.bend = bend

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = super().__call__(prompts, trainer)
        return self.bend(output, self)


def swapped(output: dict[str, Any], made: Made) -> dict[str, Any]:
    traces = output["routing_traces"]
    return output | {"routing_traces": [traces[1], traces[0], *traces[2:]]}


def with_gaps(output: dict[str, Any], made: Made) -> dict[str, Any]:
    tokens = [p + c for p, c in zip(output["prompt_ids"], output["completion_ids"], strict=True)]
    valid = [np.arange(len(ids) - 1) % 2 == 0 for ids in tokens]
    return output | {"routing_traces": [made.trace(i, valid_T=v) for i, v in zip(tokens, valid, strict=True)]}


def without(output: dict[str, Any], made: Made) -> dict[str, Any]:
    return {key: value for key, value in output.items() if key != "routing_traces"}


@pytest.mark.parametrize(
    ("bend", "error", "message"),
    [
        (swapped, TokenMismatchError, "first difference at position"),
        (with_gaps, MissingRowError, "lacks"),
        (without, ReplayError, "rollout_func returned no routes"),
    ],
)
def test_routes_that_are_not_those_of_the_sequences_are_refused(
    tmp_path: Path, bend: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        made_trainer(tmp_path, Bent(bend)).train()


def with_environment(output: dict[str, Any], made: Made) -> dict[str, Any]:
    return output | {"env_mask": [[1, *[0] * (len(ids) - 1)] for ids in output["completion_ids"]]}


def test_tokens_of_an_environment_are_not_the_response(tmp_path: Path) -> None:
    made = Bent(with_environment)
    trainer = made_trainer(tmp_path, made)
    with watching(trainer.model) as forwards:
        trainer.train()
    assert_replayed(forwards[-1], made)
    (turn,) = trainer._rollouts._turns
    for rollout in turn:
        others = [False] * (len(rollout.drawn) - 1)
        assert rollout.drawn.tolist() == [True, *others]
        assert np.isnan(rollout.logprobs).tolist() == [False, *(not other for other in others)]


def test_missing_rows_may_be_live_and_are_counted(tmp_path: Path) -> None:
    replay = ReplayConfig(missing="live", on_shift="ignore")
    trainer = made_trainer(tmp_path, Bent(with_gaps), replay=replay)
    trainer.train()
    assert 0.45 < trainer.state.log_history[0]["r3/coverage"] < 0.55


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.16.0"])
def test_other_releases_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ReplayError, match=rf"TRL 1\.16, got TRL {version}"):
        trainer_of(tmp_path)


def test_a_changed_trainer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, batch: None)
    with pytest.raises(ReplayError, match="_compute_loss is another"):
        trainer_of(tmp_path)


def test_where_trl_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("moetrace.trainers.trl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moetrace\[trl\]'"):
        importlib.import_module("moetrace.trainers.trl")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(NotMoeError):
        trainer_of(tmp_path, Qwen3ForCausalLM(Qwen3Config(vocab_size=260, num_key_value_heads=1, head_dim=8, **sizes)))


def test_prompt_learning_is_refused(tmp_path: Path) -> None:
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedRouterError, match="tokens before the prompt"):
        trainer_of(tmp_path, more={"peft_config": tuning})


@pytest.mark.parametrize(
    "knob",
    [{"missing": "zeros"}, {"on_shift": "no"}, {"compare_every": -1}, {"tau": 1.0}, ROWS, {"policy": "response"}],
)
def test_knobs_are_checked(knob: dict[str, Any]) -> None:
    with pytest.raises(ReplayError, match=f"{next(iter(knob))} is out of range"):
        ReplayConfig(**knob)


def test_knobs_are_a_configuration() -> None:
    with pytest.raises(ReplayError, match="replay is no configuration: expected a ReplayConfig"):
        GRPOTrainer(replay={"tau": 3.0})  # type: ignore[arg-type]


def turn(tokens: list[int], num_prompt_tokens: int, first_expert: int) -> Rollout:
    """A turn whose row t is `[first_expert, (t + first_expert + 1) % 8]`."""
    layout = moetrace.MoeLayout((0,), 8, 2)
    rows = np.array([[[first_expert, (first_expert + 1 + t % 6) % 8]] for t in range(len(tokens) - 1)])
    trace = RoutingTrace.build(rows, layout, tokens)
    prompt, output = tokens[:num_prompt_tokens], tokens[num_prompt_tokens:]
    return Rollout.of_turn(prompt, output, trace, [-float(first_expert)] * len(output))


def test_a_later_turn_keeps_the_rows_that_tokens_were_drawn_from() -> None:
    rollouts = Rollouts()
    rollouts.add([turn([1, 2, 3], 2, 0), turn([1, 2, 4, 5], 2, 1), turn([1, 2, 3], 2, 2)])
    rollouts.add([turn([1, 2, 4, 5, 9, 9, 6], 6, 3), turn([1, 2, 3, 9, 7], 4, 4), turn([1, 2, 3, 8], 3, 5)])
    first, second, third = rollouts.joined([[1, 2, 3, 9, 7], [1, 2, 4, 5, 9, 9, 6], [1, 2, 3, 8]])
    assert first.trace.experts_TLK[:, 0, 0].tolist() == [0, 0, 4, 4]
    assert first.logprobs.tolist()[:1] == [0]
    assert np.isnan(first.logprobs[1])
    assert first.logprobs[2] == -4
    assert second.trace.experts_TLK[:, 0, 0].tolist() == [1, 1, 1, 3, 3, 3]
    assert np.isnan(second.logprobs).tolist() == [False, False, True, True, False]
    assert third.trace.experts_TLK[:, 0, 0].tolist() == [2, 2, 5]  # its tokens were the first's until then
    seen = response_mask([second, first], np.array([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]))
    assert seen.astype(int).tolist() == [[0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0]]


def test_a_turn_that_continues_nothing_is_refused() -> None:
    rollouts = Rollouts()
    rollouts.add([turn([1, 2, 3], 2, 0)])
    rollouts.add([turn([1, 2, 8, 9], 3, 1)])
    with pytest.raises(ReplayError, match="continues no sequence"):
        rollouts.joined([[1, 2, 8, 9]])


def experts_of(rollout: Rollout) -> list[int]:
    return rollout.trace.experts_TLK[:, 0, 0].tolist()


def test_a_turn_goes_to_the_sequence_that_goes_on_and_not_to_its_equal() -> None:
    """Which may have been left as it is, or may have gone on otherwise, over more turns or fewer."""
    rollouts = Rollouts()
    rollouts.add([turn([1, 2, 3], 2, expert) for expert in range(4)])
    rollouts.add([turn([1, 2, 3, 8], 3, 6), turn([1, 2, 3, 9, 5, 6], 4, 5), turn([1, 2, 3, 9, 4], 4, 4)])
    rollouts.add([turn([1, 2, 3, 9, 5, 6, 9, 7, 7], 7, 7)])
    whole = [[1, 2, 3], [1, 2, 3, 9, 4], [1, 2, 3, 9, 5, 6, 9, 7], [1, 2, 3, 8]]  # TRL has cut the third
    left, once, twice, at_once = rollouts.joined(whole)
    assert experts_of(left) == [0, 0]
    assert experts_of(once) == [1, 1, 4, 4]
    assert experts_of(twice) == [2, 2, 5, 5, 5, 7, 7, 7]
    assert experts_of(at_once) == [3, 3, 6]


def test_sequences_that_are_equal_to_the_end_go_on_in_their_order() -> None:
    rollouts = Rollouts()
    for tokens, prompt, expert in (([1, 2, 3], 2, 0), ([1, 2, 3, 9, 4], 4, 2), ([1, 2, 3, 9, 4, 9, 5], 6, 4)):
        rollouts.add([turn(tokens, prompt, expert), turn(tokens, prompt, expert + 1)])
    first, second = rollouts.joined([[1, 2, 3, 9, 4, 9, 5]] * 2)
    assert experts_of(first) == [0, 0, 2, 2, 4, 4]
    assert experts_of(second) == [1, 1, 3, 3, 5, 5]
