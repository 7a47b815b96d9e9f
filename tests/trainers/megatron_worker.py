"""One of two ranks: real Megatron-Core schedules with replay. Writes what its routers chose and their gradients.

Run by torchrun: `megatron_worker.py FOLDER`. `alone` is the same without any parallelism, for the test to compare.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_models as mm
import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import distributed
from torch.overrides import TorchFunctionMode

from moetrace.replayer import AlignedRoutes, align
from moetrace.trainers import megatron

ROWS, COLUMNS, MICROBATCHES = 2, 8, 4
PLANS: dict[str, dict[str, Any]] = {
    "sequence": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "virtual": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def microbatch(number: int) -> tuple[torch.Tensor, AlignedRoutes]:
    """Tokens, and routes of all layers; the last token of each row is live."""
    tokens = np.random.default_rng(number).integers(0, mm.VOCAB, (ROWS, COLUMNS))
    return torch.from_numpy(tokens), align([mm.trace_of(row, number * 10 + b) for b, row in enumerate(tokens)], tokens)


def with_weights_by_name(built: torch.nn.Module) -> torch.nn.Module:
    """The same weights in a whole model and in its chunks."""
    numbers = {
        name: layer.layer_number - 1 for name, layer in built.named_modules() if hasattr(layer, "self_attention")
    }
    for name, parameter in built.named_parameters():
        for prefix, number in numbers.items():
            name = name.replace(f"{prefix}.", f"layer {number}.")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (1.2 if "router" in name else 0.3)
    return built


def alone(model: torch.nn.Module) -> dict[str, Any]:
    """Outputs, and gradients of the routers by layer: no parallelism, no schedule, no recomputation."""
    outputs = []
    with megatron.attach(model) as replayer:
        for number in range(MICROBATCHES):
            tokens, routes = microbatch(number)
            with replayer.microbatch(routes, on_shift="ignore"):
                outputs.append(mm.forward(model, tokens))
            (outputs[-1].square().mean() / MICROBATCHES).backward()
    gradients = dict(zip(mm.LAYERS, mm.router_gradients(model), strict=True))
    return {"gradients": gradients, "outputs": [output.detach() for output in outputs]}


def pipelined(plan: dict[str, Any]) -> dict[str, Any]:
    """A step of the schedule that Megatron-Core picks, every layer recomputed, after a forward-only step."""
    virtual, rank = plan.get("virtual_pipeline_model_parallel_size"), distributed.get_rank()
    models = []
    for number in range(virtual or 1):
        last = rank == 1 and number == (virtual or 1) - 1
        stage = {"vp_stage": number if virtual else None, "pre_process": rank == number == 0, "post_process": last}
        settings = {"recompute_num_layers": 1, "batch_p2p_comm": False, "deallocate_pipeline_outputs": True}
        built = mm.model("full", chunk=stage, **settings, **plan)
        models.append(with_weights_by_name(built))
    chosen: list[tuple[int, torch.Tensor]] = []
    with megatron.attach(models) as replayer:

        def step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            tokens, routes = next(batches)
            with replayer.microbatch(routes) as replaying, mm.watched(model) as maps:
                output = mm.forward(model, tokens)
            counts = replaying.counts()
            assert len(counts.hits_L if counts else ()) == len(maps), "each chunk counts its own layers"
            chosen.extend(zip(layers_of(model), maps, strict=True))
            return output, lambda out: (out.square().mean(), {})

        for forward_only in (True, False):
            with torch.set_grad_enabled(not forward_only), OnCpu():
                get_forward_backward_func()(
                    forward_step_func=step,
                    data_iterator=[map(microbatch, range(MICROBATCHES)) for _ in models],
                    model=models,
                    num_microbatches=MICROBATCHES,
                    seq_length=COLUMNS,
                    micro_batch_size=ROWS,
                    forward_only=forward_only,
                )
    routers = [router for model in models for router in mm.routers_of(model)]
    return {"chosen": chosen, "gradients": {router.layer_number - 1: router.weight.grad for router in routers}}


def split_along_sequence(plan: dict[str, Any]) -> dict[str, Any]:
    """Tensor parallelism with sequence parallelism: each rank's routers see half of every row."""
    model = mm.model("full", sequence_parallel=True, **plan)
    alone = torch.load(Path(sys.argv[1]) / "weights.pt")
    for router, weight in zip(mm.routers_of(model), alone, strict=True):
        assert torch.equal(router.weight, weight), "the weights must be those of the model without parallelism"
    chosen: list[tuple[int, torch.Tensor]] = []
    outputs = []
    with megatron.attach(model) as replayer:
        for number in range(MICROBATCHES):
            tokens, routes = microbatch(number)
            with replayer.microbatch(routes, on_shift="ignore"), mm.watched(model) as maps:
                outputs.append(gather_from_tensor_model_parallel_region(mm.forward(model, tokens)))
            chosen.extend(zip(layers_of(model), maps, strict=True))
            (outputs[-1].square().mean() / MICROBATCHES).backward()
    for router in mm.routers_of(model):
        distributed.all_reduce(router.weight.grad)  # as finalize_model_grads does for sequence parallelism
    gradients = dict(zip(mm.LAYERS, mm.router_gradients(model), strict=True))
    return {"chosen": chosen, "gradients": gradients, "outputs": [output.detach() for output in outputs]}


def layers_of(model: torch.nn.Module) -> list[int]:
    """Numbers of its MoE layers."""
    return [router.layer_number - 1 for router in mm.routers_of(model)]


class OnCpu(TorchFunctionMode):
    """The schedules create their counters on "cuda", by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


def plain_norm(_cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """Megatron-Core's own norm needs TransformerEngine under sequence parallelism, for its gradients only."""
    return torch.nn.RMSNorm(hidden_size, eps)


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name, plan in PLANS.items():
        with mm.on_cpu(**plan), pytest.MonkeyPatch.context() as patch:
            patch.setattr(WrappedTorchNorm, "__new__", plain_norm)
            patch.setattr(torch.cuda, "synchronize", lambda: None)
            seen = split_along_sequence(plan) if name == "sequence" else pipelined(plan)
            torch.save(seen, Path(sys.argv[1]) / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
