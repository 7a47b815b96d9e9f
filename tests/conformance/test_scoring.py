"""Weights and gradients equal the family's formula in float64, at live ids and at any others.

Axes: L MoE layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace as changed
from operator import attrgetter
from typing import Any

import pytest
import torch
import transformers
from tapped import TAPPED, found

from moetrace import replay
from moetrace.conformance import verdicts, zoo
from moetrace.conformance.census import batch, examine, traces_of
from moetrace.conformance.scoring import RULES, Rule
from moetrace.conformance.spies import RouterCall, spying
from moetrace.routers import layout_of, selection

UNSEEN = ["aria", "aria_text", "longcat_flash"] if transformers.__version__ == "5.17.0" else []
SEEN = [name for name in TAPPED if name not in UNSEEN]
MASKED = [n for n in ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr", "mistral4", "mistral_large4") if n in SEEN]


def replayed(model: Any, routes_LNK: torch.Tensor) -> list[RouterCall]:
    """What was seen of a training step that replays the routes."""
    ids_BS = batch()
    traces = traces_of(layout_of(model), routes_LNK, ids_BS)
    with replay(model, traces, input_ids=ids_BS, on_shift="ignore"), spying(model) as calls:
        model(input_ids=ids_BS, use_cache=False).logits.square().mean().backward()
    return calls


def lowest(model: Any, top_k: int) -> torch.Tensor:
    """`[L, N, K]`: the experts that each router of the plain model scores lowest, out of every live group."""
    with torch.no_grad(), spying(model) as calls:
        model(input_ids=batch(), use_cache=False)
    logits = [call.logits_NE for call in calls]
    return torch.stack([x_NE.argsort(-1)[:, :top_k] for x_NE in logits if x_NE is not None])


def settings_of(name: str) -> list[dict[str, Any]]:
    """Changes of the config that change the formula: none, the other norm, another factor."""
    rule = RULES[name]
    changes: list[dict[str, Any]] = [{}]
    if rule.norm == "ffn_config.moe_normalize_expert_weights":
        changes += [{"moe_normalize_expert_weights": order} for order in (2.0, None)]
    elif isinstance(rule.norm, str):
        changes += [{rule.norm: normed} for normed in (True, False)]
    return [*changes, {rule.factor: 1.7}] if rule.factor else changes


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name in SEEN for changes in settings_of(name)])
def test_every_family_follows_its_formula_in_all_its_settings(name: str, changes: dict[str, Any]) -> None:
    finding = examine(zoo.architecture(name), **changes) if changes else found(name)
    rule, config = RULES[name], zoo.architecture(name).config(**changes).get_text_config(decoder=True)
    normed = attrgetter(rule.norm)(config) if isinstance(rule.norm, str) else rule.norm
    assert finding.weights is True
    assert finding.gradient == ("all" if rule.score == "softmax" and not normed else "chosen")


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, Rule("sigmoid", 1)),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}, Rule("sigmoid")),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, Rule("sigmoid", 1, "routed_scaling_factor")),
    ],
)
def test_a_score_that_the_config_chooses_is_followed(name: str, changes: dict, rule: Rule, monkeypatch) -> None:
    monkeypatch.setitem(RULES, name, rule)
    assert examine(zoo.architecture(name), **changes).works


@pytest.mark.parametrize("name", SEEN)
def test_a_wrong_formula_is_convicted(name: str, monkeypatch) -> None:
    wrong = "softmax" if RULES[name].score == "sigmoid" else "sigmoid"
    monkeypatch.setitem(RULES, name, changed(RULES[name], score=wrong))
    finding = examine(zoo.architecture(name))
    assert finding.weights is False
    assert finding.gradient == ""
    assert not finding.works


def test_what_hooks_cannot_see_is_known() -> None:
    assert [name for name in TAPPED if found(name).weights is None] == UNSEEN
    assert [name for name in TAPPED if found(name).gradient == "unseen"] == UNSEEN


def test_every_rule_belongs_to_a_family() -> None:
    assert set(RULES) >= set(TAPPED)
    assert transformers.__version__ == "5.17.0" or set(RULES) == set(TAPPED)


@pytest.mark.parametrize("name", MASKED)
def test_experts_outside_the_live_groups_get_their_weight_and_gradient(name: str) -> None:
    model: Any = zoo.tiny(zoo.architecture(name))
    config, top_k = model.config.get_text_config(decoder=True), layout_of(model).top_k
    assert config.n_group > config.topk_group
    routes_LNK = lowest(model, top_k)
    calls = replayed(model, routes_LNK)
    assert verdicts.weighs_all(calls, routes_LNK)
    assert verdicts.follows(RULES[name], config, calls, routes_LNK) is True
    assert verdicts.gradient(RULES[name], config, calls, routes_LNK) in ("chosen", "all")
    for call, ids_NK in zip(calls, routes_LNK, strict=True):
        assert call.logits is not None
        assert call.logits.grad is not None
        assert bool((call.logits.grad.gather(1, ids_NK) != 0).all())


@pytest.mark.parametrize(("name", "exact"), [("gpt_oss", True), ("mixtral", False), ("minimax_m2", False)])
def test_a_weight_renormalised_over_one_expert_gives_no_gradient(name: str, exact: bool) -> None:
    """Softmax over one logit has derivative 0; p / p has it up to rounding."""
    model: Any = zoo.tiny(zoo.architecture(name), num_experts_per_tok=1)
    routes_LNK = lowest(model, 1)
    calls = replayed(model, routes_LNK)
    assert verdicts.gradient(RULES[name], model.config, calls, routes_LNK) == "none"
    for call, ids_NK in zip(calls, routes_LNK, strict=True):
        weights_NK, logits = call.weights_NK(ids_NK), call.logits
        assert weights_NK is not None
        assert logits is not None
        assert bool((weights_NK == 1).all())
        assert not exact or logits.grad is None or bool((logits.grad == 0).all())


def test_a_token_that_skips_the_layer_has_no_weight_and_no_gradient() -> None:
    model: Any = zoo.tiny(zoo.architecture("zaya"))
    layout = layout_of(model)
    routes_LNK = torch.randint(0, layout.num_experts, (layout.num_layers, 32, 1))
    skipped_LN = routes_LNK[..., 0] == layout.num_experts - 1
    skipped_LN[:, ::4] = True
    routes_LNK[skipped_LN] = layout.num_experts - 1
    calls = replayed(model, routes_LNK)
    assert verdicts.follows(RULES["zaya"], model.config, calls, routes_LNK) is True
    assert verdicts.gradient(RULES["zaya"], model.config, calls, routes_LNK) == "all"
    for call, skipped_N in zip(calls, skipped_LN, strict=True):
        assert call.logits is not None
        assert call.logits.grad is not None
        reached_N = (call.logits.grad.reshape(32, -1) != 0).all(-1)
        assert torch.equal(reached_N, ~skipped_N)


def test_a_tap_that_cuts_the_gradient_is_convicted(monkeypatch) -> None:
    monkeypatch.setattr(selection.SelectionMode, "_unmasked", lambda self, scores: scores.detach())
    for name in ("mixtral", "gpt_oss", "gemma4_text", "llama4_text", "deepseek_v2"):
        assert examine(zoo.architecture(name)).gradient == ""


def test_a_formula_is_what_it_says() -> None:
    """Three experts of four, by hand."""
    logits_NE, ids_NK = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double().log1p(), torch.tensor([[3, 0, 1]])

    def weights(rule: Rule) -> list[float]:
        return rule.weights(None, torch.nn.Module(), logits_NE, logits_NE, ids_NK)[0].tolist()

    assert weights(Rule("softmax")) == pytest.approx([0.4, 0.1, 0.2])  # e^x is 1 2 3 4
    assert weights(Rule("softmax", 1)) == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    assert weights(Rule("softmax", 2)) == pytest.approx([4 / 21**0.5, 1 / 21**0.5, 2 / 21**0.5])
    assert weights(Rule("sigmoid")) == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert weights(Rule("sqrt(softplus)"))[1] == pytest.approx(0.6931471805599453**0.5)
    assert weights(Rule("softmax", skips=True)) == pytest.approx([0.0, 0.1, 0.2])
