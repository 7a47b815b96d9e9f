"""What this server's own paths answer, as types, for /openapi.json and its tests. The answers are made elsewhere."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on

from moetrace.dialects import AxisOrder, IdType
from moetrace.engines.requests import FinishReason
from moetrace.trace import Order

closed = with_config(ConfigDict(extra="forbid"))
"""Other keys than these are not sent."""


@closed
class ErrorFacts(TypedDict):
    """What went wrong, and what to do."""

    type: str
    message: str
    expected: NotRequired[str]
    got: NotRequired[str]
    fix: NotRequired[str]


@closed
class ErrorResponse(TypedDict):
    """Every error."""

    error: ErrorFacts


@closed
class Usage(TypedDict):
    """Tokens of a prompt and of all its sequences."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@closed
class Token(TypedDict):
    """An output token; without a tokenizer `text` and `special` are null."""

    id: int
    text: str | None
    logprob: float
    special: bool | None


@closed
class StreamToken(Token):
    """An output token of a stream, and how many there are with it."""

    count_output_tokens: int
    prompt_tokens: int


@closed
class Span(TypedDict):
    """From row `start` of these on, they were computed with weights of this version."""

    start: int
    version: str


class Description(TypedDict):
    """What is said of routes, however they travel."""

    shape: list[int]
    layers: list[int]
    num_experts: int
    order: Order
    start: int
    num_valid: int
    valid: str
    token_sha256: str
    weight_spans: list[Span]
    fingerprint: str
    engine: str


@closed
class RoutedExperts(Description):
    """The routes of one sequence: base64 of ids of type `dtype` in the order of `layout`."""

    dtype: IdType
    data: str
    layout: AxisOrder


@closed
class RoutedContainer(Description):
    """The routes of one sequence: base64 of a container, see docs/format.md."""

    layout: Literal["TLK"]
    codec: str
    format: Literal["moetrace"]
    data: str


@closed
class TraceReference(TypedDict):
    """A container that the server keeps; `expires_at` is in seconds since 1970, null where no age ends it."""

    id: str
    path: str
    num_bytes: int
    codec: str
    sha256: str
    expires_at: float | None


@closed
class RoutedReference(Description):
    """Where the routes of one sequence are."""

    layout: Literal["TLK"]
    reference: TraceReference


Routes = RoutedExperts | RoutedContainer | RoutedReference


@closed
class GenerateResponse(TypedDict):
    """What came of one prompt. Where n > 1, what is said of a sequence is a list of n."""

    generated_text: list[str] | None
    count_output_tokens: int | list[int]
    finish_reason: FinishReason | list[FinishReason]
    prompt_tokens: int
    prompt_token_ids: list[int]
    output_token_ids: list[int] | list[list[int]]
    weight_version: str | list[str]
    usage: Usage
    tokens: NotRequired[list[Token] | list[list[Token]]]
    prompt_logprobs: NotRequired[list[float | None]]
    routed_experts: NotRequired[Routes | list[Routes]]


@closed
class StreamEvent(TypedDict):
    """One `data:` line of a stream. The last of a sequence is `finished` and brings the keys after `details`."""

    token: StreamToken | None
    index: int
    generated_text: None
    finished: bool
    finish_reason: FinishReason | None
    details: None
    weight_version: NotRequired[str]
    usage: NotRequired[Usage]
    prompt_token_ids: NotRequired[list[int]]
    output_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[float | None]]
    routed_experts: NotRequired[Routes]


@closed
class Health(TypedDict):
    """Whether the engine can serve."""

    status: Literal["ok", "stopped"]
    engine: str
    captures: bool


@closed
class Readiness(TypedDict):
    """Whether a request would be served at once."""

    status: Literal["ready", "paused", "stopped", "shutting down"]


@closed
class LayoutFacts(TypedDict):
    """Which layers route, and how."""

    layers: list[int]
    num_experts: int
    top_k: int


@closed
class ModelFacts(TypedDict):
    """The model that is served. Without capture, `fingerprint` and `layout` are null."""

    engine: str
    fingerprint: str | None
    layout: LayoutFacts | None
    weight_version: str
    window: int
    vocab_size: int
    paused: bool


@closed
class Paused(TypedDict):
    """Whether steps are launched."""

    paused: bool


@closed
class Aborted(TypedDict):
    """Which of the requests were under way."""

    aborted: list[str]
    unknown: list[str]


@closed
class WeightsFacts(TypedDict):
    """The weights in force."""

    weight_version: str


@closed
class CaptureChange(TypedDict):
    """Whether routes are captured now."""

    state: Literal["on", "off", "never"]


@closed
class Capacity(TypedDict):
    """Room for rows on the engine's device."""

    rows: int
    bytes: int


@closed
class Captured(TypedDict):
    """What was returned since the server started; `errors` are sequences whose routes were lost."""

    sequences: int
    rows: int
    missing_rows: int
    errors: int


@closed
class ArchiveFacts(TypedDict):
    """Traces that are kept for references, what bounds them, and what became of others."""

    traces: int
    num_bytes: int
    max_bytes: int
    max_seconds: float | None
    deleted: int
    expired: int
    evicted: int
    unfetched: int


@closed
class RoutingFacts(CaptureChange):
    """Where capture and the archive stand. Without capture `layout`, `capacity` and `captured` are null."""

    layout: LayoutFacts | None
    capacity: Capacity | None
    captured: Captured | None
    archive: ArchiveFacts
