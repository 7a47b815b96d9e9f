"""Configs of tiny models: one table of attributes for all families, and one row for each family that needs more.

Only attributes that a config class has are used, so rows may name things of newer or older transformers releases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from moetrace.errors import RouterError

VOCABULARY = 96

SIZES: dict[str, Any] = {
    # size of the model
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "ffn_hidden_size": 32,
    "dense_intermediate_size": 32,
    "prefix_dense_intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "d_ff": 32,
    "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "n_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    # attention
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "rel_extent": 16,
    "d_kv": 8,
    "kv_channels": 8,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    # experts
    "router_hidden_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_hidden_size": 16,
    "expert_ffn_hidden_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
    # shared experts
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "share_expert_dim": 16,
    # which layers are dense: the first
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
}
"""Config attribute -> its value in a tiny model, for whichever config has it."""

LATENT_ATTENTION: dict[str, Any] = {"num_key_value_heads": 4}
"""For configs with a `kv_lora_rank`, which have one key head for each attention head."""

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""None where the config allows it, else 0: no token of a tiny model has a meaning."""

TOWER_SIZES: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "mlp_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "blank_token_id": 0,
    "image_size": 224,
    "out_hidden_size": 32,
    "output_dim": 32,
    "text_hidden_size": 32,
    "audio_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "downsample_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}
"""The same for vision and audio towers, which a text-only forward builds but does not run."""

FIRST_DENSE = ["dense", "sparse", "sparse", "sparse"]

FAMILIES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "BeamConfig": {"mlp_layer_types": FIRST_DENSE},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
    "DeepseekOcr2TextConfig": {"num_key_value_heads": 4, "mlp_layer_types": FIRST_DENSE},
    "DeepseekV4Config": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "DogeConfig": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["sparse"], "num_local_experts": 4, "moe_intermediate_size": 16},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "Gemma4TextConfig": {"enable_moe_block": True, "pad_token_id": 0},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "Glm5NextTextConfig": {
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": FIRST_DENSE,
    },
    "Glm5NextVisionConfig": {"intermediate_size": 32},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "InklingVisionConfig": {"patch_size": 2, "temporal_patch_size": 2, "num_hidden_layers": 4},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "KimiLinearConfig": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "LongcatFlashConfig": {"zero_expert_num": 4},
    "Mistral4Config": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
        },
    },
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]},
    "MuseSparkConfig": {"projector_hidden_size": 32},
    "NemotronHConfig": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"],
    },
    "NemotronH_Omni_Reasoning_V3_Config": {"projector_hidden_size": 32},
    "NllbMoeConfig": {"pad_token_id": 0},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "RadioConfig": {"video_temporal_patch_size": 2},
    "Step3p7TextConfig": {"mlp_layer_types": FIRST_DENSE},
    "UnlimitedOcrTextConfig": {"num_key_value_heads": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""Name of a config class -> what it needs beyond the sizes."""

SPREADS: tuple[tuple[str, float], ...] = (("embed", 1.0), (".router_mlp.", 0.6), ("", 0.3))
"""Part of a parameter's name -> its standard deviation; the first that occurs counts. Tokens stay apart: none drowns
in what attention mixes into it, and the logits of a router spread over all experts."""


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of the sizes above; changes go to the part that describes the text decoder.

    Raises:
        RouterError: a change names nothing that the text decoder's config has.
    """
    default = config_class()
    left = dict(changes)
    config = _shrunk(default, default.get_text_config(decoder=True), left)
    if left:
        raise RouterError(
            f"{config_class.__name__} has no such attribute in its text decoder's part",
            expected="attributes of the config",
            got=sorted(left),
        )
    return config


def _shrunk(default: PreTrainedConfig, text: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A tiny config of the class of `default`; takes from `changes` what belongs to it."""
    config_class: Any = type(default)
    fields = getattr(config_class, "__dataclass_fields__", {})
    aliases = config_class.attribute_map
    has = {*fields, *aliases, *vars(default)}
    parts = dict(parts_of(default))
    is_text = default is text or (default.model_type == text.model_type and not parts)
    if is_text:  # and so are its parts, if it has any
        sizes = SIZES | (LATENT_ATTENTION if "kv_lora_rank" in has else {})
        text = next(iter(parts.values()), text)
    else:
        sizes = {} if path_to(default, text) else TOWER_SIZES
    settings: dict[str, Any] = {name: value for name, value in sizes.items() if name in has}
    for name in SPECIAL_TOKENS:
        if name in fields:
            settings[name] = None if "None" in str(fields[name].type) else 0
    settings |= {name: _shrunk(part, text, changes) for name, part in parts.items()}
    settings = {aliases.get(name, name): value for name, value in settings.items()}
    settings |= {aliases.get(name, name): value for name, value in FAMILIES.get(config_class.__name__, {}).items()}
    if is_text:
        settings |= {aliases.get(name, name): changes.pop(name) for name in list(changes) if name in has}
    return config_class(**settings)


def path_to(config: PreTrainedConfig, text: PreTrainedConfig) -> str:
    """Attribute path from a config to its text config; empty where they are the same."""
    for name, part in parts_of(config):
        if part is text:
            return name
        if path := path_to(part, text):
            return f"{name}.{path}"
    return ""


def parts_of(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """(name, config) of each config inside a config."""
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield name, part
