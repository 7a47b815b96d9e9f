"""Short runs of TRL's GRPOTrainer on a CPU, and a spy on what the experts of its forwards receive.

Axes: B sequences and S columns of a forward, T tokens of a sequence, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig

from moetrace.routers import find_routers, layout_of
from moetrace.trainers.trl import GRPOTrainer

torch.set_num_threads(1)

TOKENIZER = "models/tiny-qwen3-moe"
"""Its token ids are bytes."""
PROMPTS = ["In the beginning", "Blessed are they that", "And the LORD spake unto Moses", "Thus saith"]


def small_model(folder: Path) -> Qwen3MoeForCausalLM:
    """A model with random weights that knows the folder it is saved in: a reference model is loaded from there."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    layers: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    tokens: dict[str, Any] = {"vocab_size": 260, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    others: dict[str, Any] = {"max_position_embeddings": 256, "initializer_range": 0.3}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, **experts, **tokens, **others))
    model.save_pretrained(folder / "model")
    return Qwen3MoeForCausalLM.from_pretrained(folder / "model", experts_implementation="eager")


def trainer_of(folder: Path, model: Any = None, *, replay: Any = None, more: Any = None, **config: Any) -> Any:
    """A trainer of the small model, or of another with bytes as tokens. `config` is TRL's, `more` the trainer's own."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    return GRPOTrainer(
        model=model or small_model(folder),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left"),
        reward_funcs=[reward],
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        args=GRPOConfig(str(folder), **(values | config)),
        replay=replay,
        **(more or {}),
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Something that differs between completions."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@dataclass
class Forward:
    """One forward of a model: what it was given, and `[B, S, K]` ids that experts received, a list for each layer."""

    input_ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    enabled: bool
    """Whether PEFT's adapters, if there are any, computed."""
    received: dict[int, list[torch.Tensor]] = field(default_factory=dict)


@contextmanager
def watching(model: Any) -> Iterator[list[Forward]]:
    """The batched forwards of a model of text, by hooks of torch alone. A recomputation in a backward adds to the
    forward that was last."""
    forwards: list[Forward] = []
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    places = {site.name.rpartition(".")[0]: site.index for site in find_routers(base)}
    hooks = []

    def began(_: Any, args: tuple, kwargs: dict) -> None:
        enabled = not hasattr(model, "peft_config") or bool(model.get_model_status().enabled)
        forwards.append(Forward(kwargs["input_ids"].clone(), kwargs["attention_mask"].clone(), enabled))

    def received(module: Any, args: tuple, kwargs: dict) -> None:
        _, ids, _ = (*args, *kwargs.values())
        forward = forwards[-1]
        ids_BSK = ids.detach().clone().view(*forward.input_ids_BS.shape, -1)
        forward.received.setdefault(indices[module], []).append(ids_BSK)

    indices = {base.get_submodule(f"{block}.experts"): index for block, index in places.items()}
    hooks.append(base.model.register_forward_pre_hook(began, with_kwargs=True))
    hooks += [module.register_forward_pre_hook(received, with_kwargs=True) for module in indices]
    try:
        yield forwards
    finally:
        for hook in hooks:
            hook.remove()


def unlike_any(tokens: list[int], model: Any) -> np.ndarray:
    """`[T, L, K]` routes that depend on all tokens of the sequence, and on nothing that a router knows."""
    layout = layout_of(model)
    draws = np.random.default_rng(tokens).random((len(tokens), layout.num_layers, layout.num_experts))
    return draws.argsort(-1)[..., : layout.top_k]
