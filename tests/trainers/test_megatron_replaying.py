"""Replay in a real Megatron-Core model on the CPU: the experts that receive tokens, the weights, and the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

import megatron_models as mm
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from moetrace.errors import (
    InvalidTraceError,
    LayoutMismatchError,
    NotMoeError,
    ReplayError,
    RouterError,
    ShiftedRoutesError,
    TokenMismatchError,
    UnsupportedRouterError,
)
from moetrace.layout import MoeLayout
from moetrace.replayer import AlignedRoutes, alarm, align
from moetrace.trainers import megatron

pytestmark = pytest.mark.filterwarnings("ignore")  # Megatron-Core's own deprecations


@pytest.fixture(autouse=True, scope="module")
def _megatron() -> Iterator[None]:
    with mm.on_cpu():
        yield


def batch(rows: int = 2, columns: int = 12, seed: int = 0) -> tuple[torch.Tensor, AlignedRoutes]:
    """Tokens and routes; the last token of every row is live."""
    tokens = np.random.default_rng(seed).integers(0, mm.VOCAB, (rows, columns))
    traces = [mm.trace_of(row, seed * 10 + number) for number, row in enumerate(tokens)]
    return torch.from_numpy(tokens), align(traces, tokens)


def ids_of(routes: AlignedRoutes, layer: int, rows: int) -> np.ndarray:
    """`[N, K]` as routers see them."""
    return mm.sequence_major(routes.experts_LNK[layer].reshape(rows, -1, mm.TOP_K))


def test_experts_receive_the_recorded_tokens_and_live_ones_go_where_the_router_says() -> None:
    model, (tokens, routes) = mm.model(), batch(2, 12)
    with megatron.attach(model) as replayer, mm.watched(model) as maps, replayer.microbatch(routes) as microbatch:
        mm.forward(model, tokens)
    for layer, seen_NE in enumerate(maps):
        given_NE = mm.one_hot(ids_of(routes, layer, 2))
        assert torch.equal(seen_NE[:-2], given_NE[:-2])  # the last column: one live token of each row
        assert (seen_NE[-2:].sum(1) == mm.TOP_K).all()
    stats = microbatch.stats()
    assert stats is not None
    assert (stats.replayed_tokens, stats.live_tokens, stats.forwards) == (22, 2, 1)


def test_live_tokens_are_routed_as_without_replay() -> None:
    # In the first MoE layer nothing upstream is replayed, so a live token must go where it goes in a plain forward.
    model, (tokens, routes) = mm.model(), batch(3, 10)
    with mm.watched(model) as plain:
        mm.forward(model, tokens)
    with megatron.attach(model) as replayer, mm.watched(model) as seen, replayer.microbatch(routes):
        mm.forward(model, tokens)
    assert torch.equal(seen[0][-3:], plain[0][-3:])
    assert not torch.equal(seen[0][:-3], plain[0][:-3])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ],
    ids=["softmax", "pre-softmax", "sigmoid", "groups", "bias"],
)
def test_output_and_gradients_are_those_of_router_replay_driven_by_hand(settings: dict) -> None:
    tokens = torch.arange(20).reshape(2, 10)
    ids = np.stack([mm.trace_of(np.arange(21), seed).experts_TLK for seed in (1,)])[0]
    routes = AlignedRoutes(
        experts_LNK=np.ascontiguousarray(ids.transpose(1, 0, 2)),
        mode_N=np.full(20, 2, np.uint8),
        sequence_N=np.repeat([0, 1], 10).astype(np.int32),
        position_N=np.tile(np.arange(10), 2).astype(np.int32),
        layout=mm.LAYOUT,
        fingerprint="",
        order="rank",
        shape=(2, 10),
    )
    by_hand = mm.model(**settings)
    for layer, router in enumerate(mm.routers_of(by_hand)):
        router.router_replay.set_target_indices(torch.from_numpy(ids_of(routes, layer, 2).astype(np.int64)))
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    expected = mm.forward(by_hand, tokens)
    expected.square().mean().backward()
    ours = mm.model(**settings)
    with megatron.attach(ours) as replayer, replayer.microbatch(routes):
        found = mm.forward(ours, tokens)
    found.square().mean().backward()
    assert torch.equal(found, expected)
    for a, b in zip(mm.router_gradients(ours), mm.router_gradients(by_hand), strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    filled = mm.model(**settings)
    megatron.fill(filled, routes, num_tokens=20)
    assert torch.equal(mm.forward(filled, tokens), expected)
    megatron.finish(filled)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_any_padding_on_either_side(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, columns), min_size=rows, max_size=rows))
    left = data.draw(st.booleans())
    mask = np.array([[(columns - s if left else s + 1) <= n for s in range(columns)] for n in lengths])
    tokens = np.random.default_rng(seed).integers(0, mm.VOCAB, (rows, columns))
    traces = [mm.trace_of(tokens[b][mask[b]], seed + b) for b in range(rows)]
    routes = align(traces, tokens, attention_mask=mask.astype(int))
    expected = np.full((rows, columns, len(mm.LAYERS), mm.TOP_K), -1)
    for b, trace in enumerate(traces):
        expected[b][np.flatnonzero(mask[b])[:-1]] = trace.experts_TLK
    model = mm.model()
    with (
        megatron.attach(model) as replayer,
        mm.watched(model) as maps,
        torch.no_grad(),
        replayer.microbatch(routes, on_shift="ignore"),
    ):
        mm.forward(model, torch.from_numpy(tokens))
    rows_N = mm.sequence_major(expected)
    replayed_N = rows_N[:, 0, 0] >= 0
    for layer, seen_NE in enumerate(maps):
        assert torch.equal(seen_NE[replayed_N], mm.one_hot(rows_N[replayed_N, layer]))
        assert (seen_NE.sum(1) == mm.TOP_K).all()


@pytest.mark.parametrize("recompute", ["full", "block", "moe"])
@pytest.mark.parametrize("backwards", [(0, 1, 2), (2, 0, 1)], ids=["first-in-first-out", "any-order"])
def test_recomputations_use_the_routes_of_their_own_forward(recompute: str, backwards: tuple[int, ...]) -> None:
    batches = [batch(2, 9, seed) for seed in range(3)]
    expected = []
    plain = mm.model()
    with megatron.attach(plain) as replayer:
        for tokens, routes in batches:
            with replayer.microbatch(routes, on_shift="ignore"):
                mm.forward(plain, tokens).square().mean().backward()
            expected.append(mm.router_gradients(plain))
    model = mm.model(recompute)
    with megatron.attach(model) as replayer:
        losses = []
        for tokens, routes in batches:
            with torch.no_grad(), replayer.microbatch(batches[0][1], on_shift="ignore"):
                mm.forward(model, batches[0][0])  # forward-only: leaves nothing behind
            with replayer.microbatch(routes, on_shift="ignore"):
                losses.append(mm.forward(model, tokens).square().mean())
        mm.forward(model, tokens)  # live, and never recomputed
        for number in backwards:
            losses[number].backward()
            for found, right in zip(mm.router_gradients(model), expected[number], strict=True):
                torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-8)
    assert not any(torch.equal(a, b) for a, b in zip(*expected[:2], strict=True)), "the order must show"


@pytest.mark.parametrize("recompute", ["full", "moe"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_backward_pass_of_several_forwards(recompute: str, order: tuple[int, ...]) -> None:
    # Pairs of answers, or losses that are summed: each output says for itself which forward it is of.
    batches, found = [batch(2, 9, seed) for seed in range(3)], []
    for name in ("none", recompute):
        model = mm.model(name)
        with megatron.attach(model) as replayer:
            losses = []
            for number, (tokens, routes) in enumerate(batches):
                with replayer.microbatch(routes, on_shift="ignore"):
                    losses.append((number + 1) * mm.forward(model, tokens).square().mean())
            torch.stack([losses[number] for number in order]).sum().backward()
        found.append(mm.router_gradients(model))
    for right, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-8)


def test_a_live_forward_is_recomputed_live() -> None:
    tokens, routes = batch()
    plain, model = mm.model(), mm.model("full")
    mm.forward(plain, tokens).square().mean().backward()
    with megatron.attach(model) as replayer:
        live = mm.forward(model, tokens).square().mean()
        with replayer.microbatch(routes):
            mm.forward(model, tokens).square().mean().backward()
        model.zero_grad()
        live.backward()
    for found, right in zip(mm.router_gradients(model), mm.router_gradients(plain), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-8)


def test_a_wrapped_model_in_bfloat16() -> None:
    # The module that is called is a wrapper, and its output is not the chunk's own tensor.
    inner = mm.model("full", bf16=True, params_dtype=torch.bfloat16)
    model, (tokens, routes) = Float16Module(inner.config, inner), batch()
    rows, columns = tokens.shape
    with megatron.attach(model) as replayer, mm.watched(model) as maps:
        with replayer.microbatch(routes, on_shift="ignore"):
            later = torch.ones(1, 1, columns, columns).triu(1).bool()
            output = model(tokens, torch.arange(columns).expand(rows, columns), later)
        (output / 0.7).square().mean().backward()
    assert len(maps) == 2 * len(mm.LAYERS)
    for layer in range(len(mm.LAYERS)):
        assert torch.equal(maps[layer][:-2], mm.one_hot(ids_of(routes, layer, 2))[:-2])
    again = {map_NE.numpy().tobytes() for map_NE in maps[len(mm.LAYERS) :]}
    assert again == {map_NE.numpy().tobytes() for map_NE in maps[: len(mm.LAYERS)]}


def test_draft_heads_stay_live_and_keep_their_own_router() -> None:
    model, (tokens, routes) = mm.model("moe", mtp_num_layers=1), batch()
    own = [router.router_replay for router in mm.routers_of(model)]
    with megatron.attach(model) as replayer, mm.watched(model) as maps:
        assert replayer.layers == mm.LAYERS
        assert mm.routers_of(model)[-1].router_replay is own[-1]
        with replayer.microbatch(routes):
            losses = mm.forward(model, tokens)
        losses.mean().backward()
    for layer in range(len(mm.LAYERS)):
        assert torch.equal(maps[layer][:-2], mm.one_hot(ids_of(routes, layer, 2))[:-2])
    assert len(maps) == 2 * (len(mm.LAYERS) + 1)  # forward and recomputation
    assert all(router.weight.grad is not None and router.weight.grad.any() for router in mm.routers_of(model))
    assert [router.router_replay for router in mm.routers_of(model)] == own


def test_recorded_routes_replay_the_same_forward_and_are_those_of_each_sequence_alone() -> None:
    model, tokens = mm.model(), torch.randint(0, mm.VOCAB, (2, 10), generator=torch.Generator().manual_seed(3))
    plain = mm.forward(model, tokens)
    with megatron.attach(model) as replayer:
        with torch.no_grad(), replayer.record() as recording:
            recorded = mm.forward(model, tokens)
        with replayer.microbatch(recording.routes) as microbatch:
            replayed = mm.forward(model, tokens)
        traces = recording.traces(tokens)
        stats = microbatch.stats()
        assert stats is not None
        assert stats.overlap == 1.0
        torch.testing.assert_close(recorded, plain)
        torch.testing.assert_close(replayed, plain)
        for row, trace in zip(tokens, traces, strict=True):
            with mm.watched(model) as maps:
                mm.forward(model, row[None])
            for layer, seen_NE in enumerate(maps):
                assert torch.equal(seen_NE, mm.one_hot(trace.experts_TLK[:, layer]))
        aligned = align(traces, tokens)
        with replayer.microbatch(aligned):
            torch.testing.assert_close(mm.forward(model, tokens), plain)


def test_recorded_ids_are_best_first_also_without_gradients() -> None:
    model, tokens = mm.model(), torch.arange(10)[None]
    with megatron.attach(model) as replayer, torch.no_grad(), replayer.record() as recording:
        mm.forward(model, tokens)
    logits: list[torch.Tensor] = []
    router = mm.routers_of(model)[0]
    hook = router.register_forward_hook(lambda module, args, _output: logits.append(module.gating(args[0])))
    mm.forward(model, tokens)
    hook.remove()
    assert np.array_equal(recording.routes.experts_LNK[0], logits[0].reshape(10, -1).argsort(1, descending=True)[:, :3])


def one_token_late() -> tuple[Any, torch.Tensor, AlignedRoutes, AlignedRoutes]:
    """A model, tokens, its own routes, and the same in the rows of the tokens after."""
    model, tokens = mm.model(), torch.randint(0, mm.VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    with megatron.attach(model) as replayer, torch.no_grad(), replayer.record() as recording:
        mm.forward(model, tokens)
    routes = align(recording.traces(tokens), tokens)
    shifted = routes.experts_LNK.reshape(len(mm.LAYERS), 3, 20, mm.TOP_K).copy()
    shifted[:, :, 1:-1] = shifted[:, :, :-2].copy()
    bent = AlignedRoutes(**(vars(routes) | {"experts_LNK": shifted.reshape(routes.experts_LNK.shape)}))
    return model, tokens, routes, bent


def test_shifted_routes_are_found_out() -> None:
    model, tokens, routes, bent = one_token_late()
    with megatron.attach(model) as replayer:
        with replayer.microbatch(routes):
            mm.forward(model, tokens)
        with pytest.raises(ShiftedRoutesError, match="shifted by one token"), replayer.microbatch(bent):
            mm.forward(model, tokens)


def test_where_a_wait_would_cost_each_microbatch_in_flight_is_judged_by_its_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alarm, "defers", lambda device: True)
    model, tokens, routes, bent = one_token_late()
    with megatron.attach(model) as replayer:
        losses = []
        for given_routes in (routes, bent, routes):
            with replayer.microbatch(given_routes):
                losses.append(mm.forward(model, tokens).sum())
        losses[0].backward()
        with pytest.raises(ShiftedRoutesError, match="shifted by one token"):
            losses[1].backward()
        losses[2].backward()
        with replayer.microbatch(bent) as microbatch:
            mm.forward(model, tokens)
        with pytest.raises(ShiftedRoutesError):
            microbatch.stats()
        with pytest.raises(ShiftedRoutesError), torch.no_grad(), replayer.microbatch(bent):
            mm.forward(model, tokens)


def test_a_whole_models_routes_may_be_given_to_a_rank_with_some_of_its_layers() -> None:
    wide = MoeLayout((1, 2, 3, 4, 5, 6), mm.EXPERTS, mm.TOP_K)
    tokens = np.arange(10)
    routes = align(mm.trace_of(tokens, 1, wide), tokens[None])
    model = mm.model()
    with megatron.attach(model) as replayer, mm.watched(model) as maps, replayer.microbatch(routes):
        mm.forward(model, torch.from_numpy(tokens)[None])
    for layer, seen_NE in enumerate(maps):
        assert torch.equal(seen_NE[:-1], mm.one_hot(routes.experts_LNK[layer])[:-1])


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 1, 2, 3), (2, 3, 4)], ids=["shifted", "dense", "lacking"])
def test_layers_are_absolute_numbers(layers: tuple[int, ...]) -> None:
    tokens = np.arange(6)
    routes = align(mm.trace_of(tokens, 0, MoeLayout(layers, mm.EXPERTS, mm.TOP_K)), tokens[None])
    replayer = megatron.attach(mm.model())
    with pytest.raises(LayoutMismatchError, match="decoder layers"), replayer.microbatch(routes):
        pass


@pytest.mark.parametrize(("experts", "top_k"), [(17, 3), (16, 2), (16, 4)])
def test_another_models_routes_are_refused(experts: int, top_k: int) -> None:
    tokens = np.arange(6)
    routes = align(mm.trace_of(tokens, 0, MoeLayout(mm.LAYERS, experts, top_k)), tokens[None])
    replayer = megatron.attach(mm.model())
    with pytest.raises(LayoutMismatchError, match="16 experts, 3 per token"), replayer.microbatch(routes):
        pass


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda ids: ids.astype(np.float32), "not expert ids"),
        (lambda ids: ids[:, :-1], "not expert ids"),
        (lambda ids: ids[..., :2], "not expert ids"),
        (lambda ids: np.where(ids == ids[1, 3, 0], 16, ids), "does not exist"),
        (lambda ids: ids.astype(np.int16) - 1, "does not exist"),
        (lambda ids: np.concatenate([ids[..., :2], ids[..., :1]], -1), "twice in layer 1"),
    ],
    ids=["floats", "rows", "top-k", "too-high", "negative", "twice"],
)
def test_rows_that_are_none_are_refused_before_the_forward(bend: object, message: str) -> None:
    _, routes = batch()
    assert callable(bend)
    bent = AlignedRoutes(**(vars(routes) | {"experts_LNK": bend(routes.experts_LNK)}))
    model = mm.model()
    with pytest.raises(InvalidTraceError, match=message):
        megatron.fill(model, bent, num_tokens=24)
    replayer = megatron.attach(model)
    with pytest.raises(InvalidTraceError, match=message), replayer.microbatch(bent):
        pass


def decoder_alone(model: Any) -> torch.Tensor:
    hidden_SBH, later = torch.randn(12, 2, 32, requires_grad=True), torch.ones(1, 1, 12, 12).triu(1).bool()
    return model.decoder(hidden_SBH, later, rotary_pos_emb=model.rotary_pos_emb(12))


def test_chunks_of_one_rank_each_have_a_context() -> None:
    tokens, _ = batch()
    chunks = [mm.model(), mm.model()]
    for router in mm.routers_of(chunks[1]):
        router.layer_number += 3
    wide = MoeLayout((1, 2, 3, 4, 5, 6), mm.EXPERTS, mm.TOP_K)
    rows = tokens.numpy()
    routes = align([mm.trace_of(row, number, wide) for number, row in enumerate(rows)], rows)
    with megatron.attach(chunks) as replayer:
        assert replayer.layers == wide.layers
        for number, chunk in enumerate(chunks):
            with mm.watched(chunk) as maps, replayer.microbatch(routes) as microbatch:
                mm.forward(chunk, tokens)
            for layer, seen_NE in enumerate(maps):
                assert torch.equal(seen_NE[:-2], mm.one_hot(ids_of(routes, 3 * number + layer, 2))[:-2])
            stats = microbatch.stats()
            assert stats is not None
            assert len(stats.overlap_per_layer) == 3
            assert stats.supplied == 1
        with replayer.microbatch(routes):
            mm.forward(chunks[0], tokens)
            with pytest.raises(ReplayError, match="two chunks"):
                mm.forward(chunks[1], tokens)
        with replayer.record() as recording:
            mm.forward(chunks[0], tokens)
        with pytest.raises(RouterError, match=r"no row of layers \[4, 5, 6\]"):
            _ = recording.routes
        with replayer.record(recording):
            mm.forward(chunks[1], tokens)
        with replayer.microbatch(recording.routes) as microbatch:
            mm.forward(chunks[1], tokens)
        stats = microbatch.stats()
        assert stats is not None
        assert stats.overlap == 1


def test_misuse_is_refused() -> None:
    model, (tokens, routes) = mm.model("full"), batch()
    with megatron.attach(model) as replayer:
        with pytest.raises(RouterError, match="attached twice"):
            megatron.attach(model)
        with pytest.raises(UnsupportedRouterError, match="no RouterReplay"):
            megatron.fill(model, routes, num_tokens=24)
        with pytest.raises(ReplayError, match="nothing was replayed"), replayer.microbatch(routes):
            pass
        with replayer.microbatch(routes):
            with pytest.raises(ReplayError, match="cannot begin"), replayer.microbatch(routes):
                pass
            mm.forward(model, tokens)
        (own, *_) = RouterReplay.global_router_replay_instances[-len(mm.LAYERS) :]
        own.set_router_replay_action(RouterReplayAction.RECORD)
        with pytest.raises(RouterError, match="somebody else"):
            mm.forward(model, tokens)  # it would record nothing
        own.clear_router_replay_action()
        with replayer.record():
            mm.forward(model, tokens)
            with pytest.raises(RouterError, match="ran twice"):
                mm.forward(model, tokens)
        with replayer.microbatch(routes):
            with pytest.raises(ReplayError, match="outside of its chunk"):
                decoder_alone(model)
            late = mm.forward(model, tokens)
            beside = decoder_alone(model)
            mm.forward(model, tokens).sum().backward()
        with pytest.raises(ReplayError, match="cannot be told"):
            beside.sum().backward()
    with pytest.raises(ReplayError, match="detached before"):
        late.sum().backward()
    with pytest.raises(ReplayError, match="detached"), replayer.microbatch(routes):
        pass
    with pytest.raises(NotMoeError, match="dense"):
        megatron.attach(mm.model(num_moe_experts=None, moe_layer_freq=1, moe_ffn_hidden_size=None))
    mm.routers_of(model)[0].router_replay.set_router_replay_action(RouterReplayAction.RECORD)
    with pytest.raises(RouterError, match="somebody else"):
        megatron.attach(model)


def test_detaching_leaves_the_model_as_it_was() -> None:
    model, (tokens, routes) = mm.model(), batch()
    before = mm.forward(model, tokens)
    own = [router.router_replay for router in mm.routers_of(model)]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    with megatron.attach(model) as replayer, replayer.microbatch(routes):
        assert not torch.equal(mm.forward(model, tokens), before)
    assert [router.router_replay for router in mm.routers_of(model)] == own
    assert all(isinstance(replay, RouterReplay) for replay in own)
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert torch.equal(mm.forward(model, tokens), before)


@pytest.mark.parametrize("defer", [False, True])
def test_a_microbatch_of_other_tokens_is_refused(defer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "defers", lambda device: defer)
    model, (tokens, routes) = mm.model(), batch(2, 12)
    other = tokens.clone()
    other[1, 7] = (other[1, 7] + 1) % mm.VOCAB

    def run(ids: torch.Tensor) -> Any:
        with replayer.microbatch(routes, on_shift="ignore") as microbatch:
            mm.forward(model, ids).sum().backward() if not defer else losses.append(mm.forward(model, ids).sum())
        return microbatch

    losses: list[torch.Tensor] = []
    with megatron.attach(model) as replayer:
        assert run(tokens).stats().forwards == 1
        if not defer:
            with pytest.raises(TokenMismatchError, match="position 7 of sequence 1"):
                run(other)
        else:
            microbatch = run(other)
            with pytest.raises(TokenMismatchError, match="position 7 of sequence 1"):
                losses[1].backward()
            with pytest.raises(TokenMismatchError, match="position 7 of sequence 1"):
                microbatch.stats()


def test_a_forward_that_fails_and_is_tried_again_counts_once() -> None:
    model, (tokens, routes) = mm.model(), batch(2, 12)
    failures = [MemoryError]

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    with megatron.attach(model) as replayer:
        with replayer.microbatch(routes, on_shift="ignore") as plain:
            mm.forward(model, tokens)
        handle = model.decoder.layers[-1].register_forward_pre_hook(fail)
        with replayer.microbatch(routes, on_shift="ignore") as microbatch:
            with pytest.raises(MemoryError):
                mm.forward(model, tokens)
            mm.forward(model, tokens)
        handle.remove()
    assert microbatch.counts() == plain.counts()
