"""What /openapi.json says beyond what FastAPI finds out: answers that are sent as bytes, errors, ranges, the key.

A route declares them by `responses=answer(Type) | errors(400, 503)`. Nothing here runs when a request is served; the
tests hold what is sent against it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from moetrace.server.answers import ErrorResponse
from moetrace.server.config import ServerConfig

Responses = dict[int | str, dict[str, Any]]

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
        "max_new_tokens": {"minimum": 0},
        "min_new_tokens": {"minimum": 0},
        "temperature": {"minimum": 1e-3, "maximum": 1e6},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "n": {"minimum": 1},
        "routed_experts_start": {"minimum": 0},
    }
}
"""Ranges that the parameters' own types do not say, because they are checked further in and are a 400."""
_EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "GenerateRequest": [
        {"inputs": "Hello, world!", "parameters": {"max_new_tokens": 100, "return_routed_experts": True}},
        {"inputs": [72, 105], "parameters": {"do_sample": True, "temperature": 0.7, "return_details": True}},
        {"inputs": "Once", "parameters": {"n": 4, "stop_sequences": ["."], "return_routed_experts": True}},
        {"inputs": "Known text", "parameters": {"max_new_tokens": 0, "return_prompt_logprobs": True}},
    ],
    "CompletionRequest": [
        {"prompt": "Hello, world!", "max_tokens": 100, "temperature": 0},
        {"prompt": ["Once", [72, 105]], "n": 2, "logprobs": 0, "stream": True},
    ],
    "ChatRequest": [{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 100, "logprobs": True}],
    "SGLangRequest": [
        {"text": "Hello, world!", "sampling_params": {"max_new_tokens": 100}, "return_routed_experts": True},
        {"input_ids": [72, 105], "sampling_params": {"temperature": 0}, "return_logprob": True, "stream": True},
    ],
}


def answer(kind: Any, description: str = "As asked.") -> Responses:
    """An answer of JSON."""
    return {200: {"content": {"application/json": {"schema": _schema(kind)}}, "description": description}}


def events(kind: Any, end: str | None = None, description: str = "Server-sent events.") -> Responses:
    """A stream whose events hold JSON; the last one may be a mark."""
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": _schema(kind)}
    data = data if end is None else {"anyOf": [{"const": end}, data]}
    item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}, "description": description}}


def content(media_type: str, description: str) -> Responses:
    """An answer that is not JSON."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}, "description": description}}


def either(*answers: Responses) -> Responses:
    """One of several kinds of content."""
    kinds = {media: schema for each in answers for media, schema in each[200]["content"].items()}
    return {200: {"content": kinds, "description": answers[0][200]["description"]}}


def errors(*statuses: int, form: Any = ErrorResponse) -> Responses:
    """Errors. That of the key is among them."""
    schema = {"application/json": {"schema": _schema(form)}}
    return {status: {"content": schema, "description": _MEANINGS[status]} for status in sorted({401, *statuses})}


def _schema(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}", mode="serialization")


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
    model = {"model": config.served_model_name or "model"}
    for name, examples in _EXAMPLES.items():
        if name in ("CompletionRequest", "ChatRequest"):
            schemas[name]["properties"]["model"]["enum"] = [model["model"]]
            examples = [model | example for example in examples]
        schemas[name]["examples"] = examples
    if config.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_operation(operation, config.api_key is not None and path not in open_paths)
    _move_definitions(document["paths"], schemas)


def _complete_operation(operation: dict[str, Any], needs_key: bool) -> None:
    if needs_key:
        operation["security"] = [{"key": []}]
    responses: dict[str, dict[str, Any]] = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):  # FastAPI's own, which is never sent
        del responses["422"]
    if "409" in responses:
        operation.setdefault("parameters", []).append(_REQUEST_ID)
    for status, response in responses.items():
        names = ["X-Request-Id", *({"401": ["WWW-Authenticate"], "429": ["Retry-After"]}.get(status, []))]
        headers = response.setdefault("headers", {})
        headers |= {name: {"required": True, "schema": {"type": "string"}} for name in names}


def _move_definitions(node: Any, schemas: dict[str, Any]) -> None:
    """Types that schemas bring with them go where references look for them."""
    if isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            assert schemas.setdefault(name, schema) == schema, f"two types are called {name}"
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _move_definitions(child, schemas)
