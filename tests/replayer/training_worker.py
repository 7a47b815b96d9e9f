"""One rank of `test_parallel_training.py`: replayed training under each way of parallel training, seen and saved.

On CPUs with gloo, or with one GPU for each rank with NCCL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from families import left_behind, loss_of, random_routes, random_tokens, traces_of
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moetrace
from moetrace.errors import MoetraceError

NAME = "qwen3_moe"
CHECKPOINTS = ("none", "reentrant", "non-reentrant")
NEW_PLANS = "ep_size" in DistributedConfig.__dataclass_fields__
"""transformers >= 5.20: expert parallelism by size, and over ranks that have batches of their own."""


@dataclass(frozen=True)
class Microbatch:
    """Tokens, and routes that no live router would choose. Ranks have different numbers of tokens."""

    seed: int
    width: int

    @property
    def tokens(self) -> torch.Tensor:
        return random_tokens(2, self.width, seed=self.seed)

    @property
    def routes(self) -> np.ndarray:
        return random_routes(2 * self.width, NAME, seed=self.seed)


def microbatches(rank: int) -> list[Microbatch]:
    """Two of each rank."""
    return [Microbatch(10 * rank + number, 8 + 3 * rank) for number in (1, 2)]


@dataclass(frozen=True)
class Case:
    """A way of training in parallel.

    Attributes:
        wrap: (checkpoint, way of activation checkpointing, device) -> the model to call.
        checkpoints: the ways of activation checkpointing to try.
        shared: True where the ranks work on one batch, False where each has its own.
        lora: True where adapters are trained.
        tolerance: relative to a gradient's largest element. In float32 only the order of sums differs.
    """

    wrap: Callable[[Path, str, torch.device], Any]
    checkpoints: tuple[str, ...] = CHECKPOINTS
    shared: bool = False
    lora: bool = False
    tolerance: float = 1e-4


def load(checkpoint: Path, how: str, device: torch.device, **extra: Any) -> Any:
    """The model in float32, in training mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="grouped_mm", **extra
    )
    if how != "none":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    return (model if extra else model.to(device)).train()


def load_lora(checkpoint: Path, how: str, device: torch.device) -> Any:
    """The model under LoRA whose second factors are not zero, so that it matters."""
    from peft import LoraConfig, get_peft_model

    model, generator = load(checkpoint, how, device), torch.Generator().manual_seed(3)
    targets: Any = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if how == "reentrant":
        wrapped.enable_input_require_grads()
    return wrapped


def ddp(checkpoint: Path, how: str, device: torch.device) -> Any:
    return nn.parallel.DistributedDataParallel(load(checkpoint, how, device))


def ddp_lora(checkpoint: Path, how: str, device: torch.device) -> Any:
    return nn.parallel.DistributedDataParallel(load_lora(checkpoint, how, device))


def sharded(model: Any, **policy: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


def fsdp2(checkpoint: Path, how: str, device: torch.device) -> Any:
    return sharded(load(checkpoint, how, device))


def fsdp2_lora(checkpoint: Path, how: str, device: torch.device) -> Any:
    return sharded(load_lora(checkpoint, how, device))


def fsdp2_bfloat16(checkpoint: Path, how: str, device: torch.device) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return sharded(load(checkpoint, how, device), mp_policy=policy)


def fsdp2_routers(checkpoint: Path, how: str, device: torch.device) -> Any:
    """Routers and experts as units of their own: their classes are replaced too."""
    from torch.distributed.fsdp import fully_shard

    model = load(checkpoint, how, device)
    for layer in model.get_decoder().layers[1:]:
        fully_shard(layer.mlp.gate)
        fully_shard(layer.mlp.experts)
    return sharded(model)


def fsdp2_wrapped(checkpoint: Path, how: str, device: torch.device) -> Any:
    """Activation checkpointing by torch's wrapper modules, as torchtitan has it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    model = load(checkpoint, "none", device)
    layers = model.get_decoder().layers
    for number, layer in enumerate(layers):
        kind = CheckpointImpl.REENTRANT if how == "reentrant" else CheckpointImpl.NO_REENTRANT
        layers[number] = checkpoint_wrapper(layer, kind)
    return sharded(model)


def planned(**sizes: Any) -> Callable[[Path, str, torch.device], Any]:
    """By transformers' own plans."""

    def wrap(checkpoint: Path, how: str, device: torch.device) -> Any:
        return load(checkpoint, how, device, distributed_config=DistributedConfig(**sizes))

    return wrap


def accelerated(fsdp: bool = False, **settings: Any) -> Callable[[Path, str, torch.device], Any]:
    """By accelerate's `prepare`."""

    def wrap(checkpoint: Path, how: str, device: torch.device) -> Any:
        from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        plugin = None
        if fsdp:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                activation_checkpointing=how != "none",
                cpu_ram_efficient_loading=False,
            )
        accelerator = Accelerator(cpu=device.type == "cpu", fsdp_plugin=plugin, **settings)
        if fsdp and device.type == "cpu":  # accelerate takes a plugin on GPUs only; its code runs here as well
            accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model = load(checkpoint, "none" if fsdp else how, device)
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        return prepared

    return wrap


FOLLOWED = ("none", "non-reentrant")
"""Under the tensor-parallel plan of transformers, reentrant checkpointing gives wrong gradients without moetrace too:
those of q_norm and k_norm are not summed over ranks. Plugins of accelerate have no reentrant kind."""
CASES = {
    "ddp": Case(ddp),
    "ddp-lora": Case(ddp_lora, lora=True),
    "fsdp2": Case(fsdp2),
    "fsdp2-lora": Case(fsdp2_lora, lora=True),
    "fsdp2-routers": Case(fsdp2_routers),
    "fsdp2-wrapped": Case(fsdp2_wrapped, CHECKPOINTS[1:]),
    "fsdp2-bfloat16": Case(fsdp2_bfloat16, tolerance=0.1),
    "fsdp-plan": Case(planned(fsdp_size=2)),
    "tp-plan": Case(planned(tp_size=2, tp_plan="auto"), FOLLOWED, shared=True),
    "accelerate-ddp": Case(accelerated()),
    "accelerate-bfloat16": Case(accelerated(mixed_precision="bf16"), tolerance=0.1),
    "accelerate-fsdp2": Case(accelerated(fsdp=True), FOLLOWED),
}
if NEW_PLANS:
    CASES["ep-plan"] = Case(planned(tp_size=2, ep_size=2), FOLLOWED, shared=True)
    CASES["ep-fsdp-plan"] = Case(planned(fsdp_size=2, ep_size=2))


def train(model: Any, batches: list[Microbatch], device: torch.device, in_turn: bool) -> dict[str, Any]:
    """Replay microbatches and go back: all in flight at once, or one after the other. Returns what was seen."""
    inner = getattr(model, "module", model)
    seen: dict[str, Any] = {"ids": [], "logits": [], "counts": [], "pooled": []}
    losses, before = [], left_behind(inner)
    with counting_attention(inner) as calls:
        for batch in batches:
            traces = traces_of(inner, batch.routes, batch.tokens)
            with accumulating(model, in_turn and batch is not batches[-1]):
                replaying = moetrace.replay(model, traces, input_ids=batch.tokens, on_shift="ignore")
                with replaying as session, moetrace.record(inner) as used:
                    logits = model(input_ids=batch.tokens.to(device), use_cache=False).logits
                losses.append(loss_of(logits.cpu(), seed=batch.seed))
                if in_turn:
                    losses[-1].backward()
            seen["ids"].append(used.experts_LNK.cpu())
            seen["logits"].append(logits.detach().float().cpu())
            seen["counts"].append(session.counts())
            if dist.is_initialized():
                seen["pooled"].append(session.stats(dist.group.WORLD))
        if not in_turn:
            torch.stack(losses).sum().backward()
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in inner.named_parameters())
    seen["gradients"] = {name: None if grad is None else whole(grad) for name, grad in named}
    return seen | {"calls": sum(calls), "left": left_behind(inner) != before}


def refusals(checkpoint: Path, device: torch.device) -> dict[str, str]:
    """What is said of models that cannot be replayed as they are wrapped, by record and replay."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    batch, said = Microbatch(1, 8), dict[str, str]()
    traces = traces_of(load(checkpoint, "none", device), batch.routes, batch.tokens)
    fsdp1: Any = FullyShardedDataParallel(load(checkpoint, "none", device), device_id=device)
    inside = load(checkpoint, "none", device)
    inside.model.layers[1] = FullyShardedDataParallel(inside.model.layers[1], device_id=device)
    half = sharded(load(checkpoint, "none", device))

    def one_row() -> None:
        with moetrace.replay(half, traces, input_ids=batch.tokens):
            half(input_ids=batch.tokens[:1].to(device), use_cache=False)

    attempts: dict[str, Callable[[], Any]] = {
        "fsdp1, record": lambda: moetrace.record(fsdp1).__enter__(),
        "fsdp1 inside, record": lambda: moetrace.record(inside).__enter__(),
        "fsdp1, replay": lambda: moetrace.replay(fsdp1, traces, input_ids=batch.tokens).__enter__(),
        "token shard": one_row,
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except MoetraceError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def accumulating(model: Any, more_to_come: bool) -> AbstractContextManager[Any]:
    """DistributedDataParallel reduces gradients in the last backward only, and must be told."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if wrapped and more_to_come else nullcontext()


@contextmanager
def counting_attention(model: Any) -> Iterator[list[int]]:
    """Grows by one for each run of a layer's attention, to prove that layers were recomputed."""
    calls: list[int] = []
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in attentions]
    yield calls
    for handle in handles:
        handle.remove()


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


if __name__ == "__main__":
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for name, case in CASES.items():
        for how in case.checkpoints:
            batches = microbatches(0 if case.shared else rank)
            # with all in flight, torch's own DistributedDataParallel and nested FSDP2 fail under reentrant checkpoints
            seen = train(case.wrap(checkpoint, how, device), batches, device, in_turn=how == "reentrant")
            torch.save(seen, out / f"{name}-{how}-{rank}.pt")
    torch.save(refusals(checkpoint, device), out / f"refusals-{rank}.pt")
    dist.destroy_process_group()
