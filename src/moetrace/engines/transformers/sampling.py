"""Per-request sampling on top of transformers' continuous batching.

That engine samples every request the same way: greedy or not is one switch for all, and a log-probability is taken
after top-k and top-p. Two logits processors and one wrapper around its sampler make greedy a per-request choice and
take log-probabilities before truncation.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from moetrace.engines.base import SamplingParams


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


def request_kwargs(sampling: SamplingParams, vocab_size: int) -> dict[str, Any]:
    """The values one request brings to the processors."""
    if not sampling.do_sample:
        return {"temperature": 1.0, "top_k": vocab_size, "top_p": 1.0, "greedy": 1}
    top_k = vocab_size if sampling.top_k == -1 else min(sampling.top_k, vocab_size)
    return {"temperature": float(sampling.temperature), "top_k": top_k, "top_p": float(sampling.top_p), "greedy": 0}


class _Untruncated:
    """Keeps the logits as they are between temperature and truncation."""

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        return scores


class _Greedy(ContinuousBatchingLogitsProcessor):
    """Leaves a greedy request nothing but its most likely token (the lowest id among equals)."""

    supported_kwargs = {"greedy": int}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        flags = [request.state.logit_processor_kwargs.get("greedy", 0) for request in requests_with_new_token]
        return torch.tensor(flags, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        greedy = tensor_arg[: scores.size(0), None].bool()
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(-1, keepdim=True), True)
        return scores.masked_fill(greedy & ~best, float("-inf"))


def extend_processors(manager: Any) -> _Untruncated:
    """Add our processors to a manager, before its batch processor exists."""
    untruncated = _Untruncated()
    processors = manager.logit_processor
    processors.logits_processor.insert(1, untruncated)  # after temperature
    processors.logits_processor.append(_Greedy())
    processors.tensors_required += 1
    processors._retrieve_processors_kwargs()
    return untruncated


def take_untruncated_logprobs(runner: Any, untruncated: _Untruncated) -> None:
    """Make a batch processor's model runner report log-probabilities before truncation."""
    sample = runner._sample

    def sample_and_score(scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        sample(scores, output_ids)
        assert untruncated.scores is not None
        logprobs = untruncated.scores.log_softmax(-1)
        tokens = output_ids[0, : logprobs.size(0)].long()
        chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
        output_ids[1, : chosen.size(0)].copy_(chosen.view(torch.int32))

    runner._sample = sample_and_score
