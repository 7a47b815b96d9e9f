"""`TransformersEngine`: load a checkpoint, generate with continuous batching, return tokens and routes."""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from moetrace.engines.base import CaptureState, check_request, require_capture
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import Generation, Progress, SamplingParams
from moetrace.engines.transformers import loading
from moetrace.engines.transformers.capture import StepCapture
from moetrace.engines.transformers.continuous import BatchLoop
from moetrace.engines.transformers.delivery import Delivery
from moetrace.engines.transformers.pages import longest_sequence, name_of
from moetrace.engines.transformers.pending import NewWeights, Pending
from moetrace.engines.transformers.prompt_scores import PromptScorer
from moetrace.engines.transformers.sampling import Sampler, generation_config
from moetrace.engines.transformers.stopping import Stops
from moetrace.engines.transformers.weights import apply_weights, check_weights
from moetrace.errors import CaptureOffError, EngineError, RequestError, RouterError
from moetrace.layout import MoeLayout
from moetrace.routers import find_routers
from moetrace.trace import RoutingTrace

logger = logging.getLogger(__name__)


class TransformersEngine:
    """transformers' continuous batching behind the `Engine` contract.

    Args:
        model: a causal language model of transformers, on its device, in eval mode or not.
        config: the knobs.
        tokenizer: needed for stop texts only.

    Raises:
        NotMoeError, UnsupportedRouterError, CaptureError: capture is on and the model cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig | None = None, tokenizer: Any = None) -> None:
        self.config = config = config or EngineConfig()
        self.name = f"transformers {transformers.__version__}"
        text_config = model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        self.num_layers: int = text_config.num_hidden_layers
        self._model, self._tokenizer = model, tokenizer
        self._eos_token_ids = loading.eos_token_ids(model)
        window = loading.window_of(text_config, config)
        with loading.attention_kept(model):
            self._manager: Any = model.init_continuous_batching(  # type: ignore[operator]
                generation_config=generation_config(self.vocab_size, self._eos_token_ids),
                continuous_batching_config=loading.batching_config(model.device, window, config),
            )
        self._sampler = Sampler(self._manager, self.vocab_size, self._eos_token_ids)
        processor = self._manager.batch_processor = self._manager._create_batch_processor()
        self._sampler.attach(processor)
        page_size = loading.page_size_of(self._manager.continuous_batching_config)
        self._cache_tokens = processor.cache.num_blocks * page_size
        self.max_model_len = min(window, longest_sequence(processor.cache, page_size))
        self._loop = BatchLoop(self._manager)
        self._scorer = PromptScorer(self._manager, self._loop)
        self._versions = [config.weight_version]
        self._capture: StepCapture | None = None
        if config.enable_return_routed_experts and self._manager.is_tp_driver:
            self._capture = StepCapture(model, self._loop, self.max_model_len)
        if model.device.type == "cuda":
            gc.collect()  # what engines before this one left must not be freed while CUDA graphs are captured
        self._manager.warmup()
        self._ids = itertools.count()
        self._closing = False
        self._manager.start()
        self._delivery = Delivery(
            self._manager, self._capture, self._scorer, self._versions, self.name, self._loop.at_rest
        )

    @classmethod
    def load(cls, path: str, config: EngineConfig | None = None) -> TransformersEngine:
        """Load a checkpoint folder (or a model name transformers can resolve) and start.

        Raises:
            EngineError: the path is no checkpoint, or a knob is out of range.
            NotMoeError: capture is on and the model is dense; said before any weight is loaded.
        """
        config = config or EngineConfig()
        began = time.perf_counter()
        model = loading.load_model(path, config, require_moe=config.enable_return_routed_experts)
        engine = cls(model, config, cls.tokenizer(path))
        logger.info("%s is ready after %.1f s: %s", path, time.perf_counter() - began, engine.describe())
        return engine

    tokenizer = staticmethod(loading.load_tokenizer)

    @property
    def layout(self) -> MoeLayout | None:
        """The MoE layout where routes are captured, else None."""
        return self._capture.layout if self._capture else None

    @property
    def capture(self) -> CaptureState | None:
        """Where capture stands, or None for an engine that was started without it."""
        if self._capture is None:
            return None
        return CaptureState(
            self._capture.is_on, self._capture.num_slots, self._capture.nbytes, **vars(self._capture.counts)
        )

    @property
    def fingerprint(self) -> str | None:
        """The model's fingerprint where routes are captured, else None."""
        return self._capture.fingerprint if self._capture else None

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and `resume` not since."""
        return self._loop.paused

    @property
    def weight_version(self) -> str:
        """Name of the weights that steps run with now."""
        return self._versions[-1]

    @property
    def is_driver(self) -> bool:
        """True where requests are taken: everywhere but on the other ranks of a parallel plan."""
        return self._manager.is_tp_driver

    def describe(self) -> str:
        """One line for the log."""
        layout = self.layout
        routes = f"routes of {layout.num_layers} MoE layers, {layout.row_bytes} B a row" if layout else "no capture"
        device = self._manager.model.device
        return f"{device}, window {self.max_model_len}, KV cache {self._cache_tokens} tokens, {routes}"

    def submit(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        return_routes: bool = False,
        return_prompt_logprobs: bool = False,
        on_progress: Progress | None = None,
    ) -> Generation:
        """Queue one request; see `Engine.submit`."""
        if return_routes:
            self._require_routers()
        check_request(self, prompt_tokens, sampling, return_routes, return_prompt_logprobs)
        if return_prompt_logprobs:
            self._require_scoring()
        if sampling.stop and self._tokenizer is None:
            raise RequestError("stop texts need a tokenizer, and this engine has none", fix="Pass stop_token_ids.")
        prompt, stop_ids = list(prompt_tokens), list[int]()
        if sampling.min_new_tokens <= 1:
            stop_ids += sampling.stop_token_ids
        if not sampling.ignore_eos:
            stop_ids += self._eos_token_ids
        with self._delivery.lock:
            if self._closing or not self.is_driver or not self.is_healthy():
                raise EngineError(
                    "the engine has stopped" if self.is_driver else "this rank follows rank 0 and takes no requests",
                    fix="Restart the server; its log says why it stopped." if self.is_driver else "Ask rank 0.",
                )
            request_id = f"request-{next(self._ids)}"
            names = [name_of(request_id, number) for number in range(sampling.n)]
            scores = self._scorer.watch(request_id, prompt) if return_prompt_logprobs else None
            futures = []
            for number, name in enumerate(names):
                stops = Stops(self._tokenizer, sampling)
                told = None if on_progress is None else partial(on_progress, number)
                pending = Pending(prompt, sampling, Future(), return_routes, frozenset(stop_ids), stops, told, scores)
                pending.future.set_running_or_notify_cancel()  # from here on, abort ends it, and cancel() does nothing
                futures.append(pending.future)
                self._delivery.pending[name] = pending
                if self._capture and return_routes:
                    self._capture.watch(name)
            self._manager.num_return_sequences = sampling.n  # read by add_request
            self._manager.add_request(
                prompt,
                request_id=request_id,
                max_new_tokens=max(sampling.max_new_tokens, 1),  # a scoring request's one is dropped
                streaming=bool(stops) or on_progress is not None,
                eos_token_id=stop_ids or -1,
                **self._sampler.admit(len(prompt), sampling),
            )
        return Generation(request_id, len(prompt), tuple(futures))

    def read_routes(
        self, generation: Generation, sequence: int, output_tokens: Sequence[int], start: int
    ) -> RoutingTrace | None:
        """Rows of a sequence that still runs; see `Engine.read_routes`."""
        name = name_of(generation.request_id, sequence)
        pending = self._delivery.pending.get(name)
        if self._capture is None or pending is None:
            return None
        tokens = [*pending.prompt, *output_tokens]
        parts = self._between_steps(partial(self._capture.peek, name, start, len(tokens) - 1))
        if parts is None:
            return None
        trace = self._delivery.trace_of(self._capture.assemble(parts, tokens[:-1]), tokens)
        gaps = np.flatnonzero(~trace.valid_T[start:])
        return trace.slice(start, start + int(gaps[0]) if len(gaps) else trace.stop)

    def abort(self, request_id: str | None = None) -> None:
        """End one request or all of them; see `Engine.abort`."""
        with self._delivery.lock:
            for name, pending in self._delivery.pending.items():
                if request_id is None or name == request_id or name.startswith(f"{request_id}__child#"):
                    pending.aborted = True
                    self._manager.cancel_request(name)

    def pause(self) -> None:
        """Launch no step until `resume`; see `Engine.pause`."""
        self._require_one_process("pause")
        with self._delivery.lock:
            if self._closing:  # which finishes what is queued
                raise EngineError("the engine is being closed", fix="Pause before, or let it finish.")
            self._loop.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._loop.resume()

    def update_weights(self, weights: str | Mapping[str, torch.Tensor], version: str) -> None:
        """Replace the weights between two steps, all or none; see `Engine.update_weights`."""
        self._require_one_process("update_weights")
        if isinstance(weights, str):
            weights = loading.load_weights(weights, self._model, self.config)
        checked = check_weights(self._model, weights)

        def apply() -> Callable[[], None]:
            copied = apply_weights(checked)
            self._loop.forget_prefixes()
            self._versions.append(version)
            self._loop.deliver(NewWeights(version))
            if self._capture:
                self._capture.set_version(len(self._versions) - 1)
            return copied

        self._between_steps(apply)()  # then the caller may write to its tensors again

    def start_capture(self) -> None:
        """Record again after `stop_capture`; see `Engine.start_capture`."""
        capture = self._controlled_capture()

        def start() -> None:
            if not capture.is_on:
                self._loop.forget_prefixes()
                capture.start()

        self._between_steps(start)

    def stop_capture(self) -> None:
        """Record nothing from the next step on; see `Engine.stop_capture`."""
        self._between_steps(self._controlled_capture().stop)

    def _require_routers(self) -> None:
        """Raise `CaptureOffError` for a model of which no start of the engine could record routes."""
        if self._capture is None:
            try:
                find_routers(self._model)
            except RouterError as error:
                raise CaptureOffError(
                    f"routed experts were asked for, but none can be recorded ({error.what})", fix="Ask without them."
                ) from error

    def _controlled_capture(self) -> StepCapture:
        self._require_routers()
        require_capture(self.capture)
        self._require_one_process("capture control")
        assert self._capture is not None
        return self._capture

    def is_healthy(self) -> bool:
        """True while the generation thread lives."""
        return self._delivery.is_healthy()

    def close(self) -> None:
        """Finish what is queued, stop, and leave the model as it was. Ranks that follow rank 0 wait for it to stop."""
        with self._delivery.lock:
            if self._closing:
                return
            self._closing = True
        if not self.is_driver:
            self._delivery.join()
        self._loop.resume()
        self._manager.stop(block=True)
        self._delivery.join()
        self._loop.close()
        if self._capture:
            self._capture.close()

    def _between_steps(self, task: Callable[[], Any]) -> Any:
        """Run `task` on the generation thread and wait for its result."""
        done = self._loop.call(task)
        while not done.done():
            if not self.is_healthy():
                raise EngineError("the engine has stopped", fix="Restart the server; its log says why it stopped.")
            wait([done], timeout=1.0)
        return done.result()

    def _require_scoring(self) -> None:
        if self.config.parallel != "none":
            raise RequestError(
                "log-probabilities of the prompt are not supported under a parallel plan: its ranks would run apart",
                expected="parallel='none'",
                got=self.config.parallel,
            )
        self._scorer.require_supported()

    def _require_one_process(self, what: str) -> None:
        if self.config.parallel != "none":
            raise EngineError(
                f"{what} is not supported under a parallel plan: its ranks would fall out of step",
                expected="parallel='none'",
                got=self.config.parallel,
            )
