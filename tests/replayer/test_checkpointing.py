"""Activation checkpointing: the recomputation sees the routes of its own first pass, or the replay is refused.

Expected gradients come from replays of the same routes without checkpointing.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
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
    gradients_of,
    left_behind,
    loss_of,
    random_routes,
    random_tokens,
    router_spy,
    traces_of,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from moetrace import record, replay
from moetrace.errors import ReplayError
from moetrace.replayer import ReplaySession
from moetrace.routers import ModelTap

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@dataclass
class Microbatch:
    """Tokens and routes that no live router would choose."""

    name: str
    seed: int
    width: int = 8

    @property
    def tokens(self) -> torch.Tensor:
        return random_tokens(2, self.width, seed=self.seed)

    @property
    def routes(self) -> np.ndarray:
        return random_routes(2 * self.width, self.name, seed=self.seed)

    def replayed(self, model: Any) -> AbstractContextManager[ReplaySession]:
        traces = traces_of(model, self.routes, self.tokens)
        return replay(model, traces, input_ids=self.tokens, on_shift="ignore")

    def loss(self, model: Any) -> torch.Tensor:
        with self.replayed(model):
            return loss_of(model(self.tokens, use_cache=False).logits, seed=self.seed)


def enable(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def expected_gradients(name: str, *microbatches: Microbatch) -> dict[str, torch.Tensor | None]:
    """Gradients of the summed losses without checkpointing, each microbatch on its own."""
    model = build(name).train()
    for microbatch in microbatches:
        microbatch.loss(model).backward()
    return gradients_of(model)


def ids_of(calls: list[tuple[torch.Tensor, ...]], item: int) -> list[np.ndarray]:
    return [call[item].numpy() for call in calls]


@contextmanager
def counting_layers(model: Any) -> Iterator[list[int]]:
    """How often the attention of each decoder layer ran, to prove that layers were recomputed."""
    counts = [0] * len(model.model.layers)
    handles = []
    for number, layer in enumerate(model.model.layers):

        def count(*_: Any, number: int = number) -> None:
            counts[number] += 1

        handles.append(layer.self_attn.register_forward_pre_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


@REENTRANT
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_altered_routes_are_those_without_checkpointing(name: str, reentrant: bool) -> None:
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    with counting_layers(model) as counts, microbatch.replayed(model):
        loss_of(model(microbatch.tokens, use_cache=False).logits, seed=1).backward()
    assert counts == [2, 2, 2]
    assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch))


@REENTRANT
@pytest.mark.parametrize("name", NAMES)
def test_backward_after_the_block_recomputes_with_the_routes_of_the_block(name: str, reentrant: bool) -> None:
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    loss = microbatch.loss(model)
    assert left_behind(model) == []
    loss.backward()
    assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch))
    assert left_behind(model) == []


@REENTRANT
@pytest.mark.parametrize("name", NAMES)
def test_the_recomputation_uses_the_ids_of_the_first_pass(name: str, reentrant: bool) -> None:
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    with router_spy(model, name) as out, experts_spy(model, name) as spy:
        microbatch.loss(model).backward()
    assert out.counts() == spy.counts() == [2] * len(FAMILIES[name].layers)
    for layer, calls in enumerate(spy.calls):
        for ids in (*ids_of(calls, 0), *ids_of(out.calls[layer], 2)):
            assert np.array_equal(ids, microbatch.routes[:, layer])


@REENTRANT
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_replaying_its_own_record_under_checkpointing_is_exact(name: str, reentrant: bool) -> None:
    model, tokens = build(name).train(), random_tokens(2, 8)
    loss_of(model(tokens, use_cache=False).logits).backward()
    expected = gradients_of(model)
    model.zero_grad()
    enable(model, reentrant)
    with record(model) as recording:
        model(tokens, use_cache=False)
    with replay(model, recording.traces(tokens), input_ids=tokens):
        loss = loss_of(model(tokens, use_cache=False).logits)
    loss.backward()
    assert_same_gradients(gradients_of(model), expected)


def backward_in_order(losses: list[torch.Tensor], order: str) -> None:
    if order == "joint":
        torch.stack(losses).sum().backward()
        return
    for loss in losses if order == "fifo" else losses[::-1]:
        loss.backward()


@REENTRANT
@pytest.mark.parametrize("order", ["fifo", "lifo", "joint"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_microbatches_in_flight_keep_their_own_routes(name: str, order: str, reentrant: bool) -> None:
    # the same number of tokens in each, so that no size check could tell them apart
    microbatches = [Microbatch(name, seed) for seed in (1, 2, 3)]
    model = build(name).train()
    enable(model, reentrant)
    losses = [microbatch.loss(model) for microbatch in microbatches]
    with experts_spy(model, name) as spy:
        backward_in_order(losses, order)
    assert spy.counts() == [3] * len(FAMILIES[name].layers)
    for layer, calls in enumerate(spy.calls):
        recomputed = sorted(ids.tobytes() for ids in ids_of(calls, 0))
        given = sorted(np.ascontiguousarray(microbatch.routes[:, layer]).tobytes() for microbatch in microbatches)
        assert recomputed == given
    expected = expected_gradients(name, *microbatches)
    scale = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    assert_same_gradients(gradients_of(model), expected, rtol=1e-4, atol=1e-6 * scale)  # sums in another order


@REENTRANT
@pytest.mark.parametrize("kind", ["no_grad", "grad", "eval"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_forward_only_pass_in_between_leaves_no_routes_queued(kind: str, inside: bool, reentrant: bool) -> None:
    name = "deepseek_v3"
    first, only, last = (Microbatch(name, seed) for seed in (1, 2, 3))
    model = build(name).train()
    enable(model, reentrant)

    def forward_only() -> None:
        model.train(kind != "eval")
        with torch.set_grad_enabled(kind == "grad"), only.replayed(model):
            model(only.tokens, use_cache=False)
        model.train()

    if inside:
        with first.replayed(model):
            loss = loss_of(model(first.tokens, use_cache=False).logits, seed=1)
            forward_only()
            loss.backward()
    else:
        loss = first.loss(model)
        forward_only()
        later = last.loss(model)
        forward_only()
        loss.backward()
        later.backward()
    expected = expected_gradients(name, first) if inside else expected_gradients(name, first, last)
    assert_same_gradients(gradients_of(model), expected)


def go_back_inside_a_replay(name: str, model: Any, tokens: torch.Tensor) -> None:
    """A plain forward of `tokens`, whose backward runs within the replay of another microbatch, and does not count."""
    microbatch, loss = Microbatch(name, seed=1), loss_of(model(tokens, use_cache=False).logits)
    with microbatch.replayed(model) as session:
        with torch.no_grad():
            model(microbatch.tokens, use_cache=False)
        before = session.stats()
        loss.backward()
    assert session.stats() == before


@REENTRANT
def test_a_plain_forward_stays_live_when_its_backward_runs_inside_a_replay(reentrant: bool) -> None:
    name, tokens = "qwen3_moe", random_tokens(2, 8, seed=9)
    plain = build(name).train()
    loss_of(plain(tokens, use_cache=False).logits).backward()
    model = build(name).train()
    enable(model, reentrant)
    go_back_inside_a_replay(name, model, tokens)
    assert_same_gradients(gradients_of(model), gradients_of(plain))


@REENTRANT
def test_the_backward_of_one_replay_inside_another_keeps_its_own_routes(reentrant: bool) -> None:
    name = "qwen3_moe"
    first, second = Microbatch(name, seed=1), Microbatch(name, seed=2)
    model = build(name).train()
    enable(model, reentrant)
    loss = first.loss(model)
    with second.replayed(model) as session:
        later = loss_of(model(second.tokens, use_cache=False).logits, seed=2)
        loss.backward()
        later.backward()
    assert session.stats().forwards == 1
    assert_same_gradients(gradients_of(model), expected_gradients(name, first, second))


@REENTRANT
def test_the_recomputation_of_tokens_without_rows_goes_live_again(reentrant: bool) -> None:
    name, tokens = "mixtral", random_tokens(1, 12)
    routes = random_routes(12, name)
    valid = np.arange(12) % 3 != 0
    gradients = []
    for checkpointed in (False, True):
        model = build(name).train()
        if checkpointed:
            enable(model, reentrant)
        (trace,) = traces_of(model, routes, tokens)
        partial = type(trace).build(trace.experts_TLK, trace.layout, tokens[0].numpy(), valid_T=valid)
        with replay(model, [partial], input_ids=tokens, missing="live", on_shift="ignore"):
            loss = loss_of(model(tokens, use_cache=False).logits)
        loss.backward()
        gradients.append(gradients_of(model))
    assert_same_gradients(*gradients)


@REENTRANT
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_statistics_and_recordings_do_not_count_the_recomputation(name: str, reentrant: bool) -> None:
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    with record(model) as recording, microbatch.replayed(model) as session:
        loss = loss_of(model(microbatch.tokens, use_cache=False).logits)
        before, recorded = session.stats(), recording.experts_LNK
        loss.backward()
        assert session.stats() == before
        assert torch.equal(recording.experts_LNK, recorded)
        assert before.forwards == 1
        loss_of(model(microbatch.tokens, use_cache=False).logits).backward()
        assert session.stats().forwards == 2
    assert np.array_equal(recorded.permute(1, 0, 2).numpy(), microbatch.routes)


@REENTRANT
def test_a_replay_of_some_checkpointed_layers_is_exact(reentrant: bool) -> None:
    name = "mixtral"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    model.model.layers[1].gradient_checkpointing = False
    with counting_layers(model) as counts:
        microbatch.loss(model).backward()
    assert counts == [2, 1, 2]
    assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch))


@REENTRANT
def test_the_routes_outlive_the_model_object(reentrant: bool) -> None:
    """Only parameters are held, as an optimizer holds them: the pending backward still knows its routes."""
    name = "qwen3_moe"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    parameters = dict(model.named_parameters())
    loss = microbatch.loss(model)
    del model
    gc.collect()
    loss.backward()
    got = {parameter_name: parameter.grad for parameter_name, parameter in parameters.items()}
    assert_same_gradients(got, expected_gradients(name, microbatch))


@REENTRANT
@pytest.mark.parametrize("inside", [True, False])
def test_a_backward_on_another_thread_recomputes_with_the_routes_of_the_forward(inside: bool, reentrant: bool) -> None:
    """On a GPU autograd runs the backward on threads of its own."""
    name = "qwen3_moe"
    first, second = Microbatch(name, seed=1), Microbatch(name, seed=2)
    model = build(name).train()
    enable(model, reentrant)
    loss = first.loss(model)
    thread = threading.Thread(target=loss.backward)
    with second.replayed(model) if inside else nullcontext():
        with torch.no_grad():
            model(second.tokens, use_cache=False)
        thread.start()
        thread.join(60)
    assert_same_gradients(gradients_of(model), expected_gradients(name, first))
    assert left_behind(model) == []


@pytest.mark.parametrize("retain", [1, 3])
def test_a_graph_may_be_walked_again(retain: int) -> None:
    name = "qwen3_moe"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant=False)
    loss = microbatch.loss(model)
    for _ in range(retain):
        loss.backward(retain_graph=True)
    expected = expected_gradients(name, *[microbatch] * retain)
    assert_same_gradients(gradients_of(model), expected)


@REENTRANT
def test_a_session_can_checkpoint_several_forwards(reentrant: bool) -> None:
    name = "gpt_oss"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    with microbatch.replayed(model) as session, experts_spy(model, name) as spy:
        losses = [loss_of(model(microbatch.tokens, use_cache=False).logits, seed=1) for _ in range(2)]
        torch.stack(losses).sum().backward()
    assert session.stats().forwards == 2
    assert all(np.array_equal(ids, microbatch.routes[:, 0]) for ids in ids_of(spy.calls[0], 0))
    assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch, microbatch))


@REENTRANT
def test_a_backward_after_the_block_does_not_look_for_routers_layer_by_layer(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, own = list[ModelTap](), ModelTap._prepare

    def look(tap: ModelTap) -> None:
        looks.append(tap)
        own(tap)

    monkeypatch.setattr(ModelTap, "_prepare", look)
    microbatch, model = Microbatch("mixtral", seed=1), build("mixtral").train()
    enable(model, reentrant)
    with counting_layers(model) as counts:
        microbatch.loss(model).backward()
    assert counts == [2, 2, 2]
    assert len(looks) == 1


@REENTRANT
def test_a_backward_finds_what_has_changed_since_the_block(reentrant: bool) -> None:
    name = "qwen3_moe"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    loss = microbatch.loss(model)
    enable(model, reentrant)  # other checkpoint functions than those that were followed
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    loss.backward()
    assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch))
    after = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(a is b for a, b in zip(before, after, strict=True)), "the old ones were put back"


def by_hand(module: Any, reentrant: bool) -> None:
    """Put a module's forward under a checkpoint without telling the model."""
    plain = module.forward
    module.forward = lambda hidden, *args, **kwargs: checkpoint(
        lambda hidden: plain(hidden, *args, **kwargs), hidden, use_reentrant=reentrant
    )


UNFOLLOWED = "activation checkpoint that moetrace cannot follow"


@REENTRANT
@pytest.mark.parametrize("what", ["layer", "block", "whole model"])
def test_a_checkpoint_made_by_hand_is_refused_not_recomputed_live(what: str, reentrant: bool) -> None:
    microbatch, model = Microbatch("qwen3_moe", seed=1), build("qwen3_moe").train()
    layer = model.model.layers[1]
    call: Callable[[], Any] = lambda: model(microbatch.tokens, use_cache=False)  # noqa: E731
    if what == "whole model":
        anchor = torch.ones(1, requires_grad=True)
        call = lambda: checkpoint(  # noqa: E731
            lambda anchor: model(microbatch.tokens, use_cache=False).logits, anchor, use_reentrant=reentrant
        )
    else:
        by_hand(layer if what == "layer" else layer.mlp, reentrant)
    call()  # nothing is wrong without a replay
    with pytest.raises(ReplayError, match=UNFOLLOWED) as refused, microbatch.replayed(model):
        call()
    assert "model.layers.1.mlp.gate" in str(refused.value)
    assert "gradient_checkpointing_enable" in str(refused.value)


class OwnCheckpoint(torch.autograd.Function):
    """A checkpoint of nobody's library, as DeepSpeed and Unsloth have theirs."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(hidden)
        return function(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden)
        torch.autograd.backward(output, grads)
        return None, hidden.grad


@pytest.mark.parametrize("enabled", [False, True], ids=["alone", "within a followed one"])
def test_a_checkpoint_that_is_a_function_of_its_own_is_refused(enabled: bool) -> None:
    name = "qwen3_moe"
    microbatch, model, plain = Microbatch(name, seed=1), build(name).train(), build(name).train()
    if enabled:
        enable(model, reentrant=True)
    block = model.model.layers[1].mlp
    own = block.forward
    block.forward = lambda hidden: OwnCheckpoint.apply(own, hidden)
    for each in (plain, model):
        loss_of(each(microbatch.tokens, use_cache=False).logits).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))  # nothing is wrong without a replay
    with pytest.raises(ReplayError, match=UNFOLLOWED) as refused, microbatch.replayed(model):
        model(microbatch.tokens, use_cache=False)
    assert "model.layers.1.mlp.gate" in str(refused.value)
    assert "autograd.Function" in str(refused.value)


@REENTRANT
def test_a_checkpoint_by_hand_within_a_followed_one_is_refused_or_followed(reentrant: bool) -> None:
    name = "qwen3_moe"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, reentrant)
    by_hand(model.model.layers[1].mlp, reentrant)
    by_hand(model.model.layers[2].mlp, reentrant)
    plain = build(name).train()
    for each in (plain, model):
        loss_of(each(microbatch.tokens, use_cache=False).logits).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))  # nothing is wrong without a replay
    model.zero_grad()
    with suppress(ReplayError):
        microbatch.loss(model).backward()
        assert_same_gradients(gradients_of(model), expected_gradients(name, microbatch))


@REENTRANT
@pytest.mark.parametrize("enabled_before", [True, False])
def test_checkpointing_enabled_after_the_replay_began_is_refused(enabled_before: bool, reentrant: bool) -> None:
    microbatch, model = Microbatch("mixtral", seed=1), build("mixtral").train()

    def enable_and_run() -> None:
        enable(model, reentrant)
        model(microbatch.tokens, use_cache=False)

    if enabled_before:
        enable(model, reentrant)
    with pytest.raises(ReplayError, match=UNFOLLOWED), microbatch.replayed(model):
        enable_and_run()
    assert left_behind(model) == []
    microbatch.loss(model).backward()  # and from the next replay on it is followed
    assert_same_gradients(gradients_of(model), expected_gradients("mixtral", microbatch))


def test_checkpointing_disabled_during_a_replay_is_no_obstacle() -> None:
    microbatch, model = Microbatch("mixtral", seed=1), build("mixtral").train()
    enable(model, reentrant=False)
    with microbatch.replayed(model), experts_spy(model, "mixtral") as spy:
        model.gradient_checkpointing_disable()
        loss_of(model(microbatch.tokens, use_cache=False).logits, seed=1).backward()
    assert spy.counts() == [1, 1, 1]
    assert_same_gradients(gradients_of(model), expected_gradients("mixtral", microbatch))


def wrap_layers(model: Any, reentrant: bool) -> None:
    """What accelerate's FSDP plugin and torchtitan do instead of asking the model."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    layers = tuple(type(layer) for layer in model.model.layers)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, kind),
        check_fn=lambda module: isinstance(module, layers),
    )


@REENTRANT
@pytest.mark.parametrize("order", ["fifo", "lifo", "joint"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_torchs_checkpoint_wrapper_is_followed(name: str, order: str, reentrant: bool) -> None:
    microbatches = [Microbatch(name, seed) for seed in (1, 2)]
    model = build(name).train()
    wrap_layers(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
    with counting_layers(model) as counts:
        backward_in_order([microbatch.loss(model) for microbatch in microbatches], order)
    assert counts == [4, 4, 4]
    assert left_behind(model) == []
    got = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in gradients_of(model).items()}
    assert_same_gradients(got, expected_gradients(name, *microbatches), rtol=1e-5, atol=1e-6)


def test_a_tap_goes_from_a_checkpoint_wrapper_without_a_trace() -> None:
    model = build("mixtral").train()
    wrap_layers(model, reentrant=False)
    before = [layer.checkpoint_fn for layer in model.model.layers]
    Microbatch("mixtral", seed=1).loss(model)
    assert all(layer.checkpoint_fn is own for layer, own in zip(model.model.layers, before, strict=True))


@pytest.mark.parametrize("outer", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inner", ["reentrant", "non-reentrant"])
def test_checkpoints_within_checkpoints_are_exact_and_counted_once(inner: str, outer: str) -> None:
    name = "mixtral"
    microbatch, model = Microbatch(name, seed=1), build(name).train()
    enable(model, inner == "reentrant")
    wrap_layers(model, outer == "reentrant")
    model.enable_input_require_grads()
    with microbatch.replayed(model) as session, record(model) as recording, counting_layers(model) as counts:
        loss = loss_of(model(microbatch.tokens, use_cache=False).logits, seed=1)
        stats, recorded = session.stats(), recording.experts_LNK
        loss.backward()
        assert session.stats() == stats
        assert torch.equal(recording.experts_LNK, recorded)
    assert stats.forwards == 1
    assert min(counts) > 1
    got = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in gradients_of(model).items()}
    assert_same_gradients(got, expected_gradients(name, microbatch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outer", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inner", ["reentrant", "non-reentrant"])
def test_a_plain_forward_under_nested_checkpoints_stays_live_inside_a_replay(inner: str, outer: str) -> None:
    name, tokens = "mixtral", random_tokens(2, 8, seed=9)
    plain = build(name).train()
    loss_of(plain(tokens, use_cache=False).logits).backward()
    model = build(name).train()
    enable(model, inner == "reentrant")
    wrap_layers(model, outer == "reentrant")
    model.enable_input_require_grads()
    go_back_inside_a_replay(name, model, tokens)
    got = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in gradients_of(model).items()}
    assert_same_gradients(got, gradients_of(plain), rtol=1e-5, atol=1e-6)
