"""Tiny random models of the five router families, spies, and the routers' formulas in float64.

Axes: N tokens of a forward, L MoE layers, E experts, K experts per token, B rows and S columns of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moetrace.routers import fingerprint_of, layout_of
from moetrace.trace import RoutingTrace

torch.set_num_threads(1)

VOCAB = 64
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EIGHT: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 8}
_SIXTEEN: dict[str, Any] = {"num_experts_per_tok": 4, "num_local_experts": 16}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_QWEN: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "mlp_only_layers": [0]}

Formula = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(router, float64 logits [N, E], int64 ids [N, K]) -> the combine weights [N, K] of those ids, float64."""


def softmax_gather(router: nn.Module, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Qwen3-MoE with norm_topk_prob=False: transformers 5.23, qwen3_moe/modeling_qwen3_moe.py, Qwen3MoeTopKRouter."""
    exp_NE = torch.exp(logits_NE - logits_NE.max(-1, keepdim=True).values)
    return (exp_NE / exp_NE.sum(-1, keepdim=True)).gather(-1, ids_NK)


def softmax_gather_renormalised(router: nn.Module, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Mixtral (arXiv 2401.04088, section 2.1) and Qwen3-MoE with norm_topk_prob=True: the K probabilities sum to 1."""
    weights_NK = softmax_gather(router, logits_NE, ids_NK)
    return weights_NK / weights_NK.sum(-1, keepdim=True)


def softmax_gather_scaled(router: nn.Module, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V2 (arXiv 2405.04434, equations 20 to 22; deepseek_v2/modeling_deepseek_v2.py, DeepseekV2TopkRouter).

    Groups decide which experts may be chosen, not what a chosen expert weighs: the weight is its affinity s_i, the
    softmax over all experts, times the scaling factor.
    """
    return softmax_gather(router, logits_NE, ids_NK) * float(router.routed_scaling_factor)  # type: ignore[arg-type]


def sigmoid_gather_renormalised(router: nn.Module, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16): the bias selects, the unbiased affinity weighs."""
    weights_NK = (1 / (1 + torch.exp(-logits_NE))).gather(-1, ids_NK)
    return weights_NK / weights_NK.sum(-1, keepdim=True) * float(router.routed_scaling_factor)  # type: ignore[arg-type]


def softmax_over_chosen(router: nn.Module, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """GPT-OSS (gpt_oss/modeling_gpt_oss.py, GptOssTopKRouter): softmax over the K chosen logits only."""
    chosen_NK = logits_NE.gather(-1, ids_NK)
    exp_NK = torch.exp(chosen_NK - chosen_NK.max(-1, keepdim=True).values)
    return exp_NK / exp_NK.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Family:
    """One row of the table of tiny models: how to make it, and what is known about it without running moetrace."""

    config: type[PreTrainedConfig]
    settings: dict[str, Any]
    layers: tuple[int, ...]
    order: str
    weights: Formula
    num_experts: int = 8
    top_k: int = 2
    router: str = "gate"


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        MixtralConfig, {**_EIGHT, "num_key_value_heads": 2}, (0, 1, 2), "rank", softmax_gather_renormalised
    ),
    "mixtral_16": Family(
        MixtralConfig, {**_SIXTEEN, "num_key_value_heads": 2}, (0, 1, 2), "rank", softmax_gather_renormalised, 16, 4
    ),
    "deepseek_v2": Family(
        DeepseekV2Config,
        {**_LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 1.7},
        (1, 2),
        "set",
        softmax_gather_scaled,
    ),
    "deepseek_v2_groups": Family(
        DeepseekV2Config,
        {
            **_LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,  # the best K experts lie in the best K groups by maximum: only fewer groups limit
            "routed_scaling_factor": 1.7,
        },
        (1, 2),
        "set",
        softmax_gather_scaled,
    ),
    "deepseek_v3": Family(
        DeepseekV3Config,
        {**_LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2},
        (1, 2),
        "set",
        sigmoid_gather_renormalised,
    ),
    "deepseek_v3_16": Family(
        DeepseekV3Config,
        {**_LATENT, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
        (1, 2),
        "set",
        sigmoid_gather_renormalised,
        16,
        4,
    ),
    "qwen3_moe": Family(Qwen3MoeConfig, {**_QWEN, **_EIGHT, "norm_topk_prob": False}, (1, 2), "rank", softmax_gather),
    "qwen3_moe_norm": Family(
        Qwen3MoeConfig, {**_QWEN, **_EIGHT, "norm_topk_prob": True}, (1, 2), "rank", softmax_gather_renormalised
    ),
    "gpt_oss": Family(
        GptOssConfig,
        {
            **_EIGHT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        (0, 1, 2),
        "rank",
        softmax_over_chosen,
        router="router",
    ),
}
NAMES = tuple(FAMILIES)
ONE_OF_EACH = ("mixtral", "deepseek_v2_groups", "deepseek_v3", "qwen3_moe_norm", "gpt_oss")


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model, with changes."""
    settings = {**_SIZES, **FAMILIES[name].settings, **changes}
    config: Any = FAMILIES[name].config
    return config(attn_implementation="eager", **settings)


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, experts: str = "eager", **changes: Any
) -> Any:
    """A tiny model in eval mode whose random weights spread its tokens over all experts."""
    model: Any = AutoModelForCausalLM.from_config(config_of(name, **changes), experts_implementation=experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in parameter_name else 0.35 * noise)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype).eval()


def routers_of(model: Any, name: str) -> list[Any]:
    """The router modules in layer order, found by the family's own attribute name."""
    return [getattr(model.model.layers[layer].mlp, FAMILIES[name].router) for layer in FAMILIES[name].layers]


def experts_of(model: Any, name: str) -> list[Any]:
    """The experts modules in layer order."""
    return [model.model.layers[layer].mlp.experts for layer in FAMILIES[name].layers]


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of a batch, int64."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def random_routes(num_tokens: int, name: str, seed: int = 0) -> np.ndarray:
    """`[N, L, K]` int64: distinct random experts, in random order, whatever the router would choose."""
    family = FAMILIES[name]
    draws = np.random.default_rng(seed).random((num_tokens, len(family.layers), family.num_experts))
    return draws.argsort(-1)[..., : family.top_k]


def trace_of(model: Any, ids_TLK: np.ndarray, tokens: Any, **facts: Any) -> RoutingTrace:
    """A trace of a model with ids made by the test."""
    return RoutingTrace.build(
        ids_TLK, layout_of(model), np.asarray(tokens), fingerprint=fingerprint_of(model), engine="test", **facts
    )


def traces_of(model: Any, ids_NLK: np.ndarray, tokens_BS: torch.Tensor) -> list[RoutingTrace]:
    """One trace for each row of an unpadded batch from its flat routes."""
    rows = ids_NLK.reshape(*tokens_BS.shape, *ids_NLK.shape[1:])
    return [trace_of(model, row, tokens) for row, tokens in zip(rows, tokens_BS.numpy(), strict=True)]


@dataclass
class Spy:
    """What went through modules, in the order of the calls: `calls[layer index][call]`."""

    calls: list[list[tuple[torch.Tensor, ...]]] = field(default_factory=list)

    def last(self, item: int = 0) -> torch.Tensor:
        """`[L, N, ...]` of one item of each layer's last call."""
        return torch.stack([calls[-1][item] for calls in self.calls])

    def counts(self) -> list[int]:
        """Calls of each layer."""
        return [len(calls) for calls in self.calls]


@contextmanager
def experts_spy(model: Any, name: str) -> Iterator[Spy]:
    """Ids (item 0) and weights (item 1) as the experts modules receive them, taken by hooks of torch alone."""
    with _hooked(experts_of(model, name), before=True) as spy:
        yield spy


@contextmanager
def router_spy(model: Any, name: str) -> Iterator[Spy]:
    """Logits (item 0), weights (1) and ids (2) as the routers return them."""
    with _hooked(routers_of(model, name), before=False) as spy:
        yield spy


@contextmanager
def _hooked(modules: Sequence[nn.Module], before: bool) -> Iterator[Spy]:
    spy = Spy([[] for _ in modules])
    handles = []
    for calls, module in zip(spy.calls, modules, strict=True):

        def received(_: nn.Module, args: tuple, kwargs: dict, calls: list[tuple[torch.Tensor, ...]] = calls) -> None:
            _, ids, weights = (*args, *kwargs.values())
            calls.append((ids.detach().clone(), weights.detach().clone()))

        def returned(_: nn.Module, args: tuple, output: Any, calls: list[tuple[torch.Tensor, ...]] = calls) -> None:
            calls.append(tuple(item.detach().clone() for item in output))

        handles.append(
            module.register_forward_pre_hook(received, with_kwargs=True)
            if before
            else module.register_forward_hook(returned)
        )
    try:
        yield spy
    finally:
        for handle in handles:
            handle.remove()


def loss_of(logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A scalar that depends on every logit with its own weight."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits.float() * weights).sum() / logits.shape[-1]


def gradients_of(model: Any) -> dict[str, torch.Tensor | None]:
    """Copies of all parameter gradients."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def step(model: Any, tokens_BS: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Logits and gradients of one forward and backward pass."""
    model.zero_grad()
    logits = model(tokens_BS, use_cache=False, **inputs).logits
    loss_of(logits).backward()
    return logits.detach(), gradients_of(model)


def assert_same_gradients(
    got: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], **tolerance: Any
) -> None:
    """Equal to the bit, or within a tolerance where one is given."""
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        other = expected[name]
        if gradient is None or other is None:
            assert gradient is other, name
        elif tolerance:
            torch.testing.assert_close(gradient, other, msg=name, **tolerance)
        else:
            assert torch.equal(gradient, other), name


def left_behind(model: Any) -> list[str]:
    """What a tap could have left in a model: shadowed methods of its modules."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{attribute}" for attribute in ("forward", "__call__") if attribute in vars(module)]
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and "moetrace" in (getattr(checkpoint, "__module__", "") or ""):
            found.append(f"{name}._gradient_checkpointing_func")
    return found
