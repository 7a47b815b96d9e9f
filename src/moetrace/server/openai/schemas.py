"""What OpenAI's clients send. What makes no difference is accepted; what is not supported is refused by name."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from moetrace.engines.requests import SamplingParams
from moetrace.errors import RequestError
from moetrace.server.parameters import by_temperature, close, require_neutral
from moetrace.server.schemas import Listed, Prompt, Prompts

_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
"""Parameters about accounts, billing, caches and tools that are not there: they change no text."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
}


class StreamOptions(BaseModel):
    """What a stream brings beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(False, description="a last chunk with the usage")
    include_obfuscation: bool | None = Field(False, description="accepted; chunks are never padded")


def _closed(schema: dict[str, Any], kind: type[OpenAIRequest]) -> None:
    close(schema, kind.neutral, _IGNORED)


class OpenAIRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=_closed)

    model: str = Field(description="name of the served model, as /v1/models says it")
    n: int | None = Field(1, description="sequences to generate from each prompt")
    temperature: float | None = Field(1.0, description="divides the logits, 0.001 to 1000000; 0 is greedy")
    top_p: float | None = Field(1.0, description="nucleus, in (0, 1]")
    seed: int | None = Field(None, description="what is drawn; null: by chance")
    stop: str | Listed[str] | None = Field(None, description="texts that end a sequence; the output is without them")
    stream: bool | None = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream")

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _NEUTRAL

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise `RequestError` for parameters that are unknown, not supported or contradict each other."""
        extra = self.model_extra or {}
        routing = next((name for name in extra if name.startswith(("return_routed_experts", "routed_experts"))), None)
        if routing is not None:
            raise RequestError(
                f"{routing} asks for routes, and OpenAI's responses have no place for them",
                expected="it absent",
                got=routing,
                fix='Send the prompt to /generate with "return_routed_experts": true.',
                param=routing,
            )
        require_neutral(extra, self.neutral, type(self).model_fields, _IGNORED)
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options are for streams", fix='Send "stream": true with them.', param="stream_options"
            )

    def sampling_of(self, max_new_tokens: int) -> SamplingParams:
        """How to generate that many tokens at most.

        Raises:
            RequestError: a value is out of range.
        """
        if max_new_tokens < 1:
            raise RequestError("max_tokens is out of range", expected="an integer >= 1", got=max_new_tokens)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            top_p=1.0 if self.top_p is None else self.top_p,
            n=1 if self.n is None else self.n,
            seed=self.seed,
            stop=self.stops,
            **by_temperature(1.0 if self.temperature is None else self.temperature),
        )


class CompletionRequest(OpenAIRequest):
    """One prompt or several, as text or as token ids."""

    prompt: Prompt | Prompts = Field(description="text, or token ids; or a list of prompts")
    max_tokens: int | None = Field(16, description="most tokens to generate")
    best_of: int | None = Field(None, description="must equal n")
    logprobs: int | None = Field(
        None, description="0: log-probabilities of the output's tokens; alternatives are not had"
    )

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {**_NEUTRAL, "echo": (None, False), "suffix": (None, "")}

    @property
    def wants_logprobs(self) -> bool:
        """Whether to return log-probabilities."""
        return self.logprobs is not None

    def check(self) -> None:
        """See `OpenAIRequest.check`."""
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise RequestError(
                "best_of is not n, and this server ranks no sequences",
                expected=f"best_of absent, or {self.n or 1}",
                got=self.best_of,
                param="best_of",
            )
        if self.logprobs not in (None, 0):
            raise RequestError(
                "logprobs asks for alternatives, and this server has the log-probabilities of chosen tokens only",
                expected="logprobs absent, or 0",
                got=self.logprobs,
                param="logprobs",
            )

    def sampling(self) -> SamplingParams:
        """How to generate; 16 tokens by default."""
        return self.sampling_of(16 if self.max_tokens is None else self.max_tokens)


class ChatRequest(OpenAIRequest):
    """A conversation to continue."""

    messages: Listed[dict[str, Any]] = Field(description="role and content of each message", min_length=1)
    max_tokens: int | None = Field(None, description="most tokens to generate; default: the rest of the window")
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = Field(False, description="return log-probabilities of the output's tokens")

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_NEUTRAL,
        "audio": (None,),
        "function_call": (None, "none", "auto"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    @property
    def wants_logprobs(self) -> bool:
        """Whether to return log-probabilities."""
        return bool(self.logprobs)

    def check(self) -> None:
        """See `OpenAIRequest.check`."""
        super().check()
        if None is not self.max_tokens != self.max_completion_tokens is not None:
            raise RequestError(
                "max_tokens and max_completion_tokens contradict each other",
                expected="one of them",
                got=f"{self.max_tokens} and {self.max_completion_tokens}",
                param="max_tokens",
            )

    def sampling(self, room: int) -> SamplingParams:
        """How to generate; by default `room` tokens, the rest of the window."""
        asked = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self.sampling_of(max(room, 1) if asked is None else asked)
