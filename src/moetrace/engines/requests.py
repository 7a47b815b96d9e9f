"""The nouns of a request: how it is sampled, what comes of it. Imports no engine and no torch.

P prompt tokens and O generated tokens give a trace of P + O - 1 rows: the last generated token was never an input. A
scoring request generates nothing and gives all P rows, since every token of its prompt was an input.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from moetrace.errors import RequestError
from moetrace.trace import RoutingTrace

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    Attributes:
        max_new_tokens: most tokens to generate; 0 makes it a scoring request, which generates nothing and returns what
            there is to say of the prompt: its rows, its log-probabilities, or both.
        do_sample: draw from the distribution; False takes the most likely token.
        min_new_tokens: fewest tokens to generate: before, end-of-sequence tokens have no probability, and stop tokens
            and texts end nothing.
        temperature: divides the logits before sampling, from 0.001 to 1,000,000.
        top_p: draw only from the smallest set of tokens with at least this probability, in (0, 1].
        top_k: draw only from this many most likely tokens; -1 means all.
        ignore_eos: go on after an end-of-sequence token.
        n: how many sequences to generate from the prompt; the prompt is computed once.
        stop_token_ids: tokens that end a sequence, as end-of-sequence tokens do.
        stop: texts that end a sequence; the token that completes one is its last.
        stop_sequences: runs of tokens that end a sequence, as texts do.
        seed: draw each token by this number, the number of the sequence, and the token's position, and by nothing else:
            the same logits give the same tokens, whatever else runs. None: by the engine's own generator.

    Raises:
        RequestError: a value is out of range.
    """

    max_new_tokens: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    ignore_eos: bool = False
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, right, meaning in (
            ("max_new_tokens", self.max_new_tokens >= 0, "an integer >= 0 (0: score the prompt)"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "0 <= min_new_tokens <= max_new_tokens",
            ),
            ("temperature", 1e-3 <= self.temperature <= 1e6, "0.001 to 1000000 (for greedy: do_sample=false)"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 (all) or >= 1"),
            ("n", self.n >= 1, "an integer >= 1"),
            ("n", self.n == 1 or not self.is_scoring, "1 where nothing is generated: one prompt has one score"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits, or none"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("stop_sequences", all(self.stop_sequences), "runs of at least one token"),
        ):
            if not right:
                raise RequestError(f"{name} is out of range", expected=meaning, got=getattr(self, name))

    @property
    def is_scoring(self) -> bool:
        """Whether nothing is to be generated."""
        return self.max_new_tokens == 0


@dataclass(frozen=True)
class GenerateResult:
    """What one request came to.

    Attributes:
        prompt_tokens, output_tokens: token ids.
        logprobs: for each output token the natural logarithm of its probability under softmax(logits / temperature),
            before top-k and top-p (temperature 1 when greedy).
        finish_reason: "stop" after an end-of-sequence token, a stop token or a stop text; "abort" when the request was
            aborted, with what there was; else "length".
        weight_version: the weights in force when the sequence ended; the trace says it of every row.
        trace: the routes, P + O - 1 rows (P of a scoring request), or None when they were not asked for.
        prompt_logprobs: for each prompt token the natural logarithm of its probability under softmax(logits), at
            temperature 1; None for the first, which nothing predicts, and, of an aborted request, for those that were
            not computed. None when they were not asked for.
    """

    prompt_tokens: list[int]
    output_tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: str
    trace: RoutingTrace | None = None
    prompt_logprobs: list[float | None] | None = None


Progress = Callable[[int, list[int], list[float]], None]
"""Number of the sequence (below n), its output tokens so far, and their log-probabilities."""


@dataclass(frozen=True)
class Generation:
    """A request under way: its id, the length of its prompt, and a future for each of its `n` sequences."""

    request_id: str
    prompt_length: int
    futures: tuple[Future[GenerateResult], ...]

    def result(self, timeout: float | None = None) -> GenerateResult:
        """Wait for the (first) sequence; seconds, or for ever."""
        return self.futures[0].result(timeout)

    def results(self, timeout: float | None = None) -> list[GenerateResult]:
        """Wait for all sequences; seconds for each, or for ever."""
        return [future.result(timeout) for future in self.futures]
