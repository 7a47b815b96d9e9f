"""`output_router_logits` and the losses made of it stay live, whatever is recorded or replayed.

Axes: L MoE layers, N tokens, E experts, K experts per token, B sequences, S tokens of each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tapped import TAPPED, found
from torch import nn

from moetrace import record, replay
from moetrace.conformance import zoo
from moetrace.conformance.census import batch, random_routes, traces_of
from moetrace.conformance.spies import RouterCall, spying
from moetrace.routers import layout_of


def run(model: Any, output_router_logits: bool) -> tuple[Any, list[torch.Tensor]]:
    """Output and gradients of one training step on the model's own loss."""
    model.zero_grad()
    ids_BS = batch()
    output = model(input_ids=ids_BS, labels=ids_BS, use_cache=False, output_router_logits=output_router_logits)
    output.loss.backward(retain_graph=True)
    return output, gradients_of(model)


def run_plain(model: Any) -> tuple[Any, list[torch.Tensor]]:
    """The same with router logits and without us: where that fails, there is nothing to keep working."""
    try:
        return run(model, True)
    except AttributeError as error:
        if transformers.__version__ != "5.17.0":
            raise
        pytest.skip(f"the model itself does not run so in this release ({error})")


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def altered(model: nn.Module) -> tuple[Any, torch.Tensor]:
    """Replay of random routes, and the routes."""
    layout, ids_BS = layout_of(model), batch()
    routes_LNK = random_routes(model, layout, ids_BS.numel())
    return replay(model, traces_of(layout, routes_LNK, ids_BS), input_ids=ids_BS, on_shift="ignore"), routes_LNK


def balance_loss(logits_LNE: torch.Tensor, ids_LNK: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's load-balancing loss, arXiv 2101.03961, equations 4 to 6, over all layers and K choices.

    E times the sum over experts of f_i, the share of tokens sent to expert i, and P_i, its mean probability.
    """
    probability_TE = logits_LNE.softmax(-1).flatten(0, 1)
    share_E = torch.zeros_like(probability_TE).scatter(1, ids_LNK.flatten(0, 1), 1.0).mean(0)
    return logits_LNE.shape[-1] * (share_E * probability_TE.mean(0)).sum()


def offered(output: Any) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Router logits and auxiliary loss of an output, as far as it has them."""
    loss = getattr(output, "aux_loss", None)  # DBRX of transformers 5.17 returns the number 0
    return getattr(output, "router_logits", None) or (), [loss] if isinstance(loss, torch.Tensor) else []


def same_bits(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def computed(call: RouterCall, reported: torch.Tensor) -> bool:
    """Whether what the model reports is what the router computed; Gemma 4 reports it after the softmax."""
    assert call.logits is not None
    logits_NE = call.logits.reshape(reported.shape)
    return torch.equal(logits_NE, reported) or torch.equal(logits_NE.softmax(-1), reported)


@pytest.mark.parametrize("name", TAPPED)
def test_all_that_is_returned_is_the_plain_models_under_record_and_its_own_replay(name: str) -> None:
    model, ids_BS = zoo.tiny(zoo.architecture(name)), batch()
    plain, plain_gradients = run_plain(model)
    with record(model) as recording:
        recorded, recorded_gradients = run(model, True)
    with replay(model, recording.traces(ids_BS), input_ids=ids_BS, on_shift="ignore"):
        replayed, replayed_gradients = run(model, True)
    for output, gradients in ((recorded, recorded_gradients), (replayed, replayed_gradients)):
        assert torch.equal(output.logits, plain.logits)
        assert torch.equal(output.loss, plain.loss)
        assert same_bits(gradients, plain_gradients)
        for got, expected in zip(offered(output), offered(plain), strict=True):
            assert same_bits(got, expected)


@pytest.mark.parametrize("name", TAPPED)
def test_router_logits_are_live_under_altered_routes_and_change_nothing_but_by_the_aux_loss(name: str) -> None:
    model: Any = zoo.tiny(zoo.architecture(name))
    plain_logits, _ = offered(run_plain(model)[0])
    replaying, routes_LNK = altered(model)
    with replaying, spying(model) as calls:
        without, expected = run(model, False)
        output, gradients = run(model, True)
    router_logits, aux_losses = offered(output)
    assert torch.equal(output.logits, without.logits)
    if name == "jetmoe":  # in the order of running; of the attention twice, from its router and from itself
        mlps, attentions = calls[::2], calls[1::2]
        calls = [call for mlp, attention in zip(mlps, attentions, strict=True) for call in (attention, attention, mlp)]
        routes_LNK = routes_LNK[[call.site.index for call in calls]]
    if router_logits:
        assert len(router_logits) == len(calls)
        assert all(computed(call, reported) for call, reported in zip(calls, router_logits, strict=True))
        assert torch.equal(router_logits[0], plain_logits[0])  # nothing was replayed before the first
        assert not torch.equal(router_logits[-1], plain_logits[-1])
    for aux_loss in aux_losses:
        assert_counts_live_choices(aux_loss.detach().double(), calls, routes_LNK)
        factor = factor_of(model)
        torch.testing.assert_close(output.loss, without.loss + factor * aux_loss)
        model.zero_grad()
        aux_loss.backward()
        expected = [main + factor * extra for main, extra in zip(expected, gradients_of(model), strict=True)]
    for got, sum_of_both in zip(gradients, expected, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-5 * float(sum_of_both.abs().max() + 1e-3)}
        torch.testing.assert_close(got, sum_of_both, **(close if aux_losses else {"rtol": 0, "atol": 0}))


def assert_counts_live_choices(loss: torch.Tensor, calls: list[RouterCall], routes_LNK: torch.Tensor) -> None:
    logits_LNE = torch.stack([call.logits_NE for call in calls if call.logits_NE is not None])
    live_LNK = logits_LNE.argsort(-1, descending=True)[..., : routes_LNK.shape[2]]
    torch.testing.assert_close(loss, balance_loss(logits_LNE, live_LNK), rtol=1e-5, atol=0)
    assert abs(loss - balance_loss(logits_LNE, routes_LNK)) > 1e-3


def factor_of(model: Any) -> float:
    """What multiplies the auxiliary loss in the loss; DBRX has it in the model only, JetMoE by another name."""
    holders = (model, model.config.get_text_config(decoder=True))
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next(float(getattr(holder, name)) for holder in holders for name in names if hasattr(holder, name))


def test_the_census_knows_who_offers_nothing() -> None:
    if transformers.__version__ == "5.17.0":
        pytest.skip("in this release a third of the families returned no router logits")
    offers = {name: found(name).router_logits for name in TAPPED}
    assert [name for name in TAPPED if not offers[name]] == ["kimi_k25", "nemo_speechlm", "nemotron_h_omni"]
    assert sum(offer == "logits, aux loss" for offer in offers.values()) == 33
