"""GRPO in plain torch: sample with the engine, learn in the trainer's numerics, give the engine the new weights.

The policy ratio is the trainer's probability over the rollout's, clipped as in PPO; advantages are rewards normalised
within the samples of a prompt; every token counts alike. No KL term, no reference model, no correction beside R2 or R3.

Axes: B sequences, S columns.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import build, expected_exact_match, forward, logprobs, rollout_weights
from settings import Settings
from task import Batch, answer, make_prompts
from warm_start import held_out

from moetrace.comparison import RoutingComparison, compare, extreme_token_ratio, kl_k3
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine
from moetrace.recorder import record
from moetrace.replayer import replay
from moetrace.trace import RoutingTrace

_PROMPTS, _ORDER = 3, 4
_EVALUATE_EVERY = 5


@dataclass(frozen=True)
class Rollout:
    """What one step learns from: `traces` are the engine's, `logprobs_BS` too (zero outside the answers)."""

    batch: Batch
    logprobs_BS: torch.Tensor
    advantages_B: torch.Tensor
    rewards: list[float]
    traces: list[RoutingTrace]


class Run:
    """One seed under one variant."""

    def __init__(self, settings: Settings, variant: str, seed: int, weights: Path) -> None:
        self.settings, self.variant, self.seed = settings, variant, seed
        self.trainer = build(settings.shape, settings.device, for_rollout=False)
        self.trainer.load_state_dict(torch.load(weights, map_location=settings.device))
        self.optimizer = torch.optim.AdamW(self.trainer.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0)
        knobs: dict[str, Any] = {"max_running_requests": settings.sequences, "max_batch_tokens": 4096}
        if settings.device != "cpu":
            knobs["kv_cache_tokens"] = 256 * settings.sequences * 5 // 4  # a page is 256 tokens there
        config = EngineConfig(enable_return_routed_experts=True, seed=seed, **knobs)
        self.engine = TransformersEngine(build(settings.shape, settings.device, for_rollout=True), config)
        self.engine.update_weights(rollout_weights(self.trainer, settings.rollout), "0")

    def step(self, number: int) -> dict[str, float]:
        """One rollout, its measures, and the updates from it."""
        clock = [time.perf_counter()]
        rollout = self.sample(number)
        clock.append(time.perf_counter())
        measures, own_traces = self.measure(rollout)
        clock.append(time.perf_counter())
        measures |= self.update(number, rollout, own_traces)
        clock.append(time.perf_counter())
        self.engine.update_weights(rollout_weights(self.trainer, self.settings.rollout), str(number + 1))
        clock.append(time.perf_counter())
        for name, seconds in zip(("rollout", "measure", "update", "sync"), np.diff(clock), strict=True):
            measures[f"seconds_{name}"] = float(seconds)
        return measures

    def sample(self, number: int) -> Rollout:
        """Answers by the engine. Prompts and the samples' seeds depend on seed and step only, not on the variant."""
        settings = self.settings
        prompts = make_prompts(settings.prompts, settings.shortest, settings.longest, _PROMPTS, self.seed, number)
        sampling = SamplingParams(settings.longest_answer, do_sample=True, n=settings.samples)
        first = (self.seed * 1_000_000 + number) * settings.prompts
        generations = [
            self.engine.submit(prompt, replace(sampling, seed=first + place), return_routes=True)
            for place, prompt in enumerate(prompts)
        ]
        results = [result for generation in generations for result in generation.results(120)]
        batch = Batch.of([r.prompt_tokens for r in results], [r.output_tokens for r in results])
        logprobs_BS = torch.zeros(batch.ids_BS.shape)
        logprobs_BS[batch.answer_BS.bool()] = torch.tensor([value for r in results for value in r.logprobs])
        rewards = [float(r.output_tokens == answer(r.prompt_tokens)) for r in results]
        by_prompt = torch.tensor(rewards).view(settings.prompts, settings.samples)
        advantages = (by_prompt - by_prompt.mean(1, keepdim=True)) / (by_prompt.std(1, keepdim=True) + 1e-4)
        traces = [r.trace for r in results if r.trace is not None]
        if len(traces) != len(results) or not all(trace.valid_T.all() for trace in traces):
            raise RuntimeError("a sampled sequence came without all of its rows")
        return Rollout(batch, logprobs_BS, advantages.flatten(), rewards, traces)

    @torch.no_grad()
    def measure(self, rollout: Rollout) -> tuple[dict[str, float], list[RoutingTrace]]:
        """How far the trainer is from the rollout at equal weights, live and under R3; and the trainer's own routes."""
        batch = rollout.batch
        where = {"input_ids": batch.ids_BS, "attention_mask": batch.mask_BS}
        with record(self.trainer) as recording:
            live_BS = logprobs(forward(self.trainer, batch).logits, batch)
        own_traces = recording.traces(**where)
        with replay(self.trainer, rollout.traces, **where, on_shift="warn") as session:
            replayed_BS = logprobs(forward(self.trainer, batch).logits, batch)
        stats = session.stats()
        routes = sum(map(compare, rollout.traces, own_traces), RoutingComparison())
        answers_BS = batch.answer_BS.bool()
        sampled, live, replayed = (x.cpu()[answers_BS].numpy() for x in (rollout.logprobs_BS, live_BS, replayed_BS))
        measures = {
            "reward": float(np.mean(rollout.rewards)),
            "answer_tokens": len(sampled) / len(rollout.rewards),
            "router_mismatch": routes.router_mismatch,
            "token_mismatch": routes.token_mismatch,
            "router_mismatch_under_R3": stats.router_mismatch,
            "shift_gain": stats.shift_gain,
            "kl": kl_k3(sampled, live),
            "kl_R3": kl_k3(sampled, replayed),
            "extreme": extreme_token_ratio(sampled, live),
            "extreme_R3": extreme_token_ratio(sampled, replayed),
            "largest_log_ratio": float(np.abs(live - sampled).max()),
            "largest_log_ratio_R3": float(np.abs(replayed - sampled).max()),
        }
        return measures, own_traces

    def update(self, number: int, rollout: Rollout, own_traces: list[RoutingTrace]) -> dict[str, float]:
        """PPO-clip over mini-batches of the rollout; later ones are off-policy by the updates before them."""
        settings, count = self.settings, len(rollout.rewards)
        traces = {"none": None, "R2": own_traces, "R3": rollout.traces}[self.variant]
        seen: dict[str, list[float]] = defaultdict(list)
        for epoch in range(settings.epochs):
            order = np.random.default_rng((_ORDER, self.seed, number, epoch)).permutation(count).tolist()
            size = -(-count // settings.minibatches)
            for rows in (order[start : start + size] for start in range(0, count, size)):
                batch = rollout.batch.take(rows)
                with self.routed(batch, None if traces is None else [traces[row] for row in rows]):
                    trained_BS = logprobs(forward(self.trainer, batch).logits, batch)
                loss, clipped, kl = self.loss(batch, trained_BS, rollout, rows)
                loss.backward()
                norm = float(torch.nn.utils.clip_grad_norm_(self.trainer.parameters(), settings.max_grad_norm))
                if not math.isfinite(norm):
                    raise RuntimeError(f"the gradient is not finite: its norm is {norm}")
                self.optimizer.step()
                self.optimizer.zero_grad()
                for name, value in (("norm", norm), ("clipped", clipped), ("kl", kl)):
                    seen[name].append(value)
        return {
            "grad_norm": float(np.mean(seen["norm"])),
            "grad_norm_max": max(seen["norm"]),
            "clipped": float(np.mean(seen["clipped"])),
            "kl_after_updates": seen["kl"][-1],
        }

    def routed(self, batch: Batch, traces: Sequence[RoutingTrace] | None) -> AbstractContextManager[Any]:
        """The routes of this variant for one mini-batch; none: the trainer's live ones."""
        if traces is None:
            return contextlib.nullcontext()
        where = {"input_ids": batch.ids_BS, "attention_mask": batch.mask_BS}
        return replay(self.trainer, traces, **where, on_shift="ignore")

    def loss(
        self, batch: Batch, trained_BS: torch.Tensor, rollout: Rollout, rows: Sequence[int]
    ) -> tuple[torch.Tensor, float, float]:
        """The loss, the share of clipped tokens, and the KL (k3) from the rollout to the policy as it is now."""
        device, clip = trained_BS.device, self.settings.clip
        answer_BS = batch.answer_BS.to(device)
        sampled_BS = rollout.logprobs_BS[rows, : trained_BS.shape[1]].to(device)
        advantages_B1 = rollout.advantages_B[rows].to(device)[:, None]
        log_ratio_BS = (trained_BS - sampled_BS) * answer_BS
        ratio_BS = log_ratio_BS.exp()
        gain_BS = torch.minimum(ratio_BS * advantages_B1, ratio_BS.clamp(1 - clip, 1 + clip) * advantages_B1)
        tokens = answer_BS.sum()
        loss = -(gain_BS * answer_BS).sum() / tokens
        clipped = ((ratio_BS.detach() * advantages_B1 > gain_BS.detach()) * answer_BS).sum() / tokens
        kl = ((ratio_BS - 1 - log_ratio_BS) * answer_BS).sum() / tokens
        return loss, float(clipped), float(kl.detach())


def run(settings: Settings, variant: str, seed: int, until: float, weights: Path, out: Path) -> None:
    """Train until the time; `out` has every step that is over, and the error where there was one."""
    columns: dict[str, list[float]] = defaultdict(list)
    matches: dict[int, float] = {}
    record: dict[str, Any] = {"seed": seed, "variant": variant, "error": "ended before its time"}
    engine = None
    try:
        torch.manual_seed(seed)
        this, judged = Run(settings, variant, seed, weights), held_out(settings)
        engine = this.engine
        record |= engine_facts(engine)
        for number in range(settings.max_steps):
            if number % _EVALUATE_EVERY == 0:
                matches[number] = expected_exact_match(this.trainer, judged)
            if time.time() > until:
                break
            for name, value in this.step(number).items():
                columns[name].append(round(value, 7))
            write(out, record | {"steps": dict(columns), "expected_exact_match": matches})
        record["error"] = None
    except Exception as error:  # told, not lost: the other runs go on
        record["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write(out, record | {"steps": dict(columns), "expected_exact_match": matches})
    if engine is not None:
        engine.close()


def engine_facts(engine: TransformersEngine) -> dict[str, Any]:
    """What the engine runs with, as it decided itself."""
    config = engine._manager.continuous_batching_config
    return {
        "engine": {
            "name": engine.name,
            "attention": engine._model.config._attn_implementation,
            "experts": engine._model.config._experts_implementation,
            "cuda_graphs (varlen, decode)": list(config.cuda_graph_booleans),
        }
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """All of it or nothing."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record))
    draft.replace(path)
