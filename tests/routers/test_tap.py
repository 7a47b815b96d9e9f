"""The tap: exact ids in, weights and gradients by the model's own formula out, and nothing left behind.

The formulas live in `families.py`, in float64, with their sources.
"""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    NAMES,
    ONE_OF_EACH,
    build,
    experts_of,
    experts_spy,
    left_behind,
    loss_of,
    random_routes,
    random_tokens,
    router_spy,
    routers_of,
    traces_of,
)
from torch import nn

from moetrace import record, replay
from moetrace.errors import RouterError, UnsupportedRouterError
from moetrace.routers import RoutingSession, Selection, fingerprint_of, tap_model


def replaying(model: Any, routes: np.ndarray, tokens: torch.Tensor) -> AbstractContextManager[Any]:
    """Replay of routes that the live router would not choose."""
    return replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore")


def live_groups(model: Any, name: str, layer_index: int, logits_NE: torch.Tensor) -> torch.Tensor:
    """`[N, E]` bool: is the expert in one of its token's live groups? By sorting, not by the model's own code."""
    router = routers_of(model, name)[layer_index]
    scores_NE = logits_NE.double().softmax(-1)
    best_NG = scores_NE.view(len(scores_NE), router.num_group, -1).amax(-1)
    live_NG = best_NG.argsort(-1, descending=True).argsort(-1) < router.topk_group
    return live_NG.repeat_interleave(router.num_experts // router.num_group, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_replayed_experts_follow_the_models_own_formula(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 24)
    routes = random_routes(48, name)
    with (
        torch.no_grad(),
        replaying(model, routes, tokens),
        experts_spy(model, name) as spy,
        router_spy(model, name) as out,
    ):
        model(tokens)
    routers = routers_of(model, name)
    for index, router in enumerate(routers):
        ids_NK = torch.from_numpy(routes[:, index])
        assert torch.equal(spy.calls[index][-1][0], ids_NK)
        expected_NK = FAMILIES[name].weights(router, out.calls[index][-1][0].double(), ids_NK)
        torch.testing.assert_close(spy.calls[index][-1][1].double(), expected_NK, rtol=1e-5, atol=1e-7)
        assert (expected_NK > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_formulas_of_this_test_are_those_of_the_unpatched_models(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 24)
    with torch.no_grad(), router_spy(model, name) as out:
        model(tokens)
    for index, router in enumerate(routers_of(model, name)):
        logits_NE, weights_NK, ids_NK = out.calls[index][-1]
        expected_NK = FAMILIES[name].weights(router, logits_NE.double(), ids_NK)
        torch.testing.assert_close(weights_NK.double(), expected_NK, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["deepseek_v2_groups", "deepseek_v3", "deepseek_v3_16"])
def test_groups_are_really_limited_in_the_tiny_models(name: str) -> None:
    model = build(name)
    with torch.no_grad(), router_spy(model, name) as out:
        model(random_tokens(2, 24))
    for index, router in enumerate(routers_of(model, name)):
        logits_NE, _, ids_NK = out.calls[index][-1]
        bias = getattr(router, "e_score_correction_bias", torch.zeros(()))
        assert name == "deepseek_v2_groups" or bias.abs().min() > 0
        ungrouped_NK = (logits_NE.sigmoid() + bias).topk(router.top_k).indices
        assert not torch.equal(ungrouped_NK.sort(-1).values, ids_NK.sort(-1).values)


def test_an_expert_outside_the_live_groups_keeps_its_unmasked_weight() -> None:
    """The trap of DeepSeek-V2: it zeroes the scores outside the live groups and weighs by what top-k returns."""
    name = "deepseek_v2_groups"
    model, tokens = build(name), random_tokens(2, 24)
    with torch.no_grad(), router_spy(model, name) as out:
        model(tokens)
    worst = np.stack([logits.argsort(-1)[:, :2].numpy() for logits in (out.calls[0][-1][0], out.calls[1][-1][0])], 1)
    with (
        torch.no_grad(),
        replaying(model, worst, tokens),
        experts_spy(model, name) as spy,
        router_spy(model, name) as out,
    ):
        model(tokens)
    outside = 0
    for index, router in enumerate(routers_of(model, name)):
        logits_NE, ids_NK = out.calls[index][-1][0], torch.from_numpy(worst[:, index])
        is_live_NK = live_groups(model, name, index, logits_NE).gather(-1, ids_NK)
        outside += int((~is_live_NK).sum())
        weights_NK = spy.calls[index][-1][1].double()
        probability_NK = logits_NE.double().softmax(-1).gather(-1, ids_NK)
        torch.testing.assert_close(weights_NK, probability_NK * router.routed_scaling_factor, rtol=1e-5, atol=1e-9)
    assert outside >= 48


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_router_as_its_formula_says(name: str) -> None:
    """dL/dlogits from the model equals autograd through the float64 formula, fed with the model's dL/dweights."""
    model, tokens = build(name).train(), random_tokens(2, 24)
    routes = random_routes(48, name)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
        output[0].retain_grad()
        output[1].retain_grad()
        kept.append((output[0], output[1]))

    handles = [router.register_forward_hook(keep) for router in routers_of(model, name)]
    with replaying(model, routes, tokens):
        loss_of(model(tokens, use_cache=False).logits).backward()
    for handle in handles:
        handle.remove()
    assert len(kept) == len(FAMILIES[name].layers)
    for index, (router, (logits_NE, weights_NK)) in enumerate(zip(routers_of(model, name), kept, strict=True)):
        assert logits_NE.grad is not None
        assert weights_NK.grad is not None
        ids_NK = torch.from_numpy(routes[:, index])
        twin_NE = logits_NE.detach().double().requires_grad_()
        FAMILIES[name].weights(router, twin_NE, ids_NK).backward(weights_NK.grad.double())
        assert twin_NE.grad is not None
        scale = float(twin_NE.grad.abs().max())
        torch.testing.assert_close(logits_NE.grad.double(), twin_NE.grad, rtol=1e-3, atol=1e-5 * scale)
        assert (logits_NE.grad.gather(-1, ids_NK) != 0).all()


def test_gpt_oss_gradient_reaches_exactly_the_replayed_logits() -> None:
    model, tokens = build("gpt_oss").train(), random_tokens(1, 24)
    routes = random_routes(24, "gpt_oss")
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
        output[0].retain_grad()
        kept.append(output[0])

    for router in routers_of(model, "gpt_oss"):
        router.register_forward_hook(keep)
    with replaying(model, routes, tokens):
        loss_of(model(tokens, use_cache=False).logits).backward()
    for index, logits_NE in enumerate(kept):
        assert logits_NE.grad is not None
        replayed_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, torch.from_numpy(routes[:, index]), True)
        assert torch.equal(logits_NE.grad != 0, replayed_NE)


@pytest.mark.parametrize("name", NAMES)
def test_router_logits_stay_live_under_record_and_replay(name: str) -> None:
    model, tokens = build(name), random_tokens(1, 24)
    routes = random_routes(24, name)
    with torch.no_grad():
        plain = model(tokens, output_router_logits=True)
        if not hasattr(plain, "router_logits"):
            pytest.skip("this release of transformers returns no router logits for this family")
        with record(model):
            recorded = model(tokens, output_router_logits=True)
        with replaying(model, routes, tokens), router_spy(model, name) as out:
            replayed = model(tokens, output_router_logits=True)
    assert len(plain.router_logits) == len(FAMILIES[name].layers)
    for before, during in zip(plain.router_logits, recorded.router_logits, strict=True):
        assert torch.equal(before, during)
    for calls, during in zip(out.calls, replayed.router_logits, strict=True):
        assert torch.equal(calls[-1][0], during)
    assert torch.equal(plain.router_logits[0], replayed.router_logits[0])  # nothing was replayed before layer 0
    assert not torch.equal(plain.router_logits[-1], replayed.router_logits[-1])


class SelectionSpy(RoutingSession):
    """A session that looks and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[Selection] = []

    def on_selection(self, selection: Selection) -> None:
        self.seen.append(selection)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_expert_selection_is_tapped_never_the_choice_of_groups(name: str) -> None:
    model, spy = build(name), SelectionSpy()
    tap = tap_model(model)
    with torch.no_grad(), tap.active(spy):
        model(random_tokens(2, 6))
    family = FAMILIES[name]
    assert [selection.site.layer for selection in spy.seen] == list(family.layers)
    for selection in spy.seen:
        assert selection.scores_NE.shape == (12, family.num_experts)
        assert selection.live_NK.shape == (12, family.top_k)
        assert selection.indices_NK is selection.live_NK
        assert selection.sorted is (family.order == "rank")
        assert selection.recompute is False


def test_a_top_k_outside_the_routers_is_not_tapped() -> None:
    model, spy = build("mixtral"), SelectionSpy()
    scores_NE = torch.rand(6, 8)
    with tap_model(model).active(spy):
        values, indices = torch.topk(scores_NE, 2, dim=-1)
        model(random_tokens(1, 6), output_router_logits=True)  # its load-balancing loss calls top-k over E again
    assert torch.equal(values, scores_NE.gather(-1, indices))
    assert len(spy.seen) == 3


def changed(model: Any, layer: int, forward: Any) -> Any:
    """The model with a subclass of a layer's router in place of it."""
    router = model.model.layers[layer].mlp.gate
    router.__class__ = type("Changed" + type(router).__name__, (type(router),), {"forward": forward})
    return model


def selects_twice(self: Any, hidden: torch.Tensor) -> Any:
    logits, _, _ = super(type(self), self).forward(hidden)
    return logits, *torch.topk(logits.softmax(-1), self.top_k, dim=-1)


def changes_ids(self: Any, hidden: torch.Tensor) -> Any:
    logits, weights, ids = super(type(self), self).forward(hidden)
    return logits, weights, (ids + 1) % self.num_experts


def copies_ids(self: Any, hidden: torch.Tensor) -> Any:
    logits, weights, ids = super(type(self), self).forward(hidden)
    return logits, weights, ids.flip(-1)


def selects_by_sorting(self: Any, hidden: torch.Tensor) -> Any:
    probabilities = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight).softmax(-1)
    values, ids = probabilities.sort(dim=-1, descending=True)
    return probabilities, values[:, : self.top_k], ids[:, : self.top_k]


def returns_no_tuple(self: Any, hidden: torch.Tensor) -> Any:
    return super(type(self), self).forward(hidden)[1]


@pytest.mark.parametrize(
    ("forward", "complaint"),
    [
        (selects_twice, "does not select its experts by one top-k.*got 2 of them"),
        (selects_by_sorting, "does not select its experts by one top-k.*got 0 of them"),
        (changes_ids, "changes the expert ids after its top-k"),
        (copies_ids, "changes the expert ids after its top-k"),
        (returns_no_tuple, "changes the expert ids after its top-k"),
    ],
)
@pytest.mark.parametrize("use", ["record", "replay"])
def test_a_router_that_does_not_return_its_one_selection_is_refused_by_name(
    use: str, forward: Any, complaint: str
) -> None:
    model, tokens = changed(build("qwen3_moe"), 2, forward), random_tokens(1, 6)
    context = record(model) if use == "record" else replaying(model, random_routes(6, "qwen3_moe"), tokens)
    with torch.no_grad(), pytest.raises(UnsupportedRouterError, match=complaint) as refused, context:
        model(tokens)
    assert "model.layers.2.mlp.gate" in str(refused.value)
    assert "ChangedQwen3MoeTopKRouter" in str(refused.value)
    assert left_behind(model) == []


def test_a_router_wrapped_so_that_ids_are_remapped_after_it_is_seen_with_logical_ids() -> None:
    """Expert parallelism remaps in hooks after the router: a record keeps what the router chose."""
    model, tokens = build("mixtral"), random_tokens(1, 12)
    with torch.no_grad(), router_spy(model, "mixtral") as out:
        model(tokens)
    logical = out.calls[0][-1][2]
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, output: (*output[:2], output[2].flip(-1) * 0))
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    assert torch.equal(recording.experts_LNK[0], logical)


def compiled_whole(model: Any) -> Any:
    return torch.compile(model)


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def with_a_compiled_layer(model: Any) -> Any:
    model.model.layers[1].compile()
    return model


def with_a_compiled_layer_sharded(model: Any) -> Any:
    """As `fully_shard` does it: the class of what it shards is replaced by one of another name."""
    layer: Any = torch.compile(model.model.layers[1])
    layer.__class__ = type("FSDPOptimizedModule", (type(layer),), {})
    model.model.layers[1] = layer
    return model


def within_a_wrapper(model: Any) -> Any:
    wrapper: Any = torch.nn.Module()
    wrapper.module = torch.compile(model)
    return wrapper


COMPILED = [
    compiled_whole,
    compiled_in_place,
    with_a_compiled_layer,
    with_a_compiled_layer_sharded,
    within_a_wrapper,
]


@pytest.mark.parametrize("tapped_before", [False, True])
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_is_refused_by_name(compiled: Any, tapped_before: bool) -> None:
    model, tokens = build("mixtral"), random_tokens(1, 4)
    traces = traces_of(model, random_routes(4, "mixtral"), tokens)
    if tapped_before:
        with record(model):
            pass
    refused = compiled(model)
    before = left_behind(model)  # torch.compile's own
    with pytest.raises(UnsupportedRouterError, match=r"torch\.compile'd model"), record(refused):
        pass
    with (
        pytest.raises(UnsupportedRouterError, match=r"torch\.compile'd model"),
        replay(refused, traces, input_ids=tokens),
    ):
        pass
    assert left_behind(model) == before


def test_a_tap_follows_a_model_whose_vocabulary_was_resized() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 4)
    with record(model):
        pass
    model.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    assert recording.traces(tokens)[0].fingerprint == fingerprint_of(model)


def test_a_tap_follows_a_model_whose_routers_were_replaced() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 12)
    with record(model):
        pass
    model.model.layers[1].mlp = build("mixtral", seed=5).model.layers[1].mlp
    with torch.no_grad(), record(model) as recording, experts_spy(model, "mixtral") as spy:
        model(tokens)
    assert torch.equal(recording.experts_LNK, spy.last())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_untapped_model_has_its_own_methods(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 5)
    forwards = [router.forward for router in routers_of(model, name)]
    variables = {module_name: set(vars(module)) for module_name, module in model.named_modules()}
    traces = traces_of(model, random_routes(10, name), tokens)
    for _ in range(2):
        with record(model), replay(model, traces, input_ids=tokens, on_shift="ignore"):
            model(tokens)
            assert left_behind(model) != []
    assert left_behind(model) == []
    assert [router.forward for router in routers_of(model, name)] == forwards
    assert all(isinstance(router.forward, MethodType) for router in routers_of(model, name))
    assert {module_name: set(vars(module)) for module_name, module in model.named_modules()} == variables


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_gets_its_own_checkpoint_function_back(reentrant: bool) -> None:
    model, tokens = build("qwen3_moe").train(), random_tokens(1, 5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layers = model.model.layers
    before = [layer._gradient_checkpointing_func for layer in layers]
    with record(model):
        loss = loss_of(model(tokens, use_cache=False).logits)
        assert all(layer._gradient_checkpointing_func is not own for layer, own in zip(layers, before, strict=True))
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    loss.backward()
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert left_behind(model) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("what", ["model", "router", "checkpoint of a layer"])
def test_a_model_is_not_copied_while_it_is_tapped(what: str, copied: Any) -> None:
    """The copy would keep the taps, and its routers' weights would be those of the original for ever."""
    model, tokens = build("mixtral"), random_tokens(1, 5)
    if what == "checkpoint of a layer":
        model.gradient_checkpointing_enable()

    def part() -> Any:
        layer = model.model.layers[1]
        return {"model": model, "router": layer.mlp.gate}.get(what) or layer._gradient_checkpointing_func

    with record(model), pytest.raises(RouterError, match="cannot be copied or pickled while"):
        copied(part())
    assert copied(part())
    again = copy.deepcopy(model)
    assert left_behind(again) == []
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.5)
        expected = build("mixtral")
        expected.load_state_dict(again.state_dict())
        assert torch.equal(again(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("where", ["body", "experts", "router"])
def test_an_exception_leaves_nothing_behind(where: str) -> None:
    model, tokens = build("deepseek_v3"), random_tokens(1, 5)

    def fail(*_: Any) -> None:
        raise KeyError(where)

    def run() -> None:
        with record(model), replay(model, traces, input_ids=tokens, on_shift="ignore"):
            model(tokens)
            fail()

    if where == "experts":
        experts_of(model, "deepseek_v3")[1].register_forward_pre_hook(fail)
    if where == "router":  # midway in its own forward, while the mode is active
        changed(model, 2, fail)
    traces = traces_of(model, random_routes(5, "deepseek_v3"), tokens)
    with pytest.raises(KeyError, match=where):
        run()
    assert left_behind(model) == []
    values, indices = torch.topk(torch.arange(8.0)[None], 2)
    assert indices.tolist() == [[7, 6]]  # no mode is left active
    assert values.tolist() == [[7.0, 6.0]]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_contexts_of_two_threads_may_end_in_any_order(name: str) -> None:
    """One thread replays while another records; the first to begin is the first to end."""
    model = build(name)
    tokens, others = random_tokens(1, 10, seed=1), random_tokens(1, 7, seed=2)
    routes = random_routes(10, name)
    with torch.no_grad(), record(model) as recording:
        model(others)
    live = recording.experts_LNK.clone()
    traces = traces_of(model, routes, tokens)
    recorder_began, replay_ended = threading.Event(), threading.Event()
    got: dict[str, Any] = {}

    def replayer() -> None:
        with torch.no_grad(), record(model) as recording:
            with replay(model, traces, input_ids=tokens, on_shift="ignore"):
                model(tokens)
                assert recorder_began.wait(30)
                model(tokens)
            got["replayed"] = recording.experts_LNK
        replay_ended.set()

    def recorder() -> None:
        with torch.no_grad(), record(model) as recording:
            recorder_began.set()
            model(others)
            got["before"] = recording.experts_LNK
            assert replay_ended.wait(30)
            model(others)
            got["after"] = recording.experts_LNK

    threads = [threading.Thread(target=replayer), threading.Thread(target=recorder)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert np.array_equal(got["replayed"].permute(1, 0, 2).numpy(), routes)
    assert torch.equal(got["before"], live)
    assert torch.equal(got["after"], live)
    assert left_behind(model) == []
