"""Per-request sampling on top of transformers' continuous batching.

That engine samples every request the same way: greedy or not is one switch for all, a log-probability is taken after
top-k and top-p, and both sort the vocabulary in every step. Here greedy is a per-request choice, log-probabilities are
taken before truncation, and nothing is sorted in a step that no request truncates in: on an H100, batch 256 and a
vocabulary of 152k the sorts are 6 ms a step. A request with a seed draws by noise of its own (see `noise.py`), which is
made in steps that need it only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers.noise import draw_key, gumbel
from moetrace.engines.transformers.pages import sequence_of

_GREEDY, _TRUNCATED, _SEEDED = 1, 2, 4
"""What is special about a request's sampling; bits of its `modes`."""


def generation_config(vocab_size: int, eos_token_ids: list[int]) -> GenerationConfig:
    """A config under which transformers builds its temperature, top-k and top-p processors: their defaults must not be
    neutral, or it leaves them out. Every request brings its own values."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=vocab_size,
        top_p=0.5,
        eos_token_id=eos_token_ids or None,
        max_new_tokens=1,
    )


class _Untruncated:
    """Keeps the logits as they are between temperature and truncation."""

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        return scores


class _Row(ContinuousBatchingLogitsProcessor):
    """Brings one number of each request to the device, for processors that come after it; changes nothing."""

    ignored_kwargs = ()
    values_B: torch.Tensor

    def __init__(self, name: str, numbers_of: Callable[[list[Any]], list[int]]) -> None:
        self.supported_kwargs, self._numbers_of = {name: int}, numbers_of

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        return torch.tensor(self._numbers_of([request.state for request in requests_with_new_token]), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        self.values_B = tensor_arg[: scores.size(0)]
        return scores


class _Alone:
    """Leaves a greedy request nothing but its most likely token (the lowest id among equals), and a seeded one nothing
    but the token that its noise draws."""

    supports_continuous_batching = True

    def __init__(self, sampler: Sampler, modes: _Row, keys: tuple[_Row, _Row]) -> None:
        self._sampler, self._modes, self._keys = sampler, modes, keys

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        modes_B1 = self._modes.values_B[:, None]
        if self._sampler.draws_by_seed:
            low, high = self._keys
            noisy = scores + gumbel(low.values_B, high.values_B, scores.size(1))
            scores = torch.where((modes_B1 & _SEEDED).bool(), noisy, scores)
        alone = (modes_B1 & (_GREEDY | _SEEDED)).bool()
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(-1, keepdim=True), True)
        return scores.masked_fill(alone & ~best, float("-inf"))


class _Fewest(ContinuousBatchingLogitsProcessor):
    """Gives end-of-sequence tokens no probability before the position where a request may end."""

    supported_kwargs = {"may_end_at": int}
    ignored_kwargs = ()

    def __init__(self, eos_token_ids: list[int], sampler: Sampler) -> None:
        self._eos_token_ids, self._sampler = eos_token_ids, sampler

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        states = [request.state for request in requests_with_new_token]
        too_early = [state.position_offset < state.logit_processor_kwargs.get("may_end_at", 0) for state in states]
        return torch.tensor(too_early, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        if not self._sampler.truncates or not self._eos_token_ids:
            return scores
        ends = torch.zeros_like(scores, dtype=torch.bool)
        for token in self._eos_token_ids:
            ends[:, token] = tensor_arg[: scores.size(0)].bool()
        return scores.masked_fill(ends, float("-inf"))


class _Truncation(ContinuousBatchingLogitsProcessor):
    """One of transformers' top-k and top-p, left out while no request truncates."""

    def __init__(self, own: Any, sampler: Sampler) -> None:
        self._own, self._sampler = own, sampler
        self.supported_kwargs, self.ignored_kwargs = own.supported_kwargs, own.ignored_kwargs

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        self._own.fill_defaults(int32_tensor)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        return self._own.prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return self._own(scores, tensor_arg) if self._sampler.truncates else scores


class Sampler:
    """The sampling of one manager. Created before its batch processor, attached to it after.

    Args:
        manager: a `ContinuousBatchingManager` made with `generation_config`.
        vocab_size: V.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, manager: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._vocab_size = vocab_size
        self.truncates = False
        """Whether any request of the step under way draws from less than the whole vocabulary."""
        self.draws_by_seed = False
        """Whether any of them has a seed."""
        self._keys: list[tuple[int, int]] = []
        self._untruncated = _Untruncated()
        processors = manager.logit_processor
        temperature, *truncations = processors.logits_processor
        modes = _Row("modes", self._modes_of)
        keys = _Row("seed", self._low_keys_of), _Row("seed", self._high_keys_of)
        processors.logits_processor[:] = [
            modes,
            temperature,
            self._untruncated,
            _Fewest(eos_token_ids, self),
            *(_Truncation(processor, self) for processor in truncations),
            *keys,
            _Alone(self, modes, keys),
        ]
        processors.tensors_required += 4
        processors._retrieve_processors_kwargs()

    def attach(self, batch_processor: Any) -> None:
        """Report log-probabilities before truncation; keep CUDA graphs with and without truncation and seeds apart."""
        runner, io = batch_processor.model_runner, batch_processor.inputs_and_outputs
        sample = runner._sample

        def sample_and_score(scores: torch.Tensor, output_ids: torch.Tensor) -> None:
            sample(scores, output_ids)
            assert self._untruncated.scores is not None
            logprobs = self._untruncated.scores.log_softmax(-1)
            tokens = output_ids[0, : logprobs.size(0)].long()
            chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
            output_ids[1, : chosen.size(0)].copy_(chosen.view(torch.int32))

        runner._sample = sample_and_score
        for device_io in [pair.device_io for pair in io.io_pairs] if hasattr(io, "io_pairs") else [io]:
            device_io._get_graph_key = self._with_kind(device_io._get_graph_key)

    def admit(self, prompt_length: int, sampling: SamplingParams) -> dict[str, Any]:
        """The values a request brings to the processors."""
        may_end_at = prompt_length + max(sampling.min_new_tokens - 1, 0) * (not sampling.ignore_eos)
        modes = _TRUNCATED * self._is_truncated(sampling)
        values = {"may_end_at": may_end_at, "temperature": 1.0, "top_k": self._vocab_size, "top_p": 1.0}
        if not sampling.do_sample:
            return {**values, "modes": modes | _GREEDY}
        values |= {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
        if sampling.top_k != -1:
            values["top_k"] = min(sampling.top_k, self._vocab_size)
        if sampling.seed is not None:
            values["seed"], modes = sampling.seed, modes | _SEEDED
        return {**values, "modes": modes}

    def _is_truncated(self, sampling: SamplingParams) -> bool:
        truncated = sampling.do_sample and (sampling.top_p < 1 or 0 < sampling.top_k < self._vocab_size)
        return truncated or sampling.min_new_tokens > 1

    def _modes_of(self, states: list[Any]) -> list[int]:
        """Once a step, before it is computed. Every rank of a parallel plan sees the same states."""
        modes = [state.logit_processor_kwargs.get("modes", 0) for state in states]
        present = reduce(or_, modes, 0)
        self.truncates, self.draws_by_seed = bool(present & _TRUNCATED), bool(present & _SEEDED)
        return modes

    def _low_keys_of(self, states: list[Any]) -> list[int]:
        self._keys = [self._key_of(state) for state in states] if self.draws_by_seed else []
        return [low for low, _ in self._keys]

    def _high_keys_of(self, states: list[Any]) -> list[int]:
        return [high for _, high in self._keys]

    def _key_of(self, state: Any) -> tuple[int, int]:
        seed = state.logit_processor_kwargs.get("seed")
        return (0, 0) if seed is None else draw_key(seed, sequence_of(state.request_id), state.position_offset)

    def _with_kind(self, own: Callable[[], tuple]) -> Callable[[], tuple]:
        return lambda: (*own(), self.truncates, self.draws_by_seed)
