"""A replay by margin replaces the live choice where the router was close to a tie, and nowhere else.

Axes: N tokens, L MoE layers, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    NAMES,
    ONE_OF_EACH,
    assert_same_gradients,
    build,
    experts_spy,
    random_routes,
    random_tokens,
    router_spy,
    routers_of,
    step,
    traces_of,
)
from traces import refused

from moetrace import replay
from moetrace.errors import ReplayError
from moetrace.replayer import ReplayPolicy, align
from moetrace.routers import RoutingSession, Selection, tap_model


def lead(scores: list[float], k: int) -> float:
    ranked = sorted(scores, reverse=True)
    return ranked[k - 1] - ranked[k] if len(ranked) > k else math.inf


def slow_margin(name: str, router: Any, logits: list[float]) -> float:
    """What separates the K-th choice from the next, from the papers' selection rules, one token at a time.

    Mixtral and Qwen3-MoE rank by probabilities, GPT-OSS by logits; DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) first
    takes the groups with the best expert; DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) ranks by affinity plus bias,
    groups by the sum of their two best.
    """
    top_k = FAMILIES[name].top_k
    exp = [math.exp(x - max(logits)) for x in logits]
    softmax = [x / sum(exp) for x in exp]
    if name == "gpt_oss":
        return lead(logits, top_k)
    if name.startswith("deepseek_v3"):
        bias = router.e_score_correction_bias.tolist()
        scores = [1 / (1 + math.exp(-x)) + b for x, b in zip(logits, bias, strict=True)]
        groups, kept, rank_of, outside = 4, 2, lambda group: sum(sorted(group)[-2:]), -math.inf
    elif name == "deepseek_v2_groups":
        scores, groups, kept, rank_of, outside = softmax, 2, 1, max, 0.0
    else:
        return lead(softmax, top_k)
    width = len(scores) // groups
    ranks = [rank_of(scores[group * width : (group + 1) * width]) for group in range(groups)]
    live = sorted(range(groups), key=lambda group: -ranks[group])[:kept]
    masked = [score if expert // width in live else outside for expert, score in enumerate(scores)]
    return min(lead(masked, top_k), lead(ranks, kept))


class Margins(RoutingSession):
    """The margin of each selection."""

    def __init__(self) -> None:
        self.of_layers: list[torch.Tensor] = []

    def on_selection(self, selection: Selection) -> None:
        self.of_layers.append(selection.margin_N())


def slow_margins(model: Any, name: str, logits_LNE: torch.Tensor) -> np.ndarray:
    """`[L, N]`, from the logits that the routers returned."""
    routers = routers_of(model, name)
    return np.array(
        [
            [slow_margin(name, router, token) for token in logits_NE.double().tolist()]
            for router, logits_NE in zip(routers, logits_LNE, strict=True)
        ]
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_margin_is_what_separates_the_choice_from_the_next_one(name: str) -> None:
    model, margins = build(name), Margins()
    with torch.no_grad(), router_spy(model, name) as out, tap_model(model).active(margins):
        model(random_tokens(2, 16))
    expected = slow_margins(model, name, out.last())
    got = torch.stack(margins.of_layers)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-6)


def between(margins: np.ndarray) -> float:
    """A threshold that about half of the margins are below, and none is near."""
    ranked = np.sort(margins[np.isfinite(margins)])
    middle = len(ranked) // 2
    return float((ranked[middle] + ranked[middle + 1]) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_routes_are_replaced_below_the_margin_and_live_above_it(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 16)
    routes = random_routes(32, name)
    margins = Margins()
    with torch.no_grad(), tap_model(model).active(margins), experts_spy(model, name) as plain:
        model(tokens)
    routes[::3] = plain.last().permute(1, 0, 2)[::3]  # to be supplied, and to replace nothing in the first layer
    policy = ReplayPolicy(margin=between(torch.stack(margins.of_layers).numpy()))
    assert policy.margin is not None
    with torch.no_grad(), router_spy(model, name) as out, experts_spy(model, name) as spy:
        with replay(
            model, traces_of(model, routes, tokens), input_ids=tokens, policy=policy, on_shift="ignore"
        ) as session:
            hidden: list[torch.Tensor] = []
            handles = [
                router.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
                for router in routers_of(model, name)
            ]
            model(tokens)
        seen_NLK, stats = spy.last().permute(1, 0, 2), session.stats()
        for handle in handles:
            handle.remove()
        live = [router(x)[2].tolist() for router, x in zip(routers_of(model, name), hidden, strict=True)]
    logits_LNE = torch.stack([calls[0][0] for calls in out.calls])
    close_LN = slow_margins(model, name, logits_LNE) < policy.margin
    assert 0.2 < close_LN.mean() < 0.8
    supplied = replaced = 0
    for layer, row in enumerate(close_LN.tolist()):
        for n, close in enumerate(row):
            expected = routes[n, layer].tolist() if close else live[layer][n]
            assert seen_NLK[n, layer].tolist() == expected
            supplied += close
            replaced += close and set(routes[n, layer].tolist()) != set(live[layer][n])
    assert stats.supplied == pytest.approx(supplied / close_LN.size)
    assert stats.replaced == pytest.approx(replaced / close_LN.size)
    assert stats.replaced < stats.supplied < 1


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_without_a_margin_every_row_is_supplied_and_what_differs_is_replaced(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    valid = np.ones((2, 10), bool)
    valid[1, 4:7] = False
    routes = random_routes(20, name)
    traces = [
        trace.build(trace.experts_TLK, trace.layout, row.numpy(), valid_T=rows)
        for trace, row, rows in zip(traces_of(model, routes, tokens), tokens, valid, strict=True)
    ]
    with torch.no_grad(), replay(model, traces, input_ids=tokens, missing="live", on_shift="ignore") as session:
        model(tokens)
        model(tokens)
    stats = session.stats()
    assert stats.supplied == 1.0
    assert stats.replaced == pytest.approx(stats.router_mismatch)
    assert stats.coverage == pytest.approx(17 / 20)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_tiny_margin_replays_nothing_and_a_huge_one_everything(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 12)
    traces = traces_of(model, random_routes(24, name), tokens)
    logits = {}
    for margin in (None, 1e30, 1e-30):
        policy = ReplayPolicy(margin=margin)
        with torch.no_grad(), replay(model, traces, input_ids=tokens, policy=policy, on_shift="ignore") as session:
            logits[margin] = model(tokens).logits
        assert session.stats().supplied == (0.0 if margin == 1e-30 else 1.0)
    assert torch.equal(logits[1e30], logits[None])
    with torch.no_grad():
        assert torch.equal(logits[1e-30], model(tokens).logits)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_recomputation_decides_as_its_first_pass(name: str) -> None:
    model, tokens = build(name).train(), random_tokens(2, 16)
    traces = traces_of(model, random_routes(32, name), tokens)
    margins = Margins()
    with torch.no_grad(), tap_model(model).active(margins):
        model(tokens)
    policy = ReplayPolicy(margin=between(torch.stack(margins.of_layers).numpy()))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with replay(model, traces, input_ids=tokens, policy=policy, on_shift="ignore") as session:
            results.append(step(model, tokens))
        assert 0 < session.stats().supplied < 1
        assert session.forwards == 1
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("rows", ["response", "prompt"])
def test_a_replay_by_rows_supplies_these_rows_to_the_experts(rows: Any) -> None:
    model, tokens = build("qwen3_moe"), random_tokens(2, 10)
    routes = random_routes(20, "qwen3_moe")
    sampled = torch.zeros(2, 10, dtype=torch.int64)
    sampled[0, 4:] = sampled[1, 7:9] = 1
    predicts = np.zeros((2, 10), bool)
    predicts[0, 3:9] = predicts[1, 6:8] = True
    wanted = (predicts if rows == "response" else ~predicts).reshape(-1)
    with torch.no_grad(), experts_spy(model, "qwen3_moe") as spy:
        model(tokens)
        live = spy.last().permute(1, 0, 2).numpy()
        with replay(
            model,
            traces_of(model, routes, tokens),
            input_ids=tokens,
            policy=ReplayPolicy(rows),
            response_mask=sampled,
            on_shift="ignore",
        ) as session:
            model(tokens)
    seen = spy.last().permute(1, 0, 2).numpy()
    assert np.array_equal(seen[wanted], routes[wanted])
    assert np.array_equal(seen[~wanted][:, 0], live[~wanted][:, 0])  # the first router sees what it always sees
    assert session.stats().replayed_tokens == wanted.sum()


def test_routes_that_were_aligned_take_no_other_policy() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 6)
    routes = align(traces_of(model, random_routes(6, "mixtral"), tokens), tokens)
    with (
        refused(ReplayError, "aligned routes have a policy already"),
        replay(model, routes, policy=ReplayPolicy("prompt")),
    ):
        pass
