"""`RoutingReplay`: a mixin that gives TRL's GRPOTrainer the routes of its rollouts.

    _generate, _generate_single_turn      routes are taken where completions are made
    _generate_and_score_completions       they join TRL's batch as one more list, so that TRL's own shuffling, splitting
                                          and buffering move them with their sequences
    _compute_loss                         the list of the microbatch is what the forward inside replays
    _get_per_token_logps_and_entropies    every forward of the policy runs under replay; that of the reference does not

Every one of these calls TRL's own and changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl
from torch import nn

from moetrace.batch import to_numpy
from moetrace.comparison import compare
from moetrace.errors import ReplayError, UnsupportedRouterError
from moetrace.recorder import record
from moetrace.replayer import ReplaySession, replay
from moetrace.routers import tap_model
from moetrace.trainers.trl.config import ReplayConfig
from moetrace.trainers.trl.metrics import Distance, coverage_of, shares
from moetrace.trainers.trl.releases import require_supported_release
from moetrace.trainers.trl.rollouts import Rollout, Rollouts, response_mask
from moetrace.trainers.trl.server import ROUTES
from moetrace.trainers.trl.sources import returning_routes, source_of

BATCH_KEY = "moetrace_rollouts"
"""Where TRL's batch has the routes of its sequences."""


_SomeTrainer: Any = object
"""What the mixin is put before: to a type checker anything."""


class RoutingReplay(_SomeTrainer):
    """Put before a GRPOTrainer, or a subclass of it: `class Mine(RoutingReplay, MyGRPOTrainer): ...`.

    Args:
        replay: the knobs; all other arguments are TRL's.

    Raises:
        ReplayError: this release of TRL is not supported, or the trainer cannot be; `replay` is no configuration.
        NotMoeError, UnsupportedRouterError: the model has no routers, or not such as can be replayed.
    """

    rollout_func: Any

    def __init__(self, *args: Any, replay: ReplayConfig | None = None, **kwargs: Any) -> None:
        require_supported_release()
        self.replay_config = ReplayConfig() if replay is None else replay
        if not isinstance(self.replay_config, ReplayConfig):
            raise ReplayError("replay is no configuration", expected="a ReplayConfig", got=repr(replay))
        self._rollouts = Rollouts()
        self._replayed: Sequence[Rollout] | None = None
        self._in_loss = False
        self._generations = 0
        with returning_routes():
            super().__init__(*args, **kwargs)
        if self._is_vlm:
            raise UnsupportedRouterError(
                "routes of image tokens cannot be told from those of text here",
                expected="a tokenizer as processing_class, and a model of text",
                got=f"a processor, {type(self.processing_class).__name__}",
            )
        tap_model(self.model)
        self._adapters = _adapters_of(self.model)
        if self.continuous_batching_config is not None:
            self.continuous_batching_config.return_logprobs = True
        if self.rollout_func is not None:
            self.rollout_func = self._watched(self.rollout_func)

    def _watched(self, rollout_func: Any) -> Any:
        """A rollout function whose routes are kept here and not handed on to the reward functions."""

        def rollout(prompts: list, trainer: Any) -> dict[str, Any]:
            output = dict(rollout_func(prompts, trainer))
            if ROUTES not in output:
                raise ReplayError(
                    "rollout_func returned no routes",
                    expected=f"{ROUTES!r}: a RoutingTrace of each sequence",
                    got=sorted(output),
                    fix="Use moetrace.trainers.trl.ServerRollout, or add them to what yours returns.",
                )
            drawn = output.get("env_mask") or [None] * len(output["completion_ids"])
            lists = output["prompt_ids"], output["completion_ids"], output.pop(ROUTES), output["logprobs"], drawn
            self._rollouts.add([Rollout.of_turn(*one) for one in zip(*lists, strict=True)])
            return output

        return rollout

    def _generate(self, prompts: list) -> Any:
        self._rollouts = Rollouts()
        output = super()._generate(prompts)
        prompt_ids, completion_ids, *_ = output
        whole = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        self._replayed = self._rollouts.joined(whole)
        return output

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> Any:
        with source_of(self)(self) as routes_of:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            if len(completion_ids) != len(prompt_ids):
                raise ReplayError("some prompts got no completion", expected=len(prompt_ids), got=len(completion_ids))
            turn = routes_of(prompt_ids, completion_ids)
        drawn = logprobs if logprobs is not None else [own for _, own in turn]
        traces = [trace for trace, _ in turn]
        lists = zip(prompt_ids, completion_ids, traces, drawn, strict=True)
        self._rollouts.add([Rollout.of_turn(*one) for one in lists])
        return completion_ids, logprobs

    def _generate_and_score_completions(self, inputs: list) -> Any:
        try:
            output = super()._generate_and_score_completions(inputs)
            assert self._replayed is not None
            rollouts = output[BATCH_KEY] = list(self._replayed)
            if len(rollouts) != len(output["prompt_ids"]):
                raise ReplayError("not every sequence has routes", expected=len(inputs), got=len(rollouts))
            self._log(shares(self.accelerator, {"coverage": coverage_of(rollouts)}))
            every = self.replay_config.compare_every
            if self.model.training and every:
                if self._generations % every == 0:
                    self._log(self._compare(output, rollouts))
                self._generations += 1
            return output
        finally:
            self._replayed = None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if BATCH_KEY not in inputs:
            raise ReplayError("a batch came to the loss without its routes", expected=BATCH_KEY, got=sorted(inputs))
        self._replayed, self._in_loss = inputs[BATCH_KEY], True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._replayed, self._in_loss = None, False

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        own = super()._get_per_token_logps_and_entropies
        if self._replayed is None or not self._is_policy(model):
            return own(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        parts = []
        for rows in _chunks(len(input_ids), batch_size):
            ids, mask, rollouts = input_ids[rows], attention_mask[rows], self._replayed[rows]
            with self._replaying(rollouts, ids, mask) as session:
                parts.append(own(model, ids, mask, logits_to_keep, **kwargs))
            if self._in_loss:
                distance = Distance(self.replay_config.tau)
                distance.add_logprobs(rollouts, parts[-1][0], mask[:, -logits_to_keep:])
                self._log(shares(self.accelerator, session.counts().agreement() | distance.of_logprobs()))
        return tuple(_joined(values) for values in zip(*parts, strict=True))

    @contextmanager
    def _replaying(self, rollouts: Sequence[Rollout], ids: torch.Tensor, mask: torch.Tensor) -> Iterator[ReplaySession]:
        config = self.replay_config
        traces = [rollout.trace for rollout in rollouts]
        options: dict[str, Any] = {"attention_mask": mask, "missing": config.missing, "on_shift": config.on_shift}
        if config.policy is not None:
            response = response_mask(rollouts, to_numpy(mask))
            options |= {"policy": config.policy, "response_mask": response}
        with replay(self.model, traces, input_ids=ids, **options) as session:
            yield session

    def _is_policy(self, model: nn.Module) -> bool:
        """False for the reference: another model, or this one with other adapters than those being trained."""
        same = self.accelerator.unwrap_model(model) is self.accelerator.unwrap_model(self.model)
        return same and _adapters_of(self.model) == self._adapters

    def _compare(self, output: dict[str, Any], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What replay changes on this generation, by two forwards of the weights that generated it."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        columns = output["completion_ids"].shape[1]
        found: dict[str, float] = {}
        for name in ("without", "with"):
            distance = Distance(self.replay_config.tau)
            for rows in _chunks(len(ids), self.args.per_device_train_batch_size):
                self._replayed = rollouts[rows] if name == "with" else None
                with torch.no_grad(), record(self.model) as recording:
                    parts = self._get_per_token_logps_and_entropies(self.model, ids[rows], mask[rows], columns)
                used = recording.traces(ids[rows], attention_mask=mask[rows])
                for rollout, trace in zip(rollouts[rows], used, strict=True):
                    distance.routing += compare(rollout.trace, trace)
                distance.add_logprobs(rollouts[rows], parts[0], mask[rows, -columns:])
            sums = distance.of_routes() | distance.of_logprobs()
            found |= {f"{name}/{key}": value for key, value in shares(self.accelerator, sums).items()}
        return found

    def _log(self, values: dict[str, float]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            metrics[f"r3/{name}"].append(value)


class GRPOTrainer(RoutingReplay, trl.GRPOTrainer):
    """TRL's GRPOTrainer, with the routes of its rollouts replayed in training. Takes `replay=ReplayConfig(...)` too."""


def _chunks(count: int, size: int | None) -> list[slice]:
    size = size or count
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _joined(values: tuple[Any, ...]) -> Any:
    """One output of several chunks: rows one below the other; a mean of means where it is a number."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    return torch.stack(values).mean() if values[0].ndim == 0 else torch.cat(values)


def _adapters_of(model: Any) -> tuple[Any, ...]:
    """Which of PEFT's adapters compute now; () without PEFT."""
    if not hasattr(model, "peft_config"):
        return ()
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedRouterError(
            "prompt learning puts tokens before the prompt that no rollout has routes for",
            expected="adapters in the model, such as LoRA",
            got=model.active_peft_config.peft_type,
        )
    status = model.get_model_status()
    return (status.enabled, tuple(status.active_adapters))
