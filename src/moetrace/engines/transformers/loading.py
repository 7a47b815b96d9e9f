"""From a path and knobs to a model on its device, and to the knobs of continuous batching."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, PreTrainedModel

from moetrace.engines.config import EngineConfig
from moetrace.errors import EngineError, NotMoeError, WeightsError
from moetrace.routers import config_layout

logger = logging.getLogger(__name__)


def load_tokenizer(path: str) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        logger.warning("%s has no usable tokenizer; serving token ids only (%s)", path, str(error).split("\n")[0])
        return None


def load_model(path: str, config: EngineConfig, *, require_moe: bool, device: str | None = None) -> PreTrainedModel:
    """Load a causal language model for an engine or a trainer; see `TransformersEngine.load` for errors.

    Args:
        path: checkpoint folder, or a name that transformers can resolve.
        config: its knobs for loading count here.
        require_moe: refuse a dense model before its weights are loaded.
        device: where to, instead of `config.device`.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise EngineError(
            f"there is no model at {path!r}",
            expected="a checkpoint folder with config.json",
            got="a folder without one" if Path(path).is_dir() else "no such folder",
            fix="Pass the folder that save_pretrained wrote.",
        )
    path = str(Path(path).expanduser()) if looks_local else path
    try:
        model_config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise EngineError(f"cannot read the model {path!r} ({error})") from error
    if require_moe:
        try:
            config_layout(model_config)
        except NotMoeError as error:
            raise NotMoeError(
                f"{path!r} is a dense model: there are no routed experts to return",
                expected="a Mixture-of-Experts checkpoint",
                got=model_config.model_type,
                fix="Start without --enable-return-routed-experts.",
            ) from error
    optional = {
        name: value
        for name in ("attn_implementation", "experts_implementation")
        if (value := getattr(config, name)) != "auto"
    }
    if config.parallel != "none" and device is None:
        optional["distributed_config"] = _parallel_plan(config.parallel)
    model = _from_pretrained(AutoModelForCausalLM, path, path, dtype=config.dtype, **optional)
    if "distributed_config" not in optional:  # else every rank has its part where it belongs
        model = model.to(_device(device or config.device))
    return model.eval()


def load_weights(path: str, model: Any, config: EngineConfig) -> dict[str, torch.Tensor]:
    """The state dict of `model` with the weights of a checkpoint folder or of one safetensors file, on the host.

    Nothing is looked for elsewhere: a name that is no place here is not one on a hub.

    Raises:
        WeightsError: they cannot be read, or are not all there.
    """
    try:
        place = Path(path).expanduser().absolute()
        if place.is_dir():
            return load_model(str(place), config, require_moe=False, device="cpu").state_dict()
        with safe_open(place, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = {"config": model.config, "dtype": model.dtype}
        return _from_pretrained(type(model), path, None, state_dict=tensors, **own).state_dict()
    except (EngineError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"cannot read the new weights from {path!r}; the old ones stay",
            expected="a checkpoint folder of this model, or a safetensors file with all of its tensors",
            got=error,
        ) from error


def _from_pretrained(kind: Any, name: str, path: str | None, **options: Any) -> Any:
    try:
        model, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise EngineError(f"cannot load the model {name!r} ({error})") from error
    if report["missing_keys"]:  # transformers would go on with random numbers
        raise EngineError(
            f"{name!r} lacks weights of the model",
            expected="all of them",
            got=f"{len(report['missing_keys'])} missing, among them {min(report['missing_keys'])}",
            fix="Save the whole model with save_pretrained.",
        )
    return model


def _parallel_plan(plan: str) -> Any:
    """transformers' plan over all processes that torchrun started."""
    from transformers.distributed import DistributedConfig

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise EngineError(
            f"parallel={plan!r} needs several processes",
            expected="torchrun --nproc-per-node N -m moetrace ...",
            got=f"WORLD_SIZE={size}",
        )
    sizes: dict[str, Any] = {}
    if plan == "ep":  # 5.17 has a switch, later releases a size
        by_size = "ep_size" in DistributedConfig.__dataclass_fields__
        sizes = {"ep_size": size} if by_size else {"enable_expert_parallel": True}
    return DistributedConfig(tp_size=size, tp_plan="auto", **sizes)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {name!r} cannot be used ({error})", fix="Pass --device cpu.") from error


def eos_token_ids(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def window_of(text_config: Any, config: EngineConfig) -> int:
    """Longest sequence: the model's window, or less where the user asked for less."""
    window, asked = getattr(text_config, "max_position_embeddings", None), config.max_model_len
    if asked is None:
        if window is None:
            raise EngineError("the model states no window", fix="Pass --max-model-len.")
        return int(window)
    if window is not None and asked > window:
        raise EngineError("max_model_len is out of range", expected=f"at most {window}, the model's", got=asked)
    return asked


def batching_config(device: torch.device, window: int, config: EngineConfig) -> ContinuousBatchingConfig:
    """Sized to the model on CPU (a cache that takes the machine's memory helps nobody there), by memory on CUDA."""
    on_cpu = device.type == "cpu"
    if on_cpu and config.cpu_offload_gib:
        raise EngineError("cpu_offload_gib needs a GPU", expected="0 on a CPU", got=config.cpu_offload_gib)
    page_size = config.page_size or (32 if on_cpu else 256)
    cache_tokens = config.kv_cache_tokens or (min(16 * window, 1 << 16) if on_cpu else None)
    values: dict[str, Any] = {
        "block_size": page_size,
        "num_blocks": None if cache_tokens is None else -(-cache_tokens // page_size),
        "max_batch_tokens": config.max_batch_tokens or (512 if on_cpu else None),
        "max_requests_per_batch": config.max_running_requests or (64 if on_cpu else None),
        "allow_block_sharing": config.prefix_sharing,
        "return_logprobs": True,
        "seed": config.seed,
        "per_request_processors": True,
        "default_compile_level": config.compile_level,
        "cpu_offload_space": config.cpu_offload_gib,
    }
    if on_cpu:  # by itself it asks whether the machine has a GPU, not where the model is
        values |= {"use_cuda_graph": False, "use_async_batching": False}
    known = ContinuousBatchingConfig.__dataclass_fields__
    if "page_size" in known:  # 5.18 and later call it so
        values["page_size"] = values.pop("block_size")
    return ContinuousBatchingConfig(**{name: value for name, value in values.items() if value is not None})


@contextmanager
def attention_kept(model: PreTrainedModel) -> Iterator[None]:
    """Where flash attention is installed, continuous batching switches every model to it, also those it cannot run:
    models on a CPU, and in float32. Those keep their attention."""
    if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16):
        yield
        return
    model._supports_flash_attn = False  # on this instance: what the switch looks at
    try:
        yield
    finally:
        del model._supports_flash_attn


def page_size_of(batching_config: Any) -> int:
    return getattr(batching_config, "page_size", None) or batching_config.block_size
