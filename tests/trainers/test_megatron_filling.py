"""What Megatron-Core's RouterReplay accepts without a word, and that both `fill` and `attach` refuse it.

Each test first lets RouterReplay do the wrong thing and sees that nothing complains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_models as mm
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from moetrace.errors import (
    InvalidTraceError,
    LayoutMismatchError,
    MissingRowError,
    ReplayError,
    TokenMismatchError,
    UnsupportedRouterError,
)
from moetrace.layout import MoeLayout
from moetrace.replayer import AlignedRoutes, align
from moetrace.trace import RoutingTrace
from moetrace.trainers import megatron

pytestmark = pytest.mark.filterwarnings("ignore")  # Megatron-Core's own deprecations
COLUMNS = 10


@pytest.fixture(autouse=True, scope="module")
def _megatron() -> Iterator[None]:
    with mm.on_cpu():
        yield


@pytest.fixture(autouse=True)
def _no_other_models() -> None:
    RouterReplay.clear_global_router_replay_instances()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(7, 7 + COLUMNS)[None]


def all_rows(tokens: torch.Tensor, seed: int = 0, layout: MoeLayout = mm.LAYOUT) -> AlignedRoutes:
    """Routes of one sequence with a row for every token, as if it went on."""
    longer = np.append(tokens[0].numpy(), 0)
    return align(RoutingTrace.build(mm.trace_of(longer, seed, layout).experts_TLK, layout, tokens[0].numpy()), tokens)


def ids_of(routes: AlignedRoutes) -> list[torch.Tensor]:
    return [torch.from_numpy(ids_NK.astype(np.int64)) for ids_NK in routes.experts_LNK]


def by_hand(model: torch.nn.Module, targets: list[torch.Tensor], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Replay as Megatron-Core documents it; the maps that its dispatcher gets."""
    RouterReplay.set_replay_data(targets)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with mm.watched(model) as maps:
        mm.forward(model, tokens)
    RouterReplay.clear_global_indices()
    RouterReplay.clear_global_router_replay_action()
    return maps


def refused_by_both(
    model: torch.nn.Module, routes: AlignedRoutes, tokens: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        megatron.fill(model, routes, num_tokens=tokens.numel())
    with megatron.attach(model) as replayer, pytest.raises(error, match=match), replayer.microbatch(routes):
        mm.forward(model, tokens)


def test_what_is_right_passes_both(tokens: torch.Tensor) -> None:
    model, routes = mm.model(), all_rows(tokens)
    maps = by_hand(model, ids_of(routes), tokens)
    assert all(torch.equal(seen, mm.one_hot(ids)) for seen, ids in zip(maps, routes.experts_LNK, strict=True))
    megatron.fill(model, routes, num_tokens=COLUMNS)
    with mm.watched(model) as filled:
        mm.forward(model, tokens)
    megatron.finish(model)
    assert all(torch.equal(a, b) for a, b in zip(maps, filled, strict=True))
    replays = [router.router_replay for router in mm.routers_of(model)]
    assert all(replay.target_topk_idx is None and replay.router_replay_action is None for replay in replays)


def test_one_row_too_few(tokens: torch.Tensor) -> None:
    model, routes = mm.model(), all_rows(tokens)
    maps = by_hand(model, [ids_NK[:-1] for ids_NK in ids_of(routes)], tokens)
    assert not any(seen[-1].any() for seen in maps), "the last token goes to no expert, and nothing complains"
    refused_by_both(model, routes.take(range(COLUMNS - 1)), tokens, ReplayError, "another number of tokens")


def test_one_expert_too_few(tokens: torch.Tensor) -> None:
    model, narrow = mm.model(), all_rows(tokens, layout=MoeLayout(mm.LAYERS, mm.EXPERTS, mm.TOP_K - 1))
    maps = by_hand(model, ids_of(narrow), tokens)
    assert all((seen.sum(1) == mm.TOP_K - 1).all() for seen in maps), "two experts of three, and nothing complains"
    refused_by_both(model, narrow, tokens, LayoutMismatchError, "3 per token")


def test_an_expert_twice(tokens: torch.Tensor) -> None:
    model, routes = mm.model(), all_rows(tokens)
    routes.experts_LNK[:, 4, 1] = routes.experts_LNK[:, 4, 0]
    maps = by_hand(model, ids_of(routes), tokens)
    assert all(seen[4].sum() == mm.TOP_K - 1 for seen in maps), "one expert is lost, and nothing complains"
    refused_by_both(model, routes, tokens, InvalidTraceError, "token 4 has an expert twice")


def test_routes_of_the_next_token(tokens: torch.Tensor) -> None:
    model, routes = mm.model(), all_rows(tokens)
    by_hand(model, [ids_NK.roll(1, 0) for ids_NK in ids_of(routes)], tokens)  # nothing complains
    trace = RoutingTrace.build(routes.experts_LNK.transpose(1, 0, 2), mm.LAYOUT, tokens[0].roll(1).numpy())
    with pytest.raises(TokenMismatchError):
        align(trace, tokens)


def test_rows_in_the_order_of_the_batch() -> None:
    # Megatron-Core's activations are [S, B, H]: rows in the order of input_ids belong to other tokens.
    tokens = torch.randint(0, mm.VOCAB, (2, COLUMNS), generator=torch.Generator().manual_seed(0))
    routes = align([mm.trace_of(row.numpy(), seed) for seed, row in enumerate(tokens)], tokens, missing="live")
    model = mm.model()
    maps = by_hand(model, ids_of(routes), tokens)  # nothing complains
    right = mm.sequence_major(routes.experts_LNK[0].reshape(2, COLUMNS, mm.TOP_K))
    assert not torch.equal(maps[0][:-2], mm.one_hot(right)[:-2])
    with megatron.attach(model) as replayer, mm.watched(model) as maps, replayer.microbatch(routes):
        mm.forward(model, tokens)
    assert torch.equal(maps[0][:-2], mm.one_hot(right)[:-2])


def test_live_tokens_are_refused_and_padding_gets_distinct_ids(tokens: torch.Tensor) -> None:
    model, trace = mm.model(), mm.trace_of(tokens[0].numpy()[:6], 0)
    mask = (torch.arange(COLUMNS) < 6)[None].int()
    routes = align(trace, tokens, attention_mask=mask)
    targets = ids_of(routes)
    assert all((seen[6:].sum(1) == 1).all() for seen in by_hand(model, targets, tokens)), "padding on expert 0 only"
    with pytest.raises(MissingRowError, match="first without one is token 5"):
        megatron.fill(model, routes, num_tokens=COLUMNS)
    whole = RoutingTrace.build(mm.trace_of(tokens[0].numpy()[:7], 0).experts_TLK, mm.LAYOUT, tokens[0][:6].numpy())
    megatron.fill(model, align(whole, tokens, attention_mask=mask), num_tokens=COLUMNS)
    with mm.watched(model) as maps:
        mm.forward(model, tokens)
    assert all((seen.sum(1) == mm.TOP_K).all() for seen in maps)
    assert all(len({tuple(row.tolist()) for row in seen[6:]}) > 1 for seen in maps), "padding does not load one expert"


@pytest.mark.parametrize("way", ["fused", "sinkhorn"])
def test_a_router_that_does_not_ask(way: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(logits: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """TransformerEngine's kernel needs a GPU; what counts is that it is not told of a replay."""
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(topk).indices, 1)
        return logits.softmax(-1) * chosen, chosen.bool()

    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    monkeypatch.setattr(moe_utils, "fused_topk_with_score_function", fused, raising=False)
    model, routes = (
        mm.model(moe_router_load_balancing_type="sinkhorn" if way == "sinkhorn" else "none"),
        all_rows(tokens),
    )
    for router in mm.routers_of(model):
        router.config.moe_router_fusion = way == "fused"
    model.eval()  # sinkhorn iterates in training
    maps = by_hand(model, ids_of(routes), tokens)
    assert not any(torch.equal(seen, mm.one_hot(ids)) for seen, ids in zip(maps, routes.experts_LNK, strict=True))
    with pytest.raises(UnsupportedRouterError, match=way):
        megatron.attach(model)
    with pytest.raises(UnsupportedRouterError, match=way):
        megatron.fill(model, routes, num_tokens=COLUMNS)


def test_a_router_that_stops_asking_after_attach(tokens: torch.Tensor) -> None:
    model, routes = mm.model().eval(), all_rows(tokens)
    with megatron.attach(model) as replayer:
        mm.routers_of(model)[1].routing_type = "sinkhorn"
        with pytest.raises(ReplayError, match=r"layers \[2\] did not choose"), replayer.microbatch(routes):
            mm.forward(model, tokens)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"}, "capacity factor"),
        ({"moe_router_force_load_balancing": True}, "random logits"),
        ({"cuda_graph_impl": "local"}, "CUDA graph"),
        ({"overlap_moe_expert_parallel_comm": True}, "two microbatches"),
    ],
)
def test_settings_that_replace_routes(settings: dict[str, Any], match: str, tokens: torch.Tensor) -> None:
    model = mm.model()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedRouterError, match=match):
        megatron.attach(model)


def test_cuda_graphs_of_attention_alone_are_allowed() -> None:
    model = mm.model()
    model.config.cuda_graph_impl, model.config.cuda_graph_scope = "transformer_engine", ["attn"]
    model.config.cuda_graph_modules = ["attn"]
    megatron.attach(model).detach()


def test_draft_heads_and_other_models_shift_the_order_of_instances(tokens: torch.Tensor) -> None:
    reference = mm.model()
    model, routes = mm.model(mtp_num_layers=1), all_rows(tokens)
    instances, layers = RouterReplay.global_router_replay_instances, len(mm.LAYERS)
    own = [router.router_replay for router in mm.routers_of(model)]
    assert instances == [router.router_replay for router in mm.routers_of(reference)] + own
    numbers = [getattr(instance, "layer_number", None) for instance in own]
    assert numbers in ([None] * 4, [2, 3, 4, 1]), "absent in 0.16.1; of a draft head it looks like a decoder layer's"
    # A list of the right length: the drafts' entry first, say. Every layer gets its neighbour's rows.
    targets = ids_of(routes)
    maps = by_hand(model, [targets[0], *targets, *targets], tokens)
    assert torch.equal(maps[1], mm.one_hot(routes.experts_LNK[0])), "layer 2 replays layer 1, and nothing complains"
    megatron.fill(model, routes, num_tokens=COLUMNS)
    assert all(instance.target_topk_idx is None for instance in [*instances[:layers], own[-1]])
    with mm.watched(model) as maps:
        mm.forward(model, tokens)
    assert all(torch.equal(seen, mm.one_hot(ids)) for seen, ids in zip(maps, routes.experts_LNK, strict=False))


def gradients(model: torch.nn.Module, routes: AlignedRoutes, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What is right: nothing is recomputed, nothing queues."""
    for router, ids_NK in zip(mm.routers_of(model), ids_of(routes), strict=True):
        router.router_replay.set_target_indices(ids_NK)
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    mm.forward(model, tokens).square().mean().backward()
    for router in mm.routers_of(model):
        router.router_replay.clear_indices()
    return mm.router_gradients(model)


def close(found: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, right, strict=True))


def test_a_forward_only_pass_leaves_routes_in_the_queue(tokens: torch.Tensor) -> None:
    first, second = all_rows(tokens, 1), all_rows(tokens, 2)
    right = gradients(mm.model(), second, tokens)
    RouterReplay.clear_global_router_replay_instances()
    model = mm.model("full")
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    RouterReplay.set_replay_data(ids_of(first))
    with torch.no_grad():
        mm.forward(model, tokens)
    RouterReplay.set_replay_data(ids_of(second))
    loss = mm.forward(model, tokens).square().mean()
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    loss.backward()
    assert not close(mm.router_gradients(model), right), "recomputed by the first pass's routes, and nothing complains"
    with pytest.raises(ReplayError, match="never recomputed"):
        megatron.finish(model)
    with torch.no_grad():
        megatron.fill(model, first, num_tokens=COLUMNS)
        mm.forward(model, tokens)
    megatron.fill(model, second, num_tokens=COLUMNS)
    loss = mm.forward(model, tokens).square().mean()
    megatron.begin_recomputation(model)
    loss.backward()
    assert close(mm.router_gradients(model), right)
    megatron.finish(model)


def test_without_recomputation_every_step_leaves_its_routes(tokens: torch.Tensor) -> None:
    model, routes = mm.model(), all_rows(tokens)
    for _ in range(3):
        RouterReplay.set_replay_data(ids_of(routes))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        mm.forward(model, tokens).mean().backward()
    assert all(len(replay.replay_backward_list) == 3 for replay in RouterReplay.global_router_replay_instances)
    with pytest.raises(ReplayError, match="left in RouterReplay's queues"):
        megatron.finish(model)
    for _ in range(3):
        megatron.fill(model, routes, num_tokens=COLUMNS)
        mm.forward(model, tokens).mean().backward()
        megatron.finish(model)
    block = mm.model("block", recompute_num_layers=2)  # layers 0 and 1 of four are recomputed
    megatron.fill(block, routes, num_tokens=COLUMNS)
    assert [len(router.router_replay.replay_backward_list) for router in mm.routers_of(block)] == [1, 0, 0]


def test_an_action_that_is_not_switched_recomputes_by_the_last_microbatch(tokens: torch.Tensor) -> None:
    first, second = all_rows(tokens, 1), all_rows(tokens, 2)
    right = gradients(mm.model(), first, tokens)
    RouterReplay.clear_global_router_replay_instances()
    model = mm.model("full")
    losses = []
    for routes in (first, second):  # two microbatches in flight, as in a pipeline
        RouterReplay.set_replay_data(ids_of(routes))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        losses.append(mm.forward(model, tokens).square().mean())
    losses[0].backward()
    assert not close(mm.router_gradients(model), right), "recomputed by the second's routes, and nothing complains"
    with pytest.raises(ReplayError, match="never recomputed"):
        megatron.finish(model)
    losses = []
    for routes in (first, second):
        megatron.fill(model, routes, num_tokens=COLUMNS)
        losses.append(mm.forward(model, tokens).square().mean())
    for loss, routes in zip(losses, (first, second), strict=True):
        megatron.begin_recomputation(model)
        loss.backward()
        assert close(mm.router_gradients(model), gradients(mm.model(), routes, tokens))
    megatron.finish(model)
    with torch.no_grad():
        megatron.fill(model, first, num_tokens=COLUMNS)
    with pytest.raises(ReplayError, match="its queue is empty"):
        megatron.begin_recomputation(model)


def test_fill_needs_a_replay_instance(tokens: torch.Tensor) -> None:
    with pytest.raises(UnsupportedRouterError, match="moe_enable_routing_replay=True"):
        megatron.fill(mm.model(moe_enable_routing_replay=False), all_rows(tokens), num_tokens=COLUMNS)


def test_attach_needs_none(tokens: torch.Tensor) -> None:
    model, routes = mm.model(moe_enable_routing_replay=False), all_rows(tokens)
    with megatron.attach(model) as replayer, mm.watched(model) as maps, replayer.microbatch(routes):
        mm.forward(model, tokens)
    assert all(torch.equal(seen, mm.one_hot(ids)) for seen, ids in zip(maps, routes.experts_LNK, strict=True))
