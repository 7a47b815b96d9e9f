"""What every engine offers. Imports no engine and no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moetrace.engines.requests import Generation, Progress, SamplingParams
from moetrace.errors import CaptureOffError, RequestError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace


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
