"""Log-probabilities of prompts, on top of continuous batching, which computes logits of a prompt's last position only.

A step that holds positions of a prompt that is to be scored runs without its CUDA graph and without `torch.compile`.
After its forward the model's own head runs again, on those positions and what the model's body returned; some at a
time, since their logits would be large. Steps without such positions are as they were.

    schedule_batch        which rows of the step to score
    search_prefix_match   a prompt that is not scored yet shares nothing: all of its positions are computed
    _get_forward_fn       the step's forward, and then the head again

Axes: M positions that a step scores, C of them at a time, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moetrace.engines.transformers.continuous import BatchLoop
from moetrace.engines.transformers.pages import require
from moetrace.errors import RequestError

_MOST_LOGITS = 1 << 25
"""Logits that exist at once: with their float32 copy and what the sum takes, 8 to 12 bytes each."""


class PromptScores:
    """What is known of one prompt. A position is scored once: what a preemption computes again does not count.

    Args:
        prompt: token ids.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt, self._num_scored = prompt, 0
        self._parts: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    @property
    def is_complete(self) -> bool:
        """Whether every token but the first is scored."""
        return self._num_scored == len(self._prompt) - 1

    def due(self, start: int, count: int) -> range:
        """The positions among `count` inputs from position `start` on whose next token is not scored yet."""
        if start > self._num_scored:
            return range(0)
        return range(self._num_scored, min(start + count, len(self._prompt) - 1))

    def targets(self, positions: range) -> list[int]:
        """The tokens that follow these positions."""
        return list(self._prompt[positions.start + 1 : positions.stop + 1])

    def add(self, logprobs_M: torch.Tensor, computed: torch.cuda.Event | None) -> None:
        """Take the log-probabilities of the tokens that follow the positions of `due`."""
        self._parts.append((logprobs_M, computed))
        self._num_scored += len(logprobs_M)

    def values(self) -> list[float | None]:
        """One for each token, None for the first and for those that were not computed; waits for the device."""
        values: list[float | None] = [None]
        for logprobs_M, computed in list(self._parts):
            if computed is not None:
                computed.synchronize()
            values += logprobs_M.tolist()
        return values + [None] * (len(self._prompt) - len(values))


@dataclass
class _Due:
    """Rows of a step, from `row` on, whose next tokens are to be scored."""

    scores: PromptScores
    positions: range
    row: int


class PromptScorer:
    """Scores the prompts of one manager's requests where they ask for it. To be made before capture joins the loop.

    Args:
        manager: a `ContinuousBatchingManager` whose batch processor exists.
        loop: its loop.
    """

    def __init__(self, manager: Any, loop: BatchLoop) -> None:
        self._model: PreTrainedModel = manager.model
        processor = manager.batch_processor
        self._runner = require(processor, "model_runner")
        self._forward = require(self._runner, "_forward_process_and_sample")
        self._asking: dict[str, PromptScores] = {}
        self._due: list[_Due] = []
        loop.join(processor.scheduler, "schedule_batch", self._schedule)
        loop.join(processor.cache, "search_prefix_match", self._match)
        loop.join(self._runner, "_get_forward_fn", self._forward_fn)

    def require_supported(self) -> None:
        """Raise `RequestError` for a model whose head cannot run on chosen positions of what its body returned."""
        if self._model.base_model is self._model or not self._runner.supports_logits_to_keep(self._model):
            raise RequestError(
                "the log-probabilities of a prompt were asked for, and this model's head cannot run by itself",
                expected="a causal language model with a body of its own and `logits_to_keep`",
                got=type(self._model).__name__,
            )

    def watch(self, request_id: str, prompt: Sequence[int]) -> PromptScores:
        """Score the prompt of a request that is about to be added; `drop` it when it is over."""
        scores = self._asking[request_id] = PromptScores(prompt)
        return scores

    def drop(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        self._asking.pop(request_id, None)

    # From here on: in the loop, on the generation thread.

    def _schedule(self, own: Callable[..., Any], *budgets: int) -> Any:
        requests, *rest = own(*budgets)
        self._due = list(self._due_in(requests)) if self._asking and requests else []
        return requests, *rest

    def _due_in(self, requests: list[Any]) -> Iterator[_Due]:
        first = 0
        for request in requests:
            scores, start = self._asking.get(request.state.request_id), request.state.position_offset
            positions = scores.due(start, request.query_length) if scores else range(0)
            if scores and positions:
                yield _Due(scores, positions, first + positions.start - start)
            first += request.query_length

    def _match(self, own: Callable[..., int], request_id: str, tokens: list[int]) -> int:
        scores = self._asking.get(request_id)
        return own(request_id, tokens) if scores is None or scores.is_complete else 0

    def _forward_fn(self, own: Callable[..., tuple[Callable, bool]], use_block_table: bool) -> tuple[Callable, bool]:
        if not self._due:
            return own(use_block_table)
        return partial(self._forward_and_score, self._due), False

    def _forward_and_score(self, due: list[_Due], model: PreTrainedModel, batch_data: Any, *rest: Any) -> None:
        with keeping_outputs(model.base_model) as outputs:
            self._forward(model, batch_data, *rest)
        if len(outputs) != 1:
            return  # a body that is not called, or several times: the scores stay incomplete, and their requests fail
        rows, targets = list[int](), list[int]()
        for part in due:
            rows += range(part.row, part.row + len(part.positions))
            targets += part.scores.targets(part.positions)
        logprobs_M = logprobs_of(model, batch_data, outputs[0], rows, targets)
        computed = torch.cuda.current_stream(logprobs_M.device).record_event() if logprobs_M.is_cuda else None
        for part, scored in zip(due, logprobs_M.split([len(part.positions) for part in due]), strict=True):
            part.scores.add(scored, computed)


@contextmanager
def keeping_outputs(body: nn.Module) -> Iterator[list[Any]]:
    """A list that gets what `body` returns."""
    outputs: list[Any] = []
    handle = body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def logprobs_of(
    model: PreTrainedModel, inputs: Mapping[str, Any], output: Any, rows: Sequence[int], targets: Sequence[int]
) -> torch.Tensor:
    """`[M]` float32: log-probability of each target after its row, by the model's own head alone.

    Args:
        model: a model that `PromptScorer.require_supported` lets pass.
        inputs: what it was called with, one sequence or several packed in one.
        output: what its body returned.
        rows, targets: M positions in the sequence, and a token for each.
    """
    pairs_2M, device = torch.tensor([list(rows), list(targets)]), inputs["input_ids"].device
    if device.type == "cuda":
        pairs_2M = pairs_2M.pin_memory().to(device, non_blocking=True)
    most = max(_MOST_LOGITS // model.config.get_text_config().vocab_size, 1)
    logprobs = []
    with _answering(model.base_model, output):
        for rows_C, targets_C in zip(*(part_M.split(most) for part_M in pairs_2M), strict=True):
            logits_CV = model(**{**inputs, "logits_to_keep": rows_C}).logits[0].float()
            logprobs.append(logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
    return torch.cat(logprobs)


@contextmanager
def _answering(body: nn.Module, output: Any) -> Iterator[None]:
    """`body` computes nothing and returns `output`."""
    before = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
