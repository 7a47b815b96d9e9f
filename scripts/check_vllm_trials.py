"""What `check_vllm.py` tries: checkpoints, and the ways to run vLLM on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moetrace.conformance.dye.options import DyeOptions
from moetrace.conformance.suite.session import Plan

CHECKPOINTS: dict[str, tuple[str, DyeOptions]] = {
    "qwen3_moe": ("qwen3_moe", DyeOptions(num_experts=128, num_layers=5, dense_first=1)),
    "qwen3_moe, new weights": ("qwen3_moe", DyeOptions(num_experts=128, num_layers=5, dense_first=1, weight_version=1)),
    "mixtral": ("mixtral", DyeOptions(num_experts=16, top_k=2, num_layers=6, vocab_size=9216)),
    "deepseek_v3": (
        "deepseek_v3",
        DyeOptions(num_layers=5, dense_first=1, num_groups=8, top_groups=4, bias=True, shared_experts=1),
    ),
    "glm4_moe": ("glm4_moe", DyeOptions(num_experts=128, num_layers=5, dense_first=1, bias=True, shared_experts=1)),
    "gpt_oss": ("gpt_oss", DyeOptions(num_experts=32, top_k=4, num_layers=6)),
    "256 experts": ("qwen3_moe", DyeOptions(num_experts=256)),
    "257 experts": ("qwen3_moe", DyeOptions(num_experts=257, dense_first=1)),
    "deepseek_v2": (
        "deepseek_v2",
        DyeOptions(top_k=6, num_layers=5, dense_first=1, num_groups=8, top_groups=3, shared_experts=2),
    ),
    "qwen2_moe": ("qwen2_moe", DyeOptions(num_experts=60, top_k=4, num_layers=5, dense_first=1)),
    "olmoe": ("olmoe", DyeOptions()),
}
"""Architecture and options by name. Those with a dense first layer show whether layers are counted rightly."""

_COMMON: dict[str, Any] = {
    "enable_return_routed_experts": True,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_seqs": 64,
    "max_cudagraph_capture_size": 64,
    # Several engines share the GPU: each takes what it needs and measures nothing.
    "gpu_memory_utilization": 0.02,
    "kv_cache_memory_bytes": 2 << 30,
}
_WINDOWS = {"roomy": 8448, "starved": 4352}
_CHUNKS = {"roomy": 512, "starved": 256}
_CACHE_TOKENS = {"roomy": 65536, "starved": 5120}
"""Both prefill in chunks. The starved one has room for one long sequence, or ten of those that press on it."""


@dataclass(frozen=True)
class Trial:
    """One engine, started once.

    Attributes:
        checkpoint: a key of `CHECKPOINTS`.
        cache: a key of the tables above.
        form: over HTTP, or in process.
        endpoint: which one is asked over HTTP; "" lets the suite choose.
        newer: a second checkpoint, to update the weights to.
        further: engine arguments beside the common ones.
    """

    checkpoint: str
    cache: Literal["roomy", "starved"]
    form: Literal["HTTP", "in process"] = "HTTP"
    endpoint: str = ""
    newer: str = ""
    further: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people, and for the results."""
        further = [f"{key}={value}" for key, value in self.further.items()]
        return ", ".join(filter(None, [self.checkpoint, self.form, self.cache, self.endpoint, *further]))

    @property
    def slug(self) -> str:
        """For files."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """Engine arguments, by their names in Python."""
        block = 64 if self.checkpoint.startswith("deepseek") else 16  # what kernels for latent attention take
        sizes = {
            "max_model_len": _WINDOWS[self.cache],
            "max_num_batched_tokens": _CHUNKS[self.cache],
            "block_size": block,
            "num_gpu_blocks_override": _CACHE_TOKENS[self.cache] // block,
        }
        return _COMMON | sizes | self.further

    @property
    def plan(self) -> Plan:
        """How much the suite asks. Every trial has prompts of its own."""
        return Plan(
            requests=256,
            max_tokens=_WINDOWS[self.cache],
            flood_tokens=16384,
            pressure=64,
            pressure_tokens=384,
            timeout=240,
            seed=TRIALS.index(self),
        )


TRIALS: list[Trial] = [
    Trial("qwen3_moe", "starved", "in process", newer="qwen3_moe, new weights"),
    Trial("qwen3_moe", "starved"),
    Trial("mixtral", "starved"),
    Trial("deepseek_v3", "starved"),
    Trial("glm4_moe", "starved"),
    Trial("gpt_oss", "starved"),
    Trial("257 experts", "starved"),
    Trial("256 experts", "starved"),
    Trial("qwen3_moe", "starved", "in process", newer="qwen3_moe, new weights", further={"async_scheduling": False}),
    Trial("qwen3_moe", "roomy"),
    Trial("mixtral", "roomy", "in process"),
    Trial("deepseek_v3", "roomy", "in process"),
    Trial("gpt_oss", "roomy", "in process"),
    Trial("glm4_moe", "roomy"),
    Trial("257 experts", "roomy"),
    Trial("256 experts", "roomy"),
    Trial("qwen3_moe", "starved", endpoint="/v1/completions"),
    Trial("qwen3_moe", "roomy", further={"tokens_only": True}),
    Trial("deepseek_v2", "starved"),
    Trial("qwen2_moe", "starved"),
    Trial("olmoe", "starved"),
]
"""In the order they start: what matters most first. `tokens_only` serves an endpoint that aborts requests."""
