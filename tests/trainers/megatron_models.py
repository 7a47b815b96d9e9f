"""Real Megatron-Core models on the CPU of one process, or of the ranks of a worker.

Megatron-Core asks CUDA for the current device and for random states; nothing else of it needs a GPU here. `on_cpu`
answers these from the CPU, and keeps torch from compiling. Without TransformerEngine 0.16.1 reads a name that it never
defined; None is what later releases define.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

VOCAB = 64
LAYERS, EXPERTS, TOP_K = (1, 2, 3), 16, 3
LAYOUT = MoeLayout(LAYERS, EXPERTS, TOP_K)
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@contextmanager
def on_cpu(**parallel: Any) -> Iterator[None]:
    """Megatron-Core, initialised in the process group that there is, or in one of this process alone."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state())
        patch.setattr(megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
        patch.setattr(megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        if not hasattr(moe_utils, "te_general_gemm"):
            patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        alone = not distributed.is_initialized()
        if alone:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(**parallel)
            megatron_random.model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if alone:
                distributed.destroy_process_group()
            RouterReplay.clear_global_router_replay_instances()


def config(recompute: str = "none", **changes: Any) -> TransformerConfig:
    """Four layers, the first one dense, of 16 experts and three per token."""
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 16,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_enable_routing_replay": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "init_method_std": 0.3,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**(settings | RECOMPUTE[recompute] | changes))


def model(recompute: str = "none", *, chunk: dict[str, Any] | None = None, **changes: Any) -> GPTModel:
    """A model with the same weights in every call, or one pipeline chunk of it."""
    torch.manual_seed(0)
    settings = config(recompute, **changes)
    stage = {"vp_stage": (chunk or {}).get("vp_stage")}
    layers = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, **stage)
    drafts = get_gpt_mtp_block_spec(settings, layers, False, **stage) if settings.mtp_num_layers else None
    built = GPTModel(
        settings,
        layers,
        vocab_size=VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
        mtp_block_spec=drafts,
        **(chunk or {}),
    )
    for name, parameter in built.named_parameters():
        if name.endswith("router.weight"):
            parameter.data *= 4  # choices far from ties
    return built


def routers_of(built: torch.nn.Module) -> list[TopKRouter]:
    """Its routers by name, in the order of modules; those of draft heads too."""
    return [module for module in built.modules() if isinstance(module, TopKRouter)]


def forward(built: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """`[B, S, V]` logits, or with draft heads `[B, S]` losses; causal attention over whole rows."""
    rows, columns = input_ids.shape
    later = torch.ones(1, 1, columns, columns).triu(1).bool()
    labels = input_ids if built.config.mtp_num_layers else None
    return built(input_ids, torch.arange(columns).expand(rows, columns), later, labels=labels)


@contextmanager
def watched(built: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What routers hand to the dispatcher: a list of `[N, E]` bool maps, one for each call, in the order of calls."""
    maps: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, output: maps.append(output[1].clone()))
        for router in routers_of(built)
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def sequence_major(rows: np.ndarray) -> np.ndarray:
    """`[B, S, ...]` as routers see it, by loops: token (s, b) is row s * B + b."""
    batch, columns = rows.shape[:2]
    return np.stack([rows[b, s] for s in range(columns) for b in range(batch)])


def one_hot(ids_NK: np.ndarray) -> torch.Tensor:
    """`[N, E]` bool."""
    chosen = torch.zeros(len(ids_NK), EXPERTS, dtype=torch.bool)
    for token, ids in enumerate(ids_NK):
        chosen[token, [int(expert) for expert in ids]] = True
    return chosen


def trace_of(tokens: np.ndarray, seed: int, layout: MoeLayout = LAYOUT) -> RoutingTrace:
    """Random routes for all tokens but the last."""
    draws = np.random.default_rng(seed)
    ids = [[draws.permutation(layout.num_experts)[: layout.top_k] for _ in layout.layers] for _ in tokens[1:]]
    shape = (len(tokens) - 1, layout.num_layers, layout.top_k)
    return RoutingTrace.build(np.array(ids, np.int64).reshape(shape), layout, tokens)


def router_gradients(built: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of the decoder's routers, which are reset."""
    gradients = []
    for router in routers_of(built)[: len(LAYERS)]:
        assert router.weight.grad is not None
        gradients.append(router.weight.grad.clone())
    built.zero_grad()
    return gradients
