"""What OpenAI's endpoints answer, as types: for /openapi.json and its tests."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on

from moetrace.server.answers import Usage, closed

Reason = Literal["stop", "length"]


@closed
class OpenAIErrorFacts(TypedDict):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


@closed
class OpenAIError(TypedDict):
    """Every error."""

    error: OpenAIErrorFacts


@closed
class ModelCard(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


@closed
class ModelList(TypedDict):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


@closed
class CompletionLogprobs(TypedDict):
    """Tokens of a text, each where it begins."""

    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: None


@closed
class CompletionChoice(TypedDict):
    """A text, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


@closed
class Completion(TypedDict):
    """The texts; in a stream what is new of one, with `usage` null until the end if it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: None
    usage: NotRequired[Usage | None]


@closed
class ChatToken(TypedDict):
    """A token; `bytes` is null for a part of a character."""

    token: str
    bytes: list[int] | None
    logprob: float
    top_logprobs: list[float]


@closed
class ChatLogprobs(TypedDict):
    """Tokens of a message."""

    content: list[ChatToken]
    refusal: None


@closed
class ChatMessage(TypedDict):
    """A message."""

    role: Literal["assistant"]
    content: str
    refusal: None


@closed
class ChatChoice(TypedDict):
    """A message and how it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


@closed
class ChatCompletion(TypedDict):
    """The messages."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: None
    usage: Usage


@closed
class ChatDelta(TypedDict):
    """What is new of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]


@closed
class ChatChunkChoice(TypedDict):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


@closed
class ChatChunk(TypedDict):
    """What is new, with `usage` null until the end if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: None
    usage: NotRequired[Usage | None]
