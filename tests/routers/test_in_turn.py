"""A router that chooses its experts in turn (PhiMoE's SparseMixer): in eval mode, in rank order, by its own formula."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import pytest
import torch

from moetrace import record, replay
from moetrace.conformance import verdicts, zoo
from moetrace.conformance.census import batch, traces_of
from moetrace.conformance.scoring import RULES
from moetrace.conformance.spies import spying
from moetrace.errors import ReplayError, UnsupportedRouterError
from moetrace.replayer import ReplayPolicy, router_scores
from moetrace.routers import find_routers, layout_of, selection


@pytest.fixture
def model() -> Any:
    return zoo.tiny(zoo.architecture("phimoe"))


def recorded_as_received(model: Any) -> bool:
    with torch.no_grad(), record(model) as recording, spying(model) as calls:
        model(input_ids=batch())
    return verdicts.received(calls, recording.experts_LNK) is True


def test_experts_far_below_the_best_get_their_weight_and_gradient(model: Any) -> None:
    """Outside the live window the model weighs an expert zero: the window goes with the replayed one."""
    with torch.no_grad(), spying(model) as calls:
        model(input_ids=batch())
    routes_LNK = torch.stack([call.logits.argsort(-1)[:, :2] for call in calls if call.logits is not None])
    traces = traces_of(layout_of(model), routes_LNK, batch())
    with replay(model, traces, input_ids=batch(), on_shift="ignore"), spying(model) as calls:
        model(input_ids=batch(), use_cache=False).logits.square().mean().backward()
    assert verdicts.weighs_all(calls, routes_LNK)
    assert verdicts.follows(RULES["phimoe"], model.config, calls, routes_LNK) is True
    assert verdicts.gradient(RULES["phimoe"], model.config, calls, routes_LNK) == "all"
    first = calls[0].logits  # those of later layers are others than the plain model's
    assert first is not None
    assert first.grad is not None
    assert bool((first.grad.gather(1, routes_LNK[0]) != 0).all())


def test_which_expert_comes_first_matters_and_is_kept(model: Any) -> None:
    with torch.no_grad(), record(model) as recording:
        plain = model(input_ids=batch()).logits
    turned = traces_of(layout_of(model), recording.experts_LNK.flip(-1), batch())
    with torch.no_grad(), replay(model, turned, input_ids=batch()), record(model) as again:
        logits = model(input_ids=batch()).logits
    assert torch.equal(again.experts_LNK, recording.experts_LNK.flip(-1))
    assert not torch.allclose(logits, plain)


def test_equal_scores_are_recorded_as_they_are_used(model: Any) -> None:
    for site in find_routers(model):
        site.module.get_parameter("weight").data.zero_()
    assert recorded_as_received(model)


def test_a_router_that_draws_is_refused_and_one_that_chooses_is_not(model: Any) -> None:
    with record(model) as recording:
        model(input_ids=batch())
    traces = recording.traces(batch())
    model.train()
    with pytest.raises(UnsupportedRouterError, match=r"at random in training mode.*Call \.eval\(\)"), record(model):
        model(input_ids=batch())
    with pytest.raises(UnsupportedRouterError), replay(model, traces, input_ids=batch()):
        model(input_ids=batch())
    for site in find_routers(model):
        site.module.eval()
    assert recorded_as_received(model)
    with replay(model, traces, input_ids=batch()) as session:
        model(input_ids=batch())
    assert session.stats().overlap == 1


def test_a_set_is_refused(model: Any) -> None:
    with record(model) as recording:
        model(input_ids=batch())
    traces = [changed(trace, order="set") for trace in recording.traces(batch())]
    refused = pytest.raises(ReplayError, match="expected order 'rank', got order 'set'")
    with refused, replay(model, traces, input_ids=batch()):
        pass


def test_it_has_no_margin_to_replay_by_and_no_single_softmax(model: Any) -> None:
    """What separates the K-th score from the next says nothing about which expert comes first."""
    with torch.no_grad(), record(model) as recording:
        model(input_ids=batch())
    with (
        pytest.raises(ReplayError, match=r"chooses its experts in turn.*got margin 0\.1"),
        replay(model, recording.traces(batch()), input_ids=batch(), policy=ReplayPolicy(margin=0.1)),
    ):
        pass
    with pytest.raises(UnsupportedRouterError, match="chooses its experts in turn"), router_scores(model):
        pass


def test_other_than_k_turns_are_refused() -> None:
    """SparseMixer chooses two, whatever the config says."""
    model = zoo.tiny(zoo.architecture("phimoe"), num_experts_per_tok=1)
    with pytest.raises(UnsupportedRouterError, match=r"in turn: expected 1 maxima .* got 2"), record(model):
        model(input_ids=batch())


def test_the_best_the_best_of_the_rest_and_so_on() -> None:
    scores_NE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selection._in_turn(scores_NE, 3), scores_NE.topk(3).indices)


def test_the_formula_is_what_it_says() -> None:
    """Logits 2.0 and 1.99 are within 2 per cent, 1.0 is not; once 2.0 is gone, 1.99 stands alone."""
    logits_NE = torch.tensor([[2.0, 1.0, 1.99, -3.0]]).double()
    weights = RULES["phimoe"]._in_turn(0.02, logits_NE, torch.tensor([[0, 2]]))[0].tolist()
    assert weights == pytest.approx([1 / (1 + 2.718281828459045**-0.01), 1.0])
