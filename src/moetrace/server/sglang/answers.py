"""What SGLang's paths answer, as types: for /openapi.json and its tests."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on

from moetrace.server.answers import closed

Logprob = tuple[float | None, int, str | None]
"""Log-probability, id, and text where it was asked for."""


@closed
class Finish(TypedDict):
    """How a sequence ended."""

    type: Literal["stop", "length", "abort"]
    matched: NotRequired[str | int | None]
    length: NotRequired[int]
    message: NotRequired[str]


@closed
class MetaInfo(TypedDict):
    """What is known of a sequence; `finish_reason` is null while it grows."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Finish | None
    weight_version: str
    e2e_latency: NotRequired[float]
    input_token_logprobs: NotRequired[list[Logprob]]
    output_token_logprobs: NotRequired[list[Logprob]]
    routed_experts: NotRequired[str | None]
    routed_experts_start_len: NotRequired[int]


@closed
class SGLangResponse(TypedDict):
    """A sequence, in a stream so far. Without a tokenizer it has no text."""

    text: NotRequired[str]
    output_ids: list[int]
    meta_info: MetaInfo
    index: NotRequired[int]


@closed
class ModelInfo(TypedDict):
    """Which model."""

    model_path: str | None
    tokenizer_path: str | None
    is_generation: bool
    preferred_sampling_params: None
    weight_version: str


@closed
class WeightVersion(TypedDict):
    """Which weights."""

    weight_version: str
