"""Staging holds exactly what the experts of a step received, written by the routers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, ONE_OF_EACH, build, experts_spy, random_tokens
from torch.overrides import TorchFunctionMode

from moetrace.errors import CaptureError
from moetrace.recorder import Staging
from moetrace.routers import tap_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_staging_holds_what_the_experts_received(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    tap = tap_model(model)
    staging = Staging(tap.layout, 32, CPU)
    address = staging.ids_LNK.data_ptr()
    with torch.no_grad(), tap.active(staging), experts_spy(model, name) as spy:
        model(tokens)
    assert torch.equal(staging.ids_LNK[:, :20], spy.last())
    assert staging.order == FAMILIES[name].order
    assert staging.ids_LNK.data_ptr() == address


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_writes_its_own_tokens_only(name: str) -> None:
    model = build(name)
    tap = tap_model(model)
    staging = Staging(tap.layout, 24, CPU)
    staging.ids_LNK.fill_(-1)
    with torch.no_grad(), tap.active(staging), experts_spy(model, name) as spy:
        model(random_tokens(1, 16, seed=1))
    assert torch.equal(staging.ids_LNK[:, :16], spy.last())
    assert (staging.ids_LNK[:, 16:] == -1).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_routers_own_topk_writes_to_staging_and_nothing_is_copied(name: str) -> None:
    model = build(name)
    tap = tap_model(model)
    staging = Staging(tap.layout, 16, CPU)
    topks, copies = [], []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.topk and "out" in (kwargs or {}):
                topks.append(kwargs["out"][1].data_ptr())
            if func is torch.Tensor.copy_ and args[0].untyped_storage().data_ptr() == staging.ids_LNK.data_ptr():
                copies.append(args)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), tap.active(staging), Watch():
        model(random_tokens(1, 16))
    assert topks == [staging.ids_LNK[layer].data_ptr() for layer in range(tap.layout.num_layers)]
    assert not copies


def test_with_a_second_session_or_a_gradient_the_ids_reach_staging_by_a_copy() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 16)
    tap = tap_model(model)
    staging, second, third = (Staging(tap.layout, 16, CPU) for _ in range(3))
    with tap.active(staging):
        loss = model(tokens).logits.sum()
    loss.backward()
    with torch.no_grad(), tap.active(second, third):
        model(tokens)
    assert staging.ids_LNK.any()
    assert torch.equal(staging.ids_LNK, second.ids_LNK)
    assert torch.equal(staging.ids_LNK, third.ids_LNK)


def test_a_step_that_staging_cannot_hold_is_refused() -> None:
    model = build("mixtral")
    tap = tap_model(model)
    staging = Staging(tap.layout, 8, CPU)
    assert staging.capacity == 8
    with torch.no_grad(), tap.active(staging):
        model(random_tokens(1, 8))
        with pytest.raises(CaptureError, match="expected <= 8, got 9"):
            model(random_tokens(1, 9))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_writes_to_the_staging_that_is_active(dynamic: bool) -> None:
    model, tokens = build("mixtral"), random_tokens(1, 12)
    tap = tap_model(model)
    torch.compiler.reset()
    step = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad(), tap.installed():
        for staging in (Staging(tap.layout, 16, CPU), Staging(tap.layout, 16, CPU)):
            with tap.active(staging), experts_spy(model, "mixtral") as spy:
                model(tokens)
            expected_LNK = spy.last()
            staging.ids_LNK.fill_(-1)
            with tap.active(staging):
                step(tokens)
            assert torch.equal(staging.ids_LNK[:, :12], expected_LNK)
            assert (staging.ids_LNK[:, 12:] == -1).all()
