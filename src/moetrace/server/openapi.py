"""What /openapi.json says of answers, errors and ranges. Nothing here runs when a request is served.

Answers leave as bytes that were encoded elsewhere; the types here say what is in them, and the tests hold every answer
against them. A route declares its errors by `responses={200: ..., **errors(400, 503)}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from fastapi import FastAPI
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on

from moetrace.dialects import AxisOrder, IdType
from moetrace.engines.base import FinishReason
from moetrace.server.config import ServerConfig
from moetrace.server.schemas import NEUTRAL
from moetrace.trace import Order

_closed = with_config(ConfigDict(extra="forbid"))


@_closed
class ErrorFacts(TypedDict):
    """What went wrong, and what to do."""

    type: str
    message: str
    expected: NotRequired[str]
    got: NotRequired[str]
    fix: NotRequired[str]


@_closed
class ErrorResponse(TypedDict):
    """Every error."""

    error: ErrorFacts


@_closed
class Usage(TypedDict):
    """Tokens of a prompt and of all its sequences."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@_closed
class Token(TypedDict):
    """An output token; without a tokenizer `text` and `special` are null."""

    id: int
    text: str | None
    logprob: float
    special: bool | None


@_closed
class StreamToken(Token):
    """An output token of a stream, and how many there are with it."""

    count_output_tokens: int
    prompt_tokens: int


@_closed
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


@_closed
class RoutedExperts(Description):
    """The routes of one sequence: base64 of ids of type `dtype` in the order of `layout`."""

    dtype: IdType
    data: str
    layout: AxisOrder


@_closed
class RoutedContainer(Description):
    """The routes of one sequence: base64 of a container, see docs/format.md."""

    layout: Literal["TLK"]
    codec: str
    format: Literal["moetrace"]
    data: str


@_closed
class TraceReference(TypedDict):
    """A container that the server keeps; `expires_at` is in seconds since 1970, null where no age ends it."""

    id: str
    path: str
    num_bytes: int
    codec: str
    sha256: str
    expires_at: float | None


@_closed
class RoutedReference(Description):
    """Where the routes of one sequence are."""

    layout: Literal["TLK"]
    reference: TraceReference


Routes = RoutedExperts | RoutedContainer | RoutedReference


@_closed
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
    routed_experts: NotRequired[Routes | list[Routes]]


@_closed
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
    routed_experts: NotRequired[Routes]


@_closed
class Health(TypedDict):
    """Whether the engine can serve."""

    status: Literal["ok", "stopped"]
    engine: str
    captures: bool


@_closed
class Readiness(TypedDict):
    """Whether a request would be served at once."""

    status: Literal["ready", "paused", "stopped", "shutting down"]


@_closed
class LayoutFacts(TypedDict):
    """Which layers route, and how."""

    layers: list[int]
    num_experts: int
    top_k: int


@_closed
class ModelFacts(TypedDict):
    """The model that is served. Without capture, `fingerprint` and `layout` are null."""

    engine: str
    fingerprint: str | None
    layout: LayoutFacts | None
    weight_version: str
    window: int
    vocab_size: int
    paused: bool


@_closed
class Paused(TypedDict):
    """Whether steps are launched."""

    paused: bool


@_closed
class Aborted(TypedDict):
    """Which of the requests were under way."""

    aborted: list[str]
    unknown: list[str]


@_closed
class WeightsFacts(TypedDict):
    """The weights in force."""

    weight_version: str


@_closed
class CaptureChange(TypedDict):
    """Whether routes are captured now."""

    state: Literal["on", "off", "never"]


@_closed
class Capacity(TypedDict):
    """Room for rows on the engine's device."""

    rows: int
    bytes: int


@_closed
class Captured(TypedDict):
    """What was returned since the server started; `errors` are sequences whose routes were lost."""

    sequences: int
    rows: int
    missing_rows: int
    errors: int


@_closed
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


@_closed
class RoutingFacts(CaptureChange):
    """Where capture and the archive stand. Without capture `layout`, `capacity` and `captured` are null."""

    layout: LayoutFacts | None
    capacity: Capacity | None
    captured: Captured | None
    archive: ArchiveFacts


_MEANINGS = {
    400: "It cannot be served as asked.",
    401: "The key is missing or wrong.",
    404: "It is not there.",
    409: "The X-Request-Id is that of a request under way.",
    413: "The body is too large.",
    416: "The range begins after the end; Content-Range says how many bytes there are.",
    422: "The body is not JSON, or has wrong types.",
    429: "Too much is under way; Retry-After says when to come again.",
    503: "The engine has stopped, or the server is shutting down.",
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The request's id, 1 to 128 printable characters; anything else is replaced by a new one.",
}
RANGES: dict[str, dict[str, dict[str, float]]] = {
    "GenerateParameters": {
        "max_new_tokens": {"minimum": 1},
        "min_new_tokens": {"minimum": 0},
        "temperature": {"minimum": 1e-3, "maximum": 1e6},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "n": {"minimum": 1},
        "routed_experts_start": {"minimum": 0},
    }
}
"""Ranges that the parameters' own types do not say, because they are checked further in and are a 400."""
_EXAMPLES = [
    {"inputs": "Hello, world!", "parameters": {"max_new_tokens": 100, "return_routed_experts": True}},
    {"inputs": [72, 105], "parameters": {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "return_details": True}},
    {
        "inputs": "Once",
        "parameters": {"n": 4, "stop_sequences": ["."], "return_routed_experts": True, "routed_experts_layout": "TLK"},
    },
]

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """Errors of a route, for its `responses`. That of the key is among them."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in sorted({401, *statuses})}


def answer(model: Any, description: str = "") -> Responses:
    """The answer of a route that sends bytes, for its `responses`."""
    return {200: {"model": model, "description": description or "As asked."}}


def content(media_type: str, description: str) -> Responses:
    """An answer that is not JSON."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}, "description": description}}


def describe(app: FastAPI, config: ServerConfig, open_paths: tuple[str, ...]) -> None:
    """Complete the application's OpenAPI document by what its routes cannot say.

    Args:
        app: with all its routes.
        config: whether a key is needed.
        open_paths: paths that need none.
    """
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generated(), config, open_paths)
        return generated()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], config: ServerConfig, open_paths: tuple[str, ...]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name, ranges in RANGES.items():
        for parameter, bounds in ranges.items():
            schemas[name]["properties"][parameter] |= bounds
    schemas["GenerateRequest"]["examples"] = _EXAMPLES
    parameters = schemas["GenerateParameters"]
    parameters["additionalProperties"] = False
    for name, values in NEUTRAL.items():
        parameters["properties"][name] = {"enum": list(values), "description": "not supported; accepted when neutral"}
    if config.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(operation, config.api_key is not None and path not in open_paths)


def _complete_operation(operation: dict[str, Any], needs_key: bool) -> None:
    if needs_key:
        operation["security"] = [{"key": []}]
    responses: Mapping[str, dict[str, Any]] = operation["responses"]
    if "409" in responses:
        operation.setdefault("parameters", []).append(_REQUEST_ID)
    for status, response in responses.items():
        stream = response.get("content", {}).get("text/event-stream", {})
        if "schema" in stream:  # FastAPI describes what is in an event, as if it were the whole, and a string
            event = {key: value for key, value in stream.pop("schema").items() if key != "type"}
            data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event}
            stream["itemSchema"] = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        if int(status) >= 400:  # FastAPI describes errors with the type of the route's answers
            response["content"] = {"application/json": next(iter(response["content"].values()))}
        headers = response.setdefault("headers", {})
        headers["X-Request-Id"] = {"required": True, "schema": {"type": "string"}}
        if status == "429":
            headers["Retry-After"] = {"required": True, "schema": {"type": "string"}}
        if status == "401":
            headers["WWW-Authenticate"] = {"required": True, "schema": {"type": "string"}}
