"""`attach(model)`: the routers of a Megatron-Core model, answered by us instead of by `RouterReplay`.

A router asks the object in its `router_replay` for its top-k. While a model is attached, that is a `_Port`: it knows
which microbatch is running and, in a backward pass, which one is being recomputed, so nothing stands in a queue.

Axes: N tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import nn
from torch.utils._pytree import tree_leaves

from moetrace.errors import ReplayError, RouterError
from moetrace.replayer.alarm import OnShift
from moetrace.replayer.routes import AlignedRoutes
from moetrace.trainers.megatron.microbatch import Microbatch, Task
from moetrace.trainers.megatron.recording import Recording
from moetrace.trainers.megatron.routers import LocalRouter, LocalRouters, find_routers
from moetrace.trainers.megatron.rows import rows_of_rank

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Port:
    """What a router finds in its `router_replay`.

    Attributes:
        router: the router.
        replaced: what it had there before.
        asked: how often it asked for its choice in the forward that runs.
    """

    def __init__(self, replayer: Replayer, router: LocalRouter) -> None:
        self.router = router
        self.replaced = router.module.router_replay
        self.asked = 0
        self.layer_number = router.layer + 1  # set_layer_number of 0.17 and later writes it
        self._replayer = replayer

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by Megatron-Core's `topk_routing_with_score_function` in place of its own top-k."""
        task, again = self._replayer.task()
        self.asked += not again
        values_NK, live_NK = default_compute_topk(scores, topk, num_groups, group_topk)
        if task is None:
            return values_NK, live_NK
        ids_NK = task.choose(self.router, scores, live_NK, again)
        return scores.gather(1, ids_NK), ids_NK


class Replayer:
    """A model whose routers are attached; made by `attach`. Not to be shared by threads that run forwards."""

    def __init__(self, routers: LocalRouters) -> None:
        self._routers = routers
        self._running: Task | None = None
        self._backward: tuple[int, Task | None] | None = None
        self._attached = True
        self._recomputes = any(router.recomputed for router in routers.all)
        self._ports = [[_Port(self, router) for router in chunk] for chunk in routers.of_chunk]
        self._hooks = []
        for chunk, ports in zip(routers.chunks, self._ports, strict=True):
            self._hooks.append(chunk.register_forward_pre_hook(partial(self._before_forward, ports), with_kwargs=True))
            self._hooks.append(chunk.register_forward_hook(partial(self._after_forward, ports)))
        for router, port in zip(routers.all, self._all_ports, strict=True):
            router.module.router_replay = port

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute numbers of the MoE layers on this rank."""
        return self._routers.layers

    @contextmanager
    def microbatch(self, routes: AlignedRoutes, *, on_shift: OnShift = "error") -> Iterator[Microbatch]:
        """Replay in the forwards of this context, and in the backward passes of what they return, whenever these run.

        Open it around the call of the model in `forward_step_func`; with virtual pipeline stages around that of each
        chunk, with the same routes.

        Args:
            routes: of the tokens that the model is called with on this rank; see `rows_of_rank`.
            on_shift: what happens when the routes would fit the live routers better shifted by one token: at the end
                on a CPU, and on a GPU where no backward pass is to come; else at the end of the backward pass.

        Raises:
            LayoutMismatchError, InvalidTraceError: the routes do not fit the model, or are none.
            ReplayError: they are of another number of tokens, or no forward ran.
            TokenMismatchError: a first stage is called with other tokens than those that were aligned, whatever
                `on_shift` says; on a GPU it comes when a shift is known.
            ShiftedRoutesError: see `on_shift`.
        """
        microbatch = Microbatch(rows_of_rank(routes, self._routers), on_shift)
        with self._run(microbatch):
            yield microbatch
        microbatch.close()

    @contextmanager
    def record(self, recording: Recording | None = None) -> Iterator[Recording]:
        """Record the routes of a forward.

        Args:
            recording: one to go on with, where virtual pipeline stages of a microbatch run one by one.

        Raises:
            RouterError: a chunk ran twice in one recording.
            ReplayError: no forward ran.
        """
        recording = recording or Recording(self._routers)
        with self._run(recording):
            yield recording

    def detach(self) -> None:
        """Give the routers back what they had. Backward passes that recompute must be over."""
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for router, port in zip(self._routers.all, self._all_ports, strict=True):
            if router.module.router_replay is port:
                router.module.router_replay = port.replaced

    def __enter__(self) -> Replayer:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def task(self) -> tuple[Task | None, bool]:
        """What the router that asks is running for (None: for nothing, live), and whether this is a recomputation."""
        graph_task = torch._C._current_graph_task_id()
        if graph_task == -1:
            return self._running, False
        if self._backward is None or self._backward[0] != graph_task:
            raise ReplayError(
                "a router is recomputed in a backward pass that cannot be told to be of any forward",
                expected="a backward pass from tensors that the attached model returned",
                fix="Call the chunks that were given to attach, and return their output's tensors as they are, in "
                "tuples, lists or dicts.",
            )
        return self._backward[1], True

    @property
    def _all_ports(self) -> list[_Port]:
        return [port for ports in self._ports for port in ports]

    @contextmanager
    def _run(self, task: Task) -> Iterator[None]:
        if not self._attached or self._running is not None:
            raise ReplayError(
                "a microbatch cannot begin",
                expected="an attached model, and one microbatch at a time",
                got="another one is running" if self._attached else "a model that was detached",
            )
        self._running, before = task, task.forwards
        try:
            yield
        finally:
            self._running = None
        if task.forwards == before:
            raise ReplayError(
                "nothing was replayed or recorded: the model did not run inside the context",
                expected="a forward of a chunk that was given to attach",
                fix="Call the very model that was attached, or what wraps it.",
            )

    def _before_forward(self, ports: Sequence[_Port], chunk: nn.Module, args: Any, kwargs: Any) -> None:
        for port in ports:
            _require_idle(port.router, port.replaced)
            port.asked = 0
        if self._running is not None:
            self._running.begin([port.router for port in ports], _ids_of(chunk, args, kwargs))

    def _after_forward(self, ports: Sequence[_Port], module: nn.Module, args: Any, output: Any) -> None:
        task = self._running
        if task is not None:
            task.forwards += 1
            if unasked := [port.router.layer for port in ports if port.asked != 1]:
                raise ReplayError(
                    f"the routers of layers {unasked} did not choose exactly once in a forward",
                    expected="each router asks for its top-k once",
                    fix="Something selects experts beside Megatron-Core's top-k; without it these routes can be used.",
                )
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._begin_backward, task))
                    if task is not None:
                        task.watch(tensor)

    def _begin_backward(self, task: Task | None, _: torch.Tensor) -> None:
        if task is not None and self._recomputes and not self._attached:
            raise ReplayError(
                "the model was detached before a backward pass that recomputes its routers",
                expected="detach after the last backward pass",
            )
        self._backward = (torch._C._current_graph_task_id(), task)


def _ids_of(chunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The token ids that a chunk is called with, where it looks them up: a first stage, given no embeddings."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    if not isinstance(chunk, GPTModel) or not chunk.pre_process:
        return None
    given = dict(zip(("input_ids", "position_ids", "attention_mask", "decoder_input"), args, strict=False)) | kwargs
    ids = given.get("input_ids")
    return ids if isinstance(ids, torch.Tensor) and given.get("decoder_input") is None else None


def attach(model: nn.Module | Sequence[nn.Module]) -> Replayer:
    """Answer the routers of a Megatron-Core model until `detach`.

    Forwards outside a `microbatch` or `record` route live.

    Args:
        model: the model, wrapped or not; with virtual pipeline stages the list of this rank's chunks.

    Raises:
        NotMoeError, UnsupportedRouterError: the model cannot be replayed.
        RouterError: something else supplies its routes already.
    """
    routers = find_routers(model)
    for router in routers.all:
        _require_idle(router, router.module.router_replay)
    return Replayer(routers)


def _require_idle(router: LocalRouter, replay: object) -> None:
    """Raise `RouterError` where a router is attached already, or its `RouterReplay` holds or is told something."""
    if replay is None or (
        isinstance(replay, RouterReplay)
        and replay.router_replay_action is None
        and replay.target_topk_idx is None
        and not replay.replay_backward_list
    ):
        return
    raise RouterError(
        f"router {router.name} gets its routes from somebody else",
        expected="an idle RouterReplay, or none",
        got="RouterReplay with routes or an action" if isinstance(replay, RouterReplay) else "attached twice",
        fix="Detach first, or clear RouterReplay's indices and action; its own recording needs a detached model too.",
    )
