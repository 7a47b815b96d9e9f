"""The small model in its two numerics: that of the trainer, and that of the rollout engine.

Trainer: float32 weights, autocast to bfloat16, eager attention over padded batches, every expert on every token.
Engine: weights rounded to bfloat16 (experts and attention to float8 first, where asked), paged attention, grouped
experts, one token a step with a KV cache.

Axes: B sequences, S columns, N = B * S tokens, D hidden, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from task import END, PAD, VOCABULARY, Batch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


@dataclass(frozen=True)
class Shape:
    """Sizes of the small model; the defaults have 28 million parameters."""

    layers: int = 8
    hidden: int = 256
    heads: int = 8
    experts: int = 32
    top_k: int = 4
    expert_width: int = 128

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            head_dim=64,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width,
            norm_topk_prob=True,
            max_position_embeddings=256,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )


def dense_experts(experts: Any, hidden_ND: torch.Tensor, index_NK: torch.Tensor, weight_NK: torch.Tensor) -> Any:
    """Every expert on every token, those not chosen weighted zero: few kernels, and sums in another order."""
    weight_NE = weight_NK.new_zeros(len(hidden_ND), experts.num_experts).scatter(1, index_NK, weight_NK)
    gate_ENF, up_ENF = torch.matmul(hidden_ND, experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    out_END = torch.matmul(experts.act_fn(gate_ENF) * up_ENF, experts.down_proj.transpose(1, 2))
    return (out_END * weight_NE.T.unsqueeze(-1)).sum(0).to(hidden_ND.dtype)


ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)


def build(shape: Shape, device: str, *, for_rollout: bool) -> Any:
    """The model with fresh weights, in one of its two numerics."""
    if for_rollout:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        return model.to(device).eval()
    own = {"attn_implementation": "eager", "experts_implementation": "dense"}
    return AutoModelForCausalLM.from_config(shape.config(), dtype=torch.float32, **own).to(device).train()


def forward(model: Any, batch: Batch, **options: Any) -> Any:
    """One forward in the trainer's numerics."""
    ids_BS, mask_BS = batch.ids_BS.to(model.device), batch.mask_BS.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        return model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, **options)


def logprobs(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`[B, S]` natural logarithms of the probability of token s + 1 at temperature 1; zero in the last column."""
    next_BS = batch.ids_BS[:, 1:].to(logits.device)
    of_next = logits[:, :-1].float().log_softmax(-1).gather(-1, next_BS[..., None])[..., 0]
    return nn.functional.pad(of_next, (0, 1))


@torch.no_grad()
def expected_exact_match(model: Any, batch: Batch) -> float:
    """The probability that a sample is right, mean over prompts; no sampling: `batch` holds the right answers."""
    logprobs_BS = logprobs(forward(model, batch).logits, batch)
    return float((logprobs_BS * batch.answer_BS.to(model.device)).sum(1).exp().mean())


def rollout_weights(trainer: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """What the engine is given: the trainer's weights, or those with experts and attention rounded to float8.

    float8 is e4m3 with one scale for each output row, as engines store it; the engine's arithmetic stays bfloat16, so
    this stands for the weights' share of an fp8 rollout only.
    """
    weights = {name: value.detach() for name, value in trainer.state_dict().items()}
    if kind == "float8":
        for name, value in weights.items():
            if "experts." in name or (".self_attn." in name and name.endswith("proj.weight")):
                scale = value.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
                weights[name] = (value / scale).to(torch.float8_e4m3fn).to(value.dtype) * scale
    return weights
