"""What makes a dye of an architecture: the names its config has for the same numbers. One row each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moetrace.trace import Order


@dataclass(frozen=True)
class DyeFamily:
    """One architecture.

    Attributes:
        experts, top_k, intermediate: its config's names of E, K and the width of an expert.
        dense_first: its name for the number of dense layers before the first MoE layer; "mlp_only_layers" lists them;
            "" where every layer has experts.
        shared: its name for shared experts: their number, or, where the name ends in "_size", their width; "".
        groups: its names for the number of groups and of those that a token uses, or ().
        score: what the routers select by: "softmax" or "sigmoid" of the logits (and their bias), or "logits".
        group_score: how many of a group's best scores, summed, rank the group.
        bias: the router's buffer or parameter that is added before the selection, or "".
        order: whether the ids that it chooses are sorted, best first.
        values: further values of its config.
    """

    experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    dense_first: str = ""
    shared: str = ""
    groups: tuple[str, ...] = ()
    score: str = "softmax"
    group_score: int = 2
    bias: str = ""
    order: Order = "rank"
    values: dict[str, Any] = field(default_factory=dict)


_MLA = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""DeepSeek-V2-Lite's latent attention: engines have kernels for these sizes only."""
_NO_DRAFT = {"num_nextn_predict_layers": 0}

FAMILIES: dict[str, DyeFamily] = {
    "deepseek_v2": DyeFamily(
        experts="n_routed_experts",
        dense_first="first_k_dense_replace",
        shared="n_shared_experts",
        groups=("n_group", "topk_group"),
        group_score=1,
        order="set",
        values={**_MLA, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": DyeFamily(
        experts="n_routed_experts",
        dense_first="first_k_dense_replace",
        shared="n_shared_experts",
        groups=("n_group", "topk_group"),
        score="sigmoid",
        bias="e_score_correction_bias",
        order="set",
        values={**_MLA, **_NO_DRAFT, "topk_method": "noaux_tc"},  # where vLLM makes room for the bias
    ),
    "glm4_moe": DyeFamily(
        experts="n_routed_experts",
        dense_first="first_k_dense_replace",
        shared="n_shared_experts",
        groups=("n_group", "topk_group"),
        score="sigmoid",
        bias="e_score_correction_bias",
        order="set",
        values=_NO_DRAFT,
    ),
    "gpt_oss": DyeFamily(experts="num_local_experts", intermediate="intermediate_size", score="logits", bias="bias"),
    "mixtral": DyeFamily(experts="num_local_experts", intermediate="intermediate_size"),
    "olmoe": DyeFamily(intermediate="intermediate_size"),
    "qwen2_moe": DyeFamily(dense_first="mlp_only_layers", shared="shared_expert_intermediate_size"),
    "qwen3_moe": DyeFamily(dense_first="mlp_only_layers", values={"norm_topk_prob": True}),
}
"""The architectures that `moetrace dye` can write, by the `model_type` of their config."""
