"""What the client returns. Imports no HTTP library."""

from __future__ import annotations

from dataclasses import dataclass

from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace


@dataclass(frozen=True)
class TraceReference:
    """A trace that the server keeps for a while, to fetch later, here or elsewhere: `client.fetch(reference)`.

    A trainer can be sent `dataclasses.asdict(reference)`, and fetches that.

    Attributes:
        id: digest of the container, see `Container.digest`: what is fetched is that, or an error.
        path: where on the server.
        num_bytes: of the container.
        codec: of the ids in it.
        token_sha256: of the prompt and output token ids, see `token_sha256`.
        expires_at: seconds since 1970 after which the server may have forgotten it, or None for never.
    """

    id: str
    path: str
    num_bytes: int
    codec: str
    token_sha256: str
    expires_at: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one sequence. The sequences of one prompt share its computation."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """One sequence that was generated.

    Attributes:
        request_id: of the request, as the server logs it.
        prompt_number: which of the request's prompts it continues.
        index: which of the prompt's `n` sequences it is.
        prompt_tokens, tokens: token ids that went in and came out.
        text: of the output tokens, or None where the server has no tokenizer.
        logprobs: for each output token the natural logarithm of its probability before truncation, or None where they
            were not asked for.
        prompt_logprobs: the same for each prompt token, with None for the first; None where they were not asked for.
        finish_reason: "stop", "length" or "abort".
        weight_version: the weights in force when the sequence ended, or None where the server does not say.
        trace: the routes, checked against the tokens; None where they were not asked for, or only by reference.
        reference: where the routes are, if they were asked for by reference.
    """

    request_id: str
    prompt_number: int
    index: int
    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    logprobs: list[float] | None
    prompt_logprobs: list[float | None] | None
    finish_reason: str
    weight_version: str | None
    trace: RoutingTrace | None = None
    reference: TraceReference | None = None

    @property
    def usage(self) -> Usage:
        """How many tokens that was."""
        return Usage(len(self.prompt_tokens), len(self.tokens))


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream.

    Attributes:
        index: which of the `n` sequences it is about.
        token: the token that came, or None where an aborted sequence ends without one.
        text: what it adds to the text; may be empty, where a character needs more tokens.
        logprob: of the token.
        completion: in the last event of a sequence all of it, with the trace joined from all deltas; else None.
    """

    index: int
    token: int | None
    text: str | None
    logprob: float | None
    completion: Completion | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Which model a server has, with which weights.

    Attributes:
        engine: name and version of the engine.
        fingerprint: of the model, as traces carry it; None where no routes are captured.
        layout: of the model's MoE layers; None where no routes are captured.
        weight_version: the weights that steps run with now.
        window: longest sequence, prompt and output.
        vocab_size: how many token ids there are.
        paused: whether the engine is paused.
    """

    engine: str
    fingerprint: str | None
    layout: MoeLayout | None
    weight_version: str
    window: int
    vocab_size: int
    paused: bool
