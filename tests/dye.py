"""A dye checkpoint: a real Qwen3-MoE whose routes and next tokens are known in closed form.

Vocabulary = hidden size = d, one-hot embeddings, attention output and all MLP outputs zero: the residual stream of a
token is its own embedding in every layer, whatever came before it. Router weights then send token v to experts that we
choose, by a wide margin, and the head maps v to v + 1. Every misplaced row shows as a wrong id at a known place.

Axes: T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

from copy import deepcopy
from math import gcd
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


class Dye:
    """The closed form, and the model that follows it."""

    def __init__(
        self,
        vocab: int = 96,
        num_experts: int = 32,
        top_k: int = 4,
        num_layers: int = 4,
        window: int = 512,
        head_dim: int = 8,
    ) -> None:
        self.vocab, self.num_experts, self.top_k = vocab, num_experts, top_k
        self.layers = tuple(range(1, num_layers))  # the first layer is dense
        values: dict[str, Any] = dict(  # noqa: C408
            vocab_size=vocab,
            hidden_size=vocab,
            num_hidden_layers=num_layers,
            mlp_only_layers=[0],
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=window,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.config = Qwen3MoeConfig(**values)

    def route(self, token: int, layer: int) -> list[int]:
        """Expert ids, best first, of a token at an absolute decoder layer."""
        strides = [stride for stride in range(1, self.num_experts) if gcd(stride, self.num_experts) == 1]
        stride = strides[(token // self.num_experts + layer) % len(strides)]
        return [(token + 13 * layer + k * stride) % self.num_experts for k in range(self.top_k)]

    def routes(self, tokens: list[int]) -> np.ndarray:
        """`[T, L, K]` of a sequence of input tokens."""
        return np.array([[self.route(token, layer) for layer in self.layers] for token in tokens])

    def continuation(self, token: int, count: int) -> list[int]:
        """The `count` tokens that follow `token`."""
        return [(token + 1 + i) % self.vocab for i in range(count)]

    def model(self, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
        """A fresh model with dyed weights."""
        model = Qwen3MoeForCausalLM(deepcopy(self.config)).eval()  # trainers write to a config
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    parameter.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(self.vocab))
            # lm_head row v + 1 reads embedding v; RMSNorm has made that entry sqrt(d).
            model.lm_head.weight.copy_(torch.eye(self.vocab).roll(1, dims=0) * 4)
            for layer in self.layers:
                gate = model.model.layers[layer].mlp.gate.weight  # [E, d]
                gate.zero_()
                for token in range(self.vocab):
                    for rank, expert in enumerate(self.route(token, layer)):
                        gate[expert, token] = 0.25 * (self.top_k - rank)
        return model.to(dtype)
