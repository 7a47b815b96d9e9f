"""LoRA-wrapped models are recorded and replayed like the models inside: on attention, on experts, on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, experts_spy, random_routes, random_tokens, traces_of
from peft import LoraConfig, get_peft_model

from moetrace import record, replay
from moetrace.errors import UnsupportedRouterError
from moetrace.routers import fingerprint_of, layout_of

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
BOTH = {**EXPERTS, **ATTENTION}


def wrapped(model: Any, targets: dict[str, Any]) -> Any:
    """The model under LoRA whose second factors are not zero, so that it matters."""
    peft_model: Any = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model


@pytest.mark.parametrize("targets", [ATTENTION, EXPERTS, BOTH], ids=["attention", "experts", "both"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_lora_model_records_and_replays(name: str, targets: dict[str, Any]) -> None:
    base, tokens = build(name), random_tokens(1, 14)
    layout, fingerprint = layout_of(base), fingerprint_of(base)
    model = wrapped(base, targets)
    assert layout_of(model) == layout
    assert fingerprint_of(model) == fingerprint
    with torch.no_grad(), record(model) as recording:
        plain = model(input_ids=tokens, use_cache=False).logits
    with replay(model, recording.traces(tokens), input_ids=tokens):
        own = model(input_ids=tokens, use_cache=False).logits
    assert torch.equal(plain, own.detach())
    own.square().mean().backward()
    learned = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert learned
    assert all(grad is not None and grad.abs().max() > 0 for grad in learned)
    routes = random_routes(14, name)
    altered = replay(model, traces_of(base, routes, tokens), input_ids=tokens, on_shift="ignore")
    with torch.no_grad(), altered, record(model) as used:
        other = model(input_ids=tokens, use_cache=False).logits
    assert not torch.equal(other, plain)
    assert used.experts_LNK.permute(1, 0, 2).tolist() == routes.tolist()


def test_under_lora_on_attention_the_experts_receive_the_replayed_ids() -> None:
    base, tokens = build("mixtral"), random_tokens(1, 14)
    model, routes = wrapped(base, ATTENTION), random_routes(14, "mixtral")
    replaying = replay(model, traces_of(base, routes, tokens), input_ids=tokens, on_shift="ignore")
    with torch.no_grad(), replaying, experts_spy(base, "mixtral") as spy:
        model(input_ids=tokens, use_cache=False)
    assert spy.last().permute(1, 0, 2).tolist() == routes.tolist()


@pytest.mark.parametrize("what", ["mlp.gate", "mlp"])
def test_routers_of_which_peft_trains_copies_are_refused_by_name(what: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[what])
    model: Any = get_peft_model(build("mixtral"), config)
    for attempt in (layout_of, lambda model: record(model).__enter__()):
        with pytest.raises(UnsupportedRouterError, match="PEFT's modules_to_save trains a copy") as refused:
            attempt(model)
        assert f"layers.0.{what}" in str(refused.value)


def test_a_copy_of_something_else_that_peft_trains_is_no_obstacle() -> None:
    base = build("mixtral")
    layout = layout_of(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(base, config)
    assert layout_of(model) == layout
