"""The knobs of the embedded engine. Imports no engine and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from moetrace.errors import EngineError
from moetrace.ranges import require_ranges

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_PLANS = ("none", "tp", "ep")


@dataclass(frozen=True)
class EngineConfig:
    """The knobs of the embedded engine. The command line reads names, defaults and help from here.

    Raises:
        EngineError: a value is out of range, or none that is known.
    """

    enable_return_routed_experts: bool = field(
        default=False, metadata={"help": "record the experts of every token, so that requests can ask for them"}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16"})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda or cuda:N"})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": "auto (transformers' choice), sdpa, eager or flash_attention_N"},
    )
    experts_implementation: str = field(
        default="auto", metadata={"help": "auto (transformers' choice), eager, batched_mm or grouped_mm"}
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest sequence, prompt and output; default: the model's window"}
    )
    kv_cache_tokens: int | None = field(
        default=None, metadata={"help": "tokens the KV cache holds; default: 16 windows on CPU, by free memory on CUDA"}
    )
    page_size: int | None = field(
        default=None,
        metadata={"help": "tokens of one KV page, the unit of sharing; default: 32 on CPU, 256 on CUDA"},
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of one step; longer prompts come in chunks; default: 512 on CPU"},
    )
    max_running_requests: int | None = field(
        default=None, metadata={"help": "most requests of one step; default: 64 on CPU, 1024 on CUDA"}
    )
    cpu_offload_gib: float = field(
        default=0.0,
        metadata={"help": "host memory for the KV cache of preempted requests, GPU only; default: they are recomputed"},
    )
    prefix_sharing: bool = field(default=True, metadata={"help": "reuse the KV pages of equal prompt prefixes"})
    compile_level: int = field(
        default=0, metadata={"help": "0: none; 1 to 3: torch.compile, as transformers' default_compile_level"}
    )
    parallel: str = field(
        default="none",
        metadata={"help": "none, tp or ep: transformers' tensor- or expert-parallel plan over torchrun's processes"},
    )
    weight_version: str = field(default="0", metadata={"help": "name of the weights, recorded with every row"})
    seed: int | None = field(default=None, metadata={"help": "seed of the sampler; default: random"})

    def __post_init__(self) -> None:
        for name, known in (("dtype", _DTYPES), ("parallel", _PLANS)):
            if getattr(self, name) not in known:
                raise EngineError(f"{name} is unknown", expected=" or ".join(known), got=getattr(self, name))
        require_ranges(
            self,
            EngineError,
            max_model_len=2,
            kv_cache_tokens=1,
            page_size=4,  # transformers' own least
            max_batch_tokens=1,
            max_running_requests=1,
            cpu_offload_gib=0,
            compile_level=(0, 3),
            seed=(-(2**63), 2**63 - 1),
        )
