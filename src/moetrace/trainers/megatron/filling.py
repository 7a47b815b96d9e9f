"""`fill`: `RouterReplay`'s targets, checked, for code that drives `RouterReplay` itself.

`RouterReplay` takes any tensor for any router, has no mode of a token, and keeps a queue for recomputations to which
every target is added, whether anything will ever be recomputed or not. `set_replay_data` hands tensors out by the order
in which routers were built in this process: draft heads and other models count. Here each router of the model gets the
rows of its own layer, and its queue only what will be taken out of it.

What `RouterReplay` cannot do is left to `attach`: live tokens, and microbatches whose backward passes come in another
order than their forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import nn

from moetrace.errors import MissingRowError, ReplayError, UnsupportedRouterError
from moetrace.replayer.routes import AlignedRoutes, TokenMode
from moetrace.trainers.megatron.routers import LocalRouter, find_routers
from moetrace.trainers.megatron.rows import rows_of_rank


def fill(model: nn.Module | Sequence[nn.Module], routes: AlignedRoutes, *, num_tokens: int) -> None:
    """Set the targets of one microbatch's next forward, and the action `REPLAY_FORWARD`, on the decoder's routers.

    Call it right before the forward, in the grad mode of the forward: only then is it known whether anything will be
    recomputed. Padding gets distinct ids.

    Args:
        model: the model, wrapped or not, or one chunk of it, built with `moe_enable_routing_replay`.
        routes: of the tokens that the model is called with on this rank; see `rows_of_rank`.
        num_tokens: T_local, how many tokens the routers of this rank see: batch times sequence, divided by the sizes of
            context and sequence parallelism. Megatron-Core accepts fewer rows without a word.

    Raises:
        LayoutMismatchError, InvalidTraceError: the routes do not fit the model, or are none.
        ReplayError: they are of another number of tokens.
        MissingRowError: a token is to be routed live.
        UnsupportedRouterError: a router cannot be replayed, or not by `RouterReplay`.
    """
    routers = find_routers(model)
    replays = [_replay_of(router) for router in routers.all]
    rows = rows_of_rank(routes, routers)
    if rows is None:
        return
    given = rows.in_router_order()
    if given.num_tokens != num_tokens:
        raise ReplayError(
            "the routes are of another number of tokens than this rank's routers see",
            expected=f"{num_tokens} tokens (padding included)",
            got=given.num_tokens,
            fix="Align the routes to the very tokens that this rank's model is called with: after context parallelism, "
            "before sequence parallelism, which is cut here.",
        )
    if live := given.count(TokenMode.LIVE):
        raise MissingRowError(
            f"{live} tokens have no row, and RouterReplay cannot route some tokens of a batch live",
            expected="a row for every token that is not padding",
            got=f"the first without one is token {int((given.mode_N == TokenMode.LIVE).argmax())} of this rank",
            fix="Use attach, which can; or leave the last token of every sequence out of the batch.",
        )
    targets_LNK = torch.from_numpy(given.dense(dtype=np.int64))
    device = next(model.parameters() if isinstance(model, nn.Module) else routers.chunks[0].parameters()).device
    if device.type == "cuda":
        targets_LNK = targets_LNK.pin_memory().to(device, non_blocking=True)
    for router, replay in zip(routers.all, replays, strict=True):
        replay.set_target_indices(targets_LNK[rows.places[router.layer]])
        if not (torch.is_grad_enabled() and router.recomputed):
            replay.replay_backward_list.pop()
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def begin_recomputation(model: nn.Module | Sequence[nn.Module]) -> None:
    """Set the action `REPLAY_BACKWARD` on the decoder's routers: call it right before each microbatch's backward pass.

    Routers then take routes out of their queues, so backward passes must come in the order of their forwards, as in all
    of Megatron-Core's schedules.

    Raises:
        ReplayError: a router that will be recomputed has nothing in its queue.
    """
    for router in find_routers(model).all:
        replay = _replay_of(router)
        if router.recomputed and not replay.replay_backward_list:
            raise ReplayError(
                f"router {router.name} will be recomputed, and its queue is empty",
                expected="routes filled with gradients enabled for every forward",
                fix="Call fill inside the grad mode of the forward.",
            )
        replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)


def finish(model: nn.Module | Sequence[nn.Module]) -> None:
    """Clear targets and actions of the decoder's routers at the end of a step.

    Raises:
        ReplayError: a queue was not drained, so some recomputation used other routes than its forward, or none ran. The
            queues are empty afterwards all the same.
    """
    left = {}
    for router in find_routers(model).all:
        replay = _replay_of(router)
        if replay.replay_backward_list:
            left[router.layer] = len(replay.replay_backward_list)
        replay.clear_indices()
        replay.clear_router_replay_action()
    if left:
        raise ReplayError(
            "routes of forwards that were never recomputed are left in RouterReplay's queues",
            expected="empty queues at the end of a step",
            got=f"{left} (layer: routes)",
            fix="Call begin_recomputation before each backward pass, and run one for every forward with gradients.",
        )


def _replay_of(router: LocalRouter) -> RouterReplay:
    replay = router.module.router_replay
    if not isinstance(replay, RouterReplay):
        raise UnsupportedRouterError(
            f"router {router.name} has no RouterReplay to fill",
            expected="a model built with moe_enable_routing_replay=True, and not attached",
            got="none" if replay is None else type(replay).__name__,
            fix="Build it so, or use attach.",
        )
    config = router.module.config
    if config.recompute_method == "block" and (config.fp8 or getattr(config, "fp4", None)):
        raise UnsupportedRouterError(
            "which layers are recomputed cannot be told before the forward",
            got="recompute_method='block' with FP8 or FP4",
            fix="Use attach, which need not know.",
        )
    return replay
