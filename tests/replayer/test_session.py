"""Replay: the recorded ids and nothing else reach the experts, or the replay is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    EXPERTS_IMPLEMENTATIONS,
    FAMILIES,
    NAMES,
    ONE_OF_EACH,
    VOCAB,
    assert_same_gradients,
    build,
    experts_spy,
    left_behind,
    random_routes,
    random_tokens,
    router_spy,
    routers_of,
    step,
    trace_of,
    traces_of,
)

from moetrace import record, replay
from moetrace.errors import LayoutMismatchError, MissingRowError, MoetraceError, ReplayError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.replayer import align
from moetrace.replayer.ranks import context_parallel
from moetrace.routers import tap_model
from moetrace.trace import RoutingTrace


def received(model: Any, name: str, run: Callable[[], Any]) -> np.ndarray:
    """`[N, L, K]` ids the experts received in the last forward of `run`."""
    with torch.no_grad(), experts_spy(model, name) as spy:
        run()
    return spy.last().permute(1, 0, 2).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_replaying_its_own_record_changes_no_logit_and_no_gradient(name: str) -> None:
    model, tokens = build(name).train(), random_tokens(2, 24)
    logits, gradients = step(model, tokens)
    with record(model) as recording:
        model(tokens, use_cache=False)
    with replay(model, recording.traces(tokens), input_ids=tokens) as session:
        replayed_logits, replayed_gradients = step(model, tokens)
    assert torch.equal(replayed_logits, logits)
    assert_same_gradients(replayed_gradients, gradients)
    assert all(gradient is not None for gradient in gradients.values())
    assert session.stats().overlap == 1.0


@pytest.mark.parametrize("experts", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_replaying_its_own_record_is_exact_in_bfloat16_too(name: str, experts: str) -> None:
    model, tokens = build(name, dtype=torch.bfloat16, experts=experts).train(), random_tokens(2, 24)
    logits, gradients = step(model, tokens)
    with record(model) as recording:
        model(tokens, use_cache=False)
    with replay(model, recording.traces(tokens), input_ids=tokens):
        replayed_logits, replayed_gradients = step(model, tokens)
    assert torch.equal(replayed_logits, logits)
    assert_same_gradients(replayed_gradients, gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts", EXPERTS_IMPLEMENTATIONS)
def test_the_experts_receive_exactly_the_replayed_ids(name: str, experts: str) -> None:
    model, tokens = build(name, experts=experts), random_tokens(2, 12)
    routes = random_routes(24, name)
    with replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore"):
        assert np.array_equal(received(model, name, lambda: model(tokens)), routes)
    assert not np.array_equal(received(model, name, lambda: model(tokens)), routes)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_changing_one_route_changes_the_logits_of_that_token_and_none_before(name: str) -> None:
    model, tokens = build(name), random_tokens(1, 12)
    with torch.no_grad(), record(model) as recording:
        plain = model(tokens).logits
    (trace,) = recording.traces(tokens)
    routes = trace.experts_TLK.astype(np.int64)
    routes[7, 0] = [expert for expert in range(trace.layout.num_experts) if expert not in routes[7, 0]][
        : trace.layout.top_k
    ]
    with torch.no_grad(), replay(model, traces_of(model, routes, tokens), input_ids=tokens):
        logits = model(tokens).logits
    torch.testing.assert_close(logits[:, :7], plain[:, :7], rtol=1e-4, atol=1e-4)  # experts see other batch sizes
    assert (logits[:, 7] - plain[:, 7]).abs().max() > 0.1


def test_three_hundred_experts_replay_beyond_one_byte() -> None:
    model, tokens = build("mixtral", num_local_experts=300), random_tokens(1, 20)
    draws = np.random.default_rng(0).random((20, 3, 300)).argsort(-1)[..., :2]
    draws[0, 0], draws[1, 0] = (299, 255), (256, 0)
    traces = [trace_of(model, draws, tokens[0])]
    assert traces[0].experts_TLK.dtype == np.uint16
    with replay(model, traces, input_ids=tokens, on_shift="ignore"):
        assert np.array_equal(received(model, "mixtral", lambda: model(tokens)), draws)


def test_routes_of_each_sequence_go_to_its_own_place_in_padded_and_packed_batches() -> None:
    model, lengths, width = build("qwen3_moe"), (12, 5, 8), 12
    sequences = [random_tokens(length, seed=length) for length in lengths]
    routes = [random_routes(length, "qwen3_moe", seed=length) for length in lengths]
    traces = [trace_of(model, ids, tokens) for ids, tokens in zip(routes, sequences, strict=True)]
    for side in ("left", "right"):
        tokens, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            where = slice(width - len(sequence), None) if side == "left" else slice(len(sequence))
            tokens[row, where], mask[row, where] = sequence, 1
        with replay(model, traces, input_ids=tokens, attention_mask=mask, on_shift="ignore"):
            ids = received(model, "qwen3_moe", lambda: model(tokens, attention_mask=mask))  # noqa: B023
        for row, expected in enumerate(routes):
            assert np.array_equal(ids.reshape(3, width, 2, 2)[row][mask[row].bool().numpy()], expected)
    packed, positions = torch.cat(sequences)[None], torch.cat([torch.arange(length) for length in lengths])[None]
    boundaries: list[dict[str, Any]] = [{"position_ids": positions}, {"cu_seqlens": np.cumsum((0, *lengths))}]
    for boundary in boundaries:
        with replay(model, traces, input_ids=packed, on_shift="ignore", **boundary):
            ids = received(model, "qwen3_moe", lambda: model(packed, position_ids=positions, use_cache=False))
        assert np.array_equal(ids, np.concatenate(routes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("permission", ["live", "mask"])
def test_a_token_without_a_row_goes_live_and_the_others_replay(name: str, permission: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    routes = random_routes(20, name).reshape(2, 10, -1, random_routes(1, name).shape[-1])
    valid = np.ones((2, 10), bool)
    valid[0, [0, 3, 4]] = valid[1, [9]] = valid[1, [2]] = False
    traces = [trace_of(model, routes[row], tokens[row], valid_T=valid[row]) for row in (0, 1)]
    missing: Any = "live" if permission == "live" else ~valid
    with replay(model, traces, input_ids=tokens, missing=missing, on_shift="ignore") as session:
        ids = received(model, name, lambda: model(tokens)).reshape(routes.shape)
    assert np.array_equal(ids[valid], routes[valid])
    live = received(model, name, lambda: model(tokens)).reshape(routes.shape)
    first = (0, 0, 0)  # nothing before token 0 at the first layer was changed: its live choice is the plain one
    assert np.array_equal(ids[first], live[first])
    stats = session.stats()
    assert (stats.replayed_tokens, stats.live_tokens, stats.padding_tokens) == (15, 5, 0)


@pytest.mark.parametrize("name", NAMES)
def test_live_tokens_use_the_routers_own_choice_in_every_layer(name: str) -> None:
    """The live choice under replay, found without moetrace: top-k of the score the family selects by."""
    model, tokens = build(name), random_tokens(1, 16)
    routes = random_routes(16, name)
    valid = np.arange(16) % 2 == 0
    traces = [trace_of(model, routes, tokens[0], valid_T=valid)]
    with torch.no_grad(), router_spy(model, name) as out, experts_spy(model, name) as spy:
        with replay(model, traces, input_ids=tokens, missing="live", on_shift="ignore"):
            hidden: list[torch.Tensor] = []
            for router in routers_of(model, name):
                router.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
            model(tokens)
        seen = spy.last()
        live = torch.stack([router(x)[2] for router, x in zip(routers_of(model, name), list(hidden), strict=True)])
    assert torch.equal(seen[:, ~valid], live[:, ~valid])
    assert np.array_equal(seen.permute(1, 0, 2).numpy()[valid], routes[valid])
    assert len(out.calls[0]) == 2


def test_padding_is_routed_live_and_counted_nowhere() -> None:
    model, tokens = build("mixtral"), random_tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad(), record(model) as recording:
        model(tokens, attention_mask=mask)
    plain = recording.experts_LNK.permute(1, 0, 2).numpy()
    traces = recording.traces(tokens, attention_mask=mask)
    with replay(model, traces, input_ids=tokens, attention_mask=mask) as session:
        ids = received(model, "mixtral", lambda: model(tokens, attention_mask=mask))
    assert np.array_equal(ids, plain)  # padding went live too, and live ids are not the zeros that align leaves
    assert plain[16:].any()
    stats = session.stats()
    assert (stats.replayed_tokens, stats.live_tokens, stats.padding_tokens) == (16, 0, 4)
    assert stats.overlap == 1.0


def test_a_trace_of_prompt_and_output_leaves_the_last_token_live() -> None:
    """P + O - 1 rows: the last sampled token was never an input, so it needs no permission."""
    model, tokens = build("mixtral"), random_tokens(1, 10)
    routes = random_routes(10, "mixtral")
    trace = trace_of(model, routes[:9], tokens[0])
    with replay(model, [trace], input_ids=tokens, on_shift="ignore") as session:
        ids = received(model, "mixtral", lambda: model(tokens))
    assert np.array_equal(ids[:9], routes[:9])
    assert session.stats().live_tokens == 1
    with pytest.raises(MissingRowError), replay(model, [trace_of(model, routes[:8], tokens[0])], input_ids=tokens):
        pass


def own_traces(model: Any, tokens: torch.Tensor) -> list[RoutingTrace]:
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    return recording.traces(tokens)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_forward_of_another_batch_is_refused(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    with torch.no_grad(), replay(model, own_traces(model, tokens), input_ids=tokens):
        for other in (tokens[:1], tokens[:, :9], torch.cat([tokens, tokens])):
            with pytest.raises(ReplayError, match=f"expected 20 tokens.*got {other.numel()}"):
                model(other)
        model(tokens)
    assert left_behind(model) == []


def test_generation_inside_a_replay_is_refused() -> None:
    model, tokens = build("qwen3_moe"), random_tokens(1, 10)
    with replay(model, own_traces(model, tokens), input_ids=tokens), pytest.raises(ReplayError, match="no generation"):
        model.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(tokens))


def test_routes_of_other_tokens_are_refused() -> None:
    model, tokens = build("mixtral"), random_tokens(2, 10)
    traces = own_traces(model, tokens)
    changed = tokens.clone()
    changed[1, 4] = (changed[1, 4] + 1) % VOCAB
    with (
        pytest.raises(TokenMismatchError, match=r"sequence 1 .* first difference at position 4"),
        replay(model, traces, input_ids=changed),
    ):
        pass
    with pytest.raises(TokenMismatchError), replay(model, traces[::-1], input_ids=tokens):
        pass
    assert left_behind(model) == []


@pytest.mark.parametrize(
    "layout",
    [
        MoeLayout((0, 1), 8, 2),  # dense-first layers, shifted by one
        MoeLayout((1,), 8, 2),
        MoeLayout((1, 2, 3), 8, 2),
        MoeLayout((1, 2), 9, 2),
        MoeLayout((1, 2), 8, 3),
    ],
)
def test_routes_of_another_layout_are_refused(layout: MoeLayout) -> None:
    model, tokens = build("qwen3_moe"), random_tokens(1, 10)
    ids = np.random.default_rng(0).random((10, layout.num_layers, layout.num_experts)).argsort(-1)
    trace = RoutingTrace.build(ids[..., : layout.top_k], layout, tokens[0].numpy())
    with pytest.raises(LayoutMismatchError), replay(model, [trace], input_ids=tokens):
        pass
    assert left_behind(model) == []


def test_routes_of_another_model_of_the_same_layout_are_refused_by_fingerprint() -> None:
    model, other, tokens = build("qwen3_moe"), build("qwen3_moe", vocab_size=65), random_tokens(1, 10)
    traces = own_traces(other, tokens)
    with pytest.raises(LayoutMismatchError, match="fingerprint"), replay(model, traces, input_ids=tokens):
        pass
    with replay(model, [replace(traces[0], fingerprint="")], input_ids=tokens) as session:  # unknown is not other
        model(tokens)
    assert session.stats().forwards == 1


def test_retrained_weights_of_the_same_model_are_replayed() -> None:
    rollout, trainer, tokens = build("mixtral", dtype=torch.bfloat16), build("mixtral", seed=3), random_tokens(1, 10)
    traces = own_traces(rollout, tokens)
    with replay(trainer, traces, input_ids=tokens, on_shift="ignore"):
        assert np.array_equal(received(trainer, "mixtral", lambda: trainer(tokens)), traces[0].experts_TLK)


def test_arguments_that_mean_nothing_are_refused() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 10)
    traces = own_traces(model, tokens)
    wrong: list[dict[str, Any]] = [
        {"input_ids": None},
        {"input_ids": tokens, "on_shift": "explode"},
        {"input_ids": tokens, "missing": "ignore"},
        {"input_ids": tokens, "missing": np.zeros((1, 9), bool)},
        {"input_ids": torch.cat([tokens, tokens])},
    ]
    for arguments in wrong:
        with pytest.raises(ReplayError), replay(model, traces, **arguments):
            pass
    assert left_behind(model) == []


def test_aligned_routes_replay_as_the_traces_they_came_from() -> None:
    model, tokens = build("deepseek_v3"), random_tokens(2, 10)
    routes = random_routes(20, "deepseek_v3")
    aligned = align(traces_of(model, routes, tokens), tokens)
    with replay(model, aligned, on_shift="ignore"):
        assert np.array_equal(received(model, "deepseek_v3", lambda: model(tokens)), routes)
    other = build("qwen3_moe", mlp_only_layers=[2])
    with pytest.raises(LayoutMismatchError), replay(other, aligned):
        pass


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_models_replayed_at_once_do_not_mix(name: str) -> None:
    policy, reference, tokens = build(name), build(name, seed=1), random_tokens(1, 10)
    routes = random_routes(10, name, seed=1), random_routes(10, name, seed=2)
    with (
        replay(policy, traces_of(policy, routes[0], tokens), input_ids=tokens, on_shift="ignore"),
        replay(reference, traces_of(reference, routes[1], tokens), input_ids=tokens, on_shift="ignore"),
    ):
        assert np.array_equal(received(policy, name, lambda: policy(tokens)), routes[0])
        assert np.array_equal(received(reference, name, lambda: reference(tokens)), routes[1])


def test_a_model_that_is_not_replayed_stays_live_beside_one_that_is() -> None:
    policy, reference, tokens = build("mixtral"), build("mixtral", seed=1), random_tokens(1, 10)
    live = received(reference, "mixtral", lambda: reference(tokens))
    routes = random_routes(10, "mixtral")
    with replay(policy, traces_of(policy, routes, tokens), input_ids=tokens, on_shift="ignore"):
        policy(tokens)
        assert np.array_equal(received(reference, "mixtral", lambda: reference(tokens)), live)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_threads_replaying_one_model_do_not_mix(name: str) -> None:
    model, barrier = build(name), threading.Barrier(2, timeout=30)
    tokens = [random_tokens(1, 10, seed=seed) for seed in (1, 2)]
    routes = [random_routes(10, name, seed=seed) for seed in (1, 2)]
    traces = [traces_of(model, routes[number], tokens[number]) for number in (0, 1)]
    used: dict[int, np.ndarray] = {}

    def in_step(*_: Any) -> None:
        barrier.wait()

    def work(number: int) -> None:
        with torch.no_grad(), record(model) as recording:
            with replay(model, traces[number], input_ids=tokens[number], on_shift="ignore"):
                model(tokens[number])
            used[number] = recording.experts_LNK.permute(1, 0, 2).numpy()

    handles = [layer.register_forward_pre_hook(in_step) for layer in model.model.layers]
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for handle in handles:
        handle.remove()
    assert np.array_equal(used[0], routes[0])
    assert np.array_equal(used[1], routes[1])
    assert left_behind(model) == []


def test_the_inner_of_two_nested_replays_decides() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 10)
    outer, inner = random_routes(10, "mixtral", seed=1), random_routes(10, "mixtral", seed=2)
    with replay(model, traces_of(model, outer, tokens), input_ids=tokens, on_shift="ignore"):
        with replay(model, traces_of(model, inner, tokens), input_ids=tokens, on_shift="ignore"):
            assert np.array_equal(received(model, "mixtral", lambda: model(tokens)), inner)
        assert np.array_equal(received(model, "mixtral", lambda: model(tokens)), outer)


def test_mixed_precision_replays_exactly() -> None:
    model, tokens = build("qwen3_moe"), random_tokens(1, 10)
    routes = random_routes(10, "qwen3_moe")
    with (
        replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert np.array_equal(received(model, "qwen3_moe", lambda: model(tokens)), routes)


def test_a_replay_in_which_no_forward_of_the_model_ran_is_refused_not_silent() -> None:
    """The silent no-op of field notes 3: the forward went through another copy, or ran on another thread."""
    model, other, tokens = build("mixtral"), build("mixtral"), random_tokens(1, 10)
    with pytest.raises(MoetraceError), replay(model, own_traces(model, tokens), input_ids=tokens):
        other(tokens)


def test_a_replay_in_which_some_routers_did_not_run_is_refused_and_they_are_named() -> None:
    """A fused path that computes a layer without its router leaves that layer live."""
    model, tokens = build("qwen3_moe"), random_tokens(1, 10)
    traces, sites = own_traces(model, tokens), tap_model(model).sites
    block = model.model.layers[FAMILIES["qwen3_moe"].layers[-1]].mlp
    block.forward = lambda hidden: hidden
    with (
        pytest.raises(ReplayError, match=rf"1 of {len(sites)} routers did not run .* nothing from {sites[-1].name}\."),
        replay(model, traces, input_ids=tokens),
    ):
        model(tokens)
    del block.forward
    with replay(model, traces, input_ids=tokens) as session:
        model(tokens)
        model(tokens)
    assert (session.forwards, session.lacking) == (2, [])


def test_a_forward_that_failed_and_was_not_tried_again_is_no_replay() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 10)
    handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    traces = own_traces(build("mixtral"), tokens)

    def caught() -> None:
        with replay(model, traces, input_ids=tokens), pytest.raises(ZeroDivisionError):
            model(tokens)

    with pytest.raises(ReplayError, match="routers did not run in the last forward"):
        caught()
    handle.remove()
    assert left_behind(model) == []


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_router_that_sees_a_part_of_the_tokens_replays_its_slice(name: str, kind: Any) -> None:
    """Each rank's routers get some of the hidden states of the batch: run the blocks on them alone."""
    model, tokens = build(name), random_tokens(2, 12)
    routes = random_routes(24, name)
    whole = align(traces_of(model, routes, tokens), tokens)
    blocks = [model.model.layers[layer].mlp for layer in FAMILIES[name].layers]
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    seen = np.zeros_like(routes)
    for rank in range(3):
        mine = context_parallel(whole, rank, 3, kind)
        places = mine.sequence_N * 12 + mine.position_N
        with torch.no_grad(), experts_spy(model, name) as spy, replay(model, mine, on_shift="ignore"):
            for block in blocks:
                block(hidden.reshape(24, 32)[torch.from_numpy(places).long()].view(2, 4, 32))
        seen[places] = spy.last().permute(1, 0, 2).numpy()
    assert np.array_equal(seen, routes)
