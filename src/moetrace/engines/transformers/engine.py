"""`TransformersEngine`: load a checkpoint, generate with continuous batching, return tokens and routes."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, PreTrainedModel

from moetrace.engines.base import EngineConfig, FinishReason, GenerateResult, SamplingParams, check_request
from moetrace.engines.transformers import sampling as sampler
from moetrace.engines.transformers.capture import CaptureCounts, StepCapture
from moetrace.errors import EngineError, NotMoeError, RequestError
from moetrace.layout import MoeLayout
from moetrace.routers import config_layout
from moetrace.trace import RoutingTrace, WeightSpan

logger = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class _Pending:
    future: Future[GenerateResult]
    return_routes: bool
    eos_token_ids: frozenset[int]


class TransformersEngine:
    """transformers' continuous batching behind the `Engine` contract.

    Args:
        model: a causal language model of transformers, on its device, in eval mode or not.
        config: the knobs.

    Raises:
        NotMoeError, UnsupportedRouterError: capture is on and the model cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.name = f"transformers {transformers.__version__}"
        text_config = model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        self._eos_token_ids = _eos_token_ids(model)
        window = _window(text_config, config)
        self._manager: Any = model.init_continuous_batching(  # type: ignore[operator]
            generation_config=sampler.generation_config(self.vocab_size, self._eos_token_ids),
            continuous_batching_config=_batching_config(model.device, window, config),
        )
        untruncated = sampler.extend_processors(self._manager)
        processor = self._manager.batch_processor = self._manager._create_batch_processor()
        sampler.take_untruncated_logprobs(processor.model_runner, untruncated)
        self._capture: StepCapture | None = None
        if config.enable_return_routed_experts:
            self._capture = StepCapture(model, processor)
            with self._capture.active():
                self._manager.warmup()
            self._capture.attach()
        else:
            self._manager.warmup()
        cache = processor.cache
        self._cache_tokens = cache.num_blocks * _page_size(self._manager.continuous_batching_config)
        self.max_model_len = min(window, self._cache_tokens)
        self._ids = itertools.count()
        self._pending: dict[str, _Pending] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._manager.start()
        self._deliverer = threading.Thread(target=self._deliver, name="moetrace-deliver", daemon=True)
        self._deliverer.start()

    @classmethod
    def load(cls, path: str, config: EngineConfig | None = None) -> TransformersEngine:
        """Load a checkpoint folder (or a model name transformers can resolve) and start.

        Raises:
            EngineError: the path is no checkpoint, or a knob is out of range.
            NotMoeError: capture is on and the model is dense; said before any weight is loaded.
        """
        config = config or EngineConfig()
        began = time.perf_counter()
        model = load_model(path, config, require_moe=config.enable_return_routed_experts)
        engine = cls(model, config)
        logger.info("%s is ready after %.1f s: %s", path, time.perf_counter() - began, engine.describe())
        return engine

    @staticmethod
    def tokenizer(path: str) -> Any | None:
        """The checkpoint's tokenizer, or None where it has none."""
        try:
            return AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            logger.warning("%s has no usable tokenizer; serving token ids only (%s)", path, str(error).split("\n")[0])
            return None

    @property
    def layout(self) -> MoeLayout | None:
        """The MoE layout where routes are captured, else None."""
        return self._capture.layout if self._capture else None

    @property
    def capture_counts(self) -> CaptureCounts | None:
        """What capture did so far, or None when it is off."""
        return self._capture.counts if self._capture else None

    def describe(self) -> str:
        """One line for the log."""
        layout = self.layout
        routes = f"routes of {layout.num_layers} MoE layers, {layout.row_bytes} B a row" if layout else "no capture"
        device = self._manager.model.device
        return f"{device}, window {self.max_model_len}, KV cache {self._cache_tokens} tokens, {routes}"

    def submit(
        self, prompt_tokens: Sequence[int], sampling: SamplingParams, *, return_routes: bool = False
    ) -> Future[GenerateResult]:
        """Queue one request; see `Engine.submit`."""
        check_request(self, prompt_tokens, sampling, return_routes)
        eos_token_ids = [] if sampling.ignore_eos else self._eos_token_ids
        pending = _Pending(Future(), return_routes, frozenset(eos_token_ids))
        with self._lock:
            if self._closing or not self.is_healthy():
                raise EngineError("the engine has stopped", fix="Restart the server; its log says why it stopped.")
            request_id = f"request-{next(self._ids)}"
            self._pending[request_id] = pending
        self._manager.add_request(
            list(prompt_tokens),
            request_id=request_id,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=eos_token_ids or -1,
            **sampler.request_kwargs(sampling, self.vocab_size),
        )
        return pending.future

    def is_healthy(self) -> bool:
        """True while the generation thread lives."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def close(self) -> None:
        """Finish what is queued, stop, and leave the model as it was."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._manager.stop(block=True)
        self._deliverer.join()
        if self._capture:
            self._capture.detach()

    def _deliver(self) -> None:
        """Hand finished requests to their futures, off the generation thread."""
        while True:
            output = self._manager.get_result(timeout=0.05)
            if output is not None:
                if output.is_finished():
                    self._finish(output)
            elif not self.is_healthy():
                break
        self._fail_pending(EngineError("the engine stopped before this request was done", fix="Send it again."))

    def _finish(self, output: Any) -> None:
        with self._lock:
            pending = self._pending.pop(output.request_id, None)
        if pending is None:
            return
        try:
            if output.error is not None:
                raise RequestError(f"the engine failed this request ({output.error})")
            pending.future.set_result(self._result(output, pending))
        except Exception as error:  # one request's failure must reach its client, and no other
            pending.future.set_exception(error)

    def _result(self, output: Any, pending: _Pending) -> GenerateResult:
        prompt, generated = list(output.prompt_ids), list(output.generated_tokens)
        reason: FinishReason = "stop" if generated and generated[-1] in pending.eos_token_ids else "length"
        trace = None
        if self._capture:
            experts_TLK, valid_T = self._capture.collect(output.request_id, len(prompt) + len(generated) - 1)
            if pending.return_routes:
                trace = RoutingTrace.build(
                    experts_TLK,
                    self._capture.layout,
                    prompt + generated,
                    valid_T=valid_T,
                    weight_spans=[WeightSpan(0, self.config.weight_version)],
                    order=self._capture.order,
                    fingerprint=self._capture.fingerprint,
                    engine=self.name,
                )
        return GenerateResult(prompt, generated, list(output.logprobs), reason, trace)

    def _fail_pending(self, error: EngineError) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for request in pending.values():
            request.future.set_exception(error)


def load_model(path: str, config: EngineConfig, *, require_moe: bool) -> PreTrainedModel:
    """Load a causal language model for an engine or a trainer; see `TransformersEngine.load` for errors."""
    if config.dtype not in _DTYPES:
        raise EngineError("dtype is unknown", expected=" or ".join(_DTYPES), got=config.dtype)
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
    except (OSError, ValueError, KeyError) as error:
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
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=config.dtype, **optional)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise EngineError(f"cannot load the model {path!r} ({error})") from error
    return model.to(_device(config.device)).eval()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {name!r} cannot be used ({error})", fix="Pass --device cpu.") from error


def _eos_token_ids(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _window(text_config: Any, config: EngineConfig) -> int:
    """Longest sequence: the model's window, or less where the user asked for less."""
    window, asked = getattr(text_config, "max_position_embeddings", None), config.max_model_len
    if asked is None:
        if window is None:
            raise EngineError("the model states no window", fix="Pass --max-model-len.")
        return int(window)
    if asked < 2 or (window is not None and asked > window):
        raise EngineError("max_model_len is out of range", expected=f"2 <= max_model_len <= {window}", got=asked)
    return asked


def _batching_config(device: torch.device, window: int, config: EngineConfig) -> ContinuousBatchingConfig:
    """Sized to the model on CPU (a cache that takes the machine's memory helps nobody there), by memory on CUDA."""
    on_cpu = device.type == "cpu"
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
    }
    known = ContinuousBatchingConfig.__dataclass_fields__
    if "page_size" in known:  # 5.18 and later call it so
        values["page_size"] = values.pop("block_size")
    return ContinuousBatchingConfig(**{name: value for name, value in values.items() if value is not None})


def _page_size(batching_config: Any) -> int:
    return getattr(batching_config, "page_size", None) or batching_config.block_size
