"""What every engine offers, and the nouns of a request. Imports no engine and no torch.

P prompt tokens and O generated tokens give a trace of P + O - 1 rows: the last generated token was never an input. A
scoring request generates nothing and gives all P rows, since every token of its prompt was an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moetrace.errors import CaptureOffError, RequestError
from moetrace.layout import MoeLayout
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


@dataclass(frozen=True)
class EngineConfig:
    """The knobs of the embedded engine. The command line reads names, defaults and help from here."""

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


@dataclass(frozen=True)
class CaptureState:
    """Where capture stands.

    Attributes:
        is_on: whether steps are recorded now.
        capacity_rows: rows there is room for on the engine's device.
        capacity_bytes: what that takes there, beside the model and its cache.
        sequences, rows, missing_rows: what was returned since the engine started.
        errors: sequences whose rows could not be returned at all.
    """

    is_on: bool
    capacity_rows: int
    capacity_bytes: int
    sequences: int = 0
    rows: int = 0
    missing_rows: int = 0
    errors: int = 0


class Engine(Protocol):
    """Generates tokens and records routes. Safe to call from any thread."""

    name: str
    """Name and version, as traces carry it."""
    vocab_size: int
    max_model_len: int
    num_layers: int
    """Decoder layers of the model, dense ones too."""

    @property
    def layout(self) -> MoeLayout | None:
        """The model's MoE layout where routes are captured, else None."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the model where routes are captured, else None."""
        ...

    @property
    def capture(self) -> CaptureState | None:
        """Where capture stands, or None for an engine that was started without it."""
        ...

    @property
    def weight_version(self) -> str:
        """Name of the weights that steps run with now."""
        ...

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and `resume` not since."""
        ...

    def submit(
        self,
        prompt_tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        return_routes: bool = False,
        return_prompt_logprobs: bool = False,
        on_progress: Progress | None = None,
    ) -> Generation:
        """Queue one request.

        Args:
            prompt_tokens: token ids.
            sampling: how to generate.
            return_routes: give the result a trace.
            return_prompt_logprobs: give the result the log-probabilities of its prompt. Every position is computed,
                also where a prefix could be shared, and counts with the weights that it was computed with.
            on_progress: told of new tokens, on a thread of the engine: it must return at once. The tokens that end a
                sequence come with its result only.

        Raises:
            RequestError: the request cannot be served as asked; said at once, nothing was queued.
            EngineError: the engine has stopped.
        """
        ...

    def read_routes(
        self, generation: Generation, sequence: int, output_tokens: Sequence[int], start: int
    ) -> RoutingTrace | None:
        """The rows from position `start` on of a sequence that still runs, as far as they are there without a gap.

        Args:
            generation: what `submit` returned, with `return_routes`.
            sequence: number of the sequence.
            output_tokens: its tokens so far, as `on_progress` told them.
            start: position of the first row.

        Returns:
            None once the sequence is over: its result has all rows.
        """
        ...

    def abort(self, request_id: str | None = None) -> None:
        """End one request (all of them: None) as soon as the step under way is done.

        Its futures get what there is: the tokens so far and their rows. An unknown or finished request is left alone.
        """
        ...

    def pause(self) -> None:
        """Launch no step until `resume`. Requests stay where they are, new ones wait, and `abort` works."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def update_weights(self, weights: str | Mapping[str, Any], version: str) -> None:
        """Replace the model's weights between two steps, all or none; running requests go on with the new ones.

        Args:
            weights: a checkpoint folder of the same model or one safetensors file with the same names; or tensors by
                the names of the model's state dict.
            version: name of the weights; every row says which it was computed by.

        Raises:
            WeightsError: there are none, or names, shapes or dtypes are not the model's; the old weights stay.
            EngineError: the engine has stopped.
        """
        ...

    def start_capture(self) -> None:
        """Record again after `stop_capture`, from the next step on. No prefix that exists now is shared any more, so
        that requests submitted from now on have all their rows.

        Raises:
            CaptureOffError: the engine was started without capture.
            EngineError: the engine has stopped.
        """
        ...

    def stop_capture(self) -> None:
        """Record nothing from the next step on, and refuse requests that ask for routes. Requests under way that asked
        keep the rows they have; those of steps until `start_capture` are missing, and marked so.

        Raises:
            CaptureOffError: the engine was started without capture.
            EngineError: the engine has stopped.
        """
        ...

    def is_healthy(self) -> bool:
        """False once the engine can serve no more."""
        ...

    def close(self) -> None:
        """Finish what is queued and stop."""
        ...


def check_request(
    engine: Engine,
    prompt_tokens: Sequence[int],
    sampling: SamplingParams,
    return_routes: bool,
    return_prompt_logprobs: bool = False,
) -> None:
    """Raise `RequestError` for a request that no engine of this model could serve."""
    if not prompt_tokens:
        raise RequestError("the prompt is empty", expected="at least one token")
    for what, tokens in (
        ("token id", prompt_tokens),
        ("stop token", sampling.stop_token_ids),
        *(("stop token", run) for run in sampling.stop_sequences),
    ):
        wrong = next((i for i, token in enumerate(tokens) if not 0 <= token < engine.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"{what} at position {wrong} is out of range",
                expected=f"0 <= id < {engine.vocab_size}",
                got=tokens[wrong],
                fix="Tokenise with this model's own tokenizer.",
            )
    if sampling.is_scoring and not (return_routes or return_prompt_logprobs):
        raise RequestError(
            "nothing is to be generated, and nothing of the prompt to be returned",
            expected="with max_new_tokens 0: log-probabilities of the prompt, routed experts, or both",
            fix="Ask for one of them, or for at least 1 new token.",
        )
    room = engine.max_model_len - len(prompt_tokens)
    fewest = 0 if sampling.is_scoring else 1
    if room < fewest:
        raise RequestError(
            "the prompt is longer than the model's window",
            expected=f"at most {engine.max_model_len - fewest} tokens",
            got=f"{len(prompt_tokens)} tokens",
            fix="Shorten the prompt.",
        )
    if sampling.max_new_tokens > room:
        raise RequestError(
            "max_new_tokens does not fit the model's window",
            expected=f"at most {room} after a prompt of {len(prompt_tokens)} (window {engine.max_model_len})",
            got=sampling.max_new_tokens,
            fix="Lower max_new_tokens or shorten the prompt.",
        )
    if return_routes and not require_capture(engine.capture).is_on:
        raise CaptureOffError(
            "routed experts were asked for, but capture is stopped", fix="POST /routing/start, and send it again."
        )


def require_capture(capture: CaptureState | None) -> CaptureState:
    """The state of an engine's capture; `CaptureOffError` where it was started without."""
    if capture is None:
        raise CaptureOffError(
            "routed experts were asked for, but this server does not record them",
            expected="a server started with --enable-return-routed-experts",
            got="one started without",
            fix="Restart it as: moetrace serve MODEL --enable-return-routed-experts",
        )
    return capture
