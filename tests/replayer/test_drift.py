"""The router-shift ratio equals its formula in float64, and is refused where it has none.

Axes: L MoE layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, NAMES, build, random_routes, random_tokens, router_spy, traces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import refused

from moetrace import replay
from moetrace.errors import ReplayError, UnsupportedRouterError
from moetrace.replayer import router_scores, router_shift

SOFTMAX = [name for name in NAMES if not name.startswith("deepseek_v3")]


def slow_ratio(old_LE: list[list[float]], new_LE: list[list[float]], experts_LK: list[list[int]]) -> float:
    """One token's ratio by the equations of arXiv 2510.23027, on logits, in Python's floats."""
    deviations = []
    for old, new, chosen in zip(old_LE, new_LE, experts_LK, strict=True):
        log_old, log_new = (
            [x - max(logits) - math.log(sum(math.exp(y - max(logits)) for y in logits)) for x in logits]
            for logits in (old, new)
        )
        deviations.append(sum(abs(log_new[e] - log_old[e]) for e in chosen) / len(chosen))
    return math.exp(-sum(deviations) / len(deviations))


def moved(model: Any, by: float) -> None:
    """An update of the whole policy."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_ratio_of_two_policies_equals_the_formula(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 12)
    with torch.no_grad(), router_scores(model) as old, router_spy(model, name) as old_out:
        model(tokens)
    moved(model, 0.02)
    with router_scores(model, of=old) as new, router_spy(model, name) as new_out:
        model(tokens).logits.sum().backward()
    assert not new.log_probs_LNK.requires_grad
    assert torch.equal(new.experts_LNK, old.experts_LNK)
    experts_NLK = torch.stack([calls[0][2] for calls in old_out.calls], 1)
    assert torch.equal(old.experts_LNK.permute(1, 0, 2), experts_NLK)
    old_NLE, new_NLE = (torch.stack([calls[0][0] for calls in out.calls], 1).double() for out in (old_out, new_out))
    expected = [slow_ratio(*one) for one in zip(old_NLE.tolist(), new_NLE.tolist(), experts_NLK.tolist(), strict=True)]
    shift = router_shift(old.log_probs_LNK, new.log_probs_LNK)
    np.testing.assert_allclose(shift.ratio_N.numpy(), expected, rtol=1e-4)
    assert min(expected) < 0.99
    floor = float(np.median(expected))
    weights = shift.weights_N(floor)
    np.testing.assert_allclose(weights.numpy(), np.maximum(expected, floor), rtol=1e-4)
    assert not weights.requires_grad
    mask = np.arange(24).reshape(2, 12) % 3 == 0
    stats, counted = shift.stats(mask, floor=floor), np.array(expected)[mask.reshape(-1)]
    assert stats["ratio_mean"] == pytest.approx(counted.mean(), rel=1e-4)
    assert stats["ratio_min"] == pytest.approx(counted.min(), rel=1e-4)
    assert stats["deviation_mean"] == pytest.approx(-np.log(counted).mean(), rel=1e-3)
    assert shift.stats(floor=floor)["below_floor"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_router_that_did_not_move_has_ratio_1(name: str) -> None:
    model, tokens = build(name), random_tokens(1, 8)
    with torch.no_grad():
        with router_scores(model) as old:
            model(tokens)
        with router_scores(model, of=old) as new:
            model(tokens)
    assert router_shift(old.log_probs_LNK, new.log_probs_LNK).ratio_N.tolist() == [1.0] * 8


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_ratio_is_a_mean_over_layers_and_experts_before_the_exponential(
    layers: int, tokens: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    old, new = (rng.normal(size=(layers, tokens, top_k)) for _ in range(2))
    ratio = router_shift(torch.tensor(old), torch.tensor(new)).ratio_N
    for n in range(tokens):
        total = sum(abs(new[layer, n, k] - old[layer, n, k]) for layer in range(layers) for k in range(top_k))
        assert float(ratio[n]) == pytest.approx(math.exp(-total / (layers * top_k)), rel=1e-5)


def test_scores_inside_a_replay_are_of_the_replayed_experts() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 8)
    routes = random_routes(8, "mixtral")
    with (
        torch.no_grad(),
        replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore"),
        router_scores(model) as scores,
    ):
        model(tokens)
    assert np.array_equal(scores.experts_LNK.permute(1, 0, 2).numpy(), routes)


def test_a_recomputation_scores_nothing_again() -> None:
    model, tokens = build("qwen3_moe").train(), random_tokens(1, 8)
    model.gradient_checkpointing_enable()
    with router_scores(model) as scores:
        loss = model(tokens, use_cache=False).logits.sum()
        before = scores.log_probs_LNK
        moved(model, 1e-4)  # a recomputation gives other scores, but routes as before
        loss.backward()
        assert torch.equal(scores.log_probs_LNK, before)
        model(tokens)
        assert not torch.equal(scores.log_probs_LNK, before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SOFTMAX])
def test_routers_without_probabilities_are_refused_by_name(name: str) -> None:
    model = build(name)
    what = f"router model.layers.{FAMILIES[name].layers[0]}.mlp.gate"
    with torch.no_grad(), refused(UnsupportedRouterError, what, expected="a softmax", got="sigmoid"):
        with router_scores(model) as scores:
            model(random_tokens(1, 4))
        scores.experts_LNK  # noqa: B018


def test_what_does_not_fit_together_is_refused() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 8)
    with torch.no_grad(), router_scores(model) as old:
        with refused(ReplayError, "no whole forward ran", expected="3 layers", got=0):
            old.experts_LNK  # noqa: B018
        model(tokens)
    with (
        torch.no_grad(),
        router_scores(model, of=old),
        refused(ReplayError, "the new policy ran on another batch", expected="8 tokens", got=6),
    ):
        model(tokens[:, :6])
    logs = old.log_probs_LNK
    with refused(ReplayError, "not of the same experts", expected="(3, 8, 2)", got="(2, 8, 2)"):
        router_shift(logs, logs[:2])
    shift = router_shift(logs, logs)
    for floor in (-0.1, 1.1):
        with refused(ReplayError, "the floor bounds a ratio", got=floor):
            shift.weights_N(floor)
    with refused(ReplayError, "no token counts"):
        shift.stats([False] * 8)
