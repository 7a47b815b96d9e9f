"""What is said to a server and what its answers mean: `/generate`, with LightLLM's names. Pure functions, no HTTP."""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

from moetrace.client.results import Completion, TraceReference
from moetrace.container import BytesSource, Container
from moetrace.dialects import from_lightllm
from moetrace.engines.requests import SamplingParams
from moetrace.errors import FormatError, RequestError, ServerError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.tokens import token_sha256
from moetrace.trace import RoutingTrace

Prompt = str | Sequence[int]
Routes = Literal["reference"] | bool

_STOPS = ("stop", "stop_token_ids", "stop_sequences")
"""What `SamplingParams` keeps apart and LightLLM has in one list."""
_TEXT = ("add_special_tokens", "skip_special_tokens")
"""How the server's tokenizer is used; booleans that the server checks."""


def _are(kind: type | tuple[type, ...], values: Any) -> bool:
    is_list = isinstance(values, list | tuple)
    return is_list and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{
        name: ("an integer", lambda value: _are(int, [value]))
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n")
    },
    **{name: ("a number", lambda value: _are((int, float), [value])) for name in ("temperature", "top_p")},
    "seed": ("an integer, or none", lambda value: value is None or _are(int, [value])),
    "stop": ("a text, or a list of texts", lambda value: isinstance(value, str) or _are(str, value)),
    "stop_token_ids": ("a list of token ids", lambda value: _are(int, value)),
    "stop_sequences": (
        "a list of lists of token ids",
        lambda value: isinstance(value, list | tuple) and all(_are(int, run) for run in value),
    ),
    **{name: ("true or false", lambda value: isinstance(value, bool)) for name in _TEXT},
}
"""What is of which type, down to the elements; `SamplingParams` looks at the ranges."""


@dataclass(frozen=True)
class Asked:
    """What a request asked for, as far as its answer must be checked against it."""

    prompts: list[str | list[int]]
    is_batch: bool
    n: int
    routes: Routes
    start: int
    layout: MoeLayout | None


def sampling_of(given: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request, checked by `SamplingParams`. Lists may stand for tuples, and a text for `(text,)`.

    Raises:
        RequestError: one is unknown, of a wrong type, or out of range.
    """
    names = [knob.name for knob in fields(SamplingParams)]
    for name in given:
        if name not in (*names, *_TEXT):
            raise RequestError(f"parameter {name!r} is unknown", expected=", ".join((*names, *_TEXT)), got=name)
        expected, fits = _KINDS.get(name, ("", None))
        if fits is not None and not fits(given[name]):
            raise RequestError(f"{name} has a wrong type", expected=expected, got=repr(given[name]), param=name)
    values = {name: _frozen(value) for name, value in given.items() if name not in _TEXT}
    if isinstance(given.get("stop"), str):
        values["stop"] = (given["stop"],)
    return SamplingParams(**values)


def parameters_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the wire: what was given, and nothing else, so that the server's defaults hold for the rest.

    Raises:
        RequestError: as `sampling_of`.
    """
    sampling = sampling_of(given)
    parameters = {name: getattr(sampling, name, value) for name, value in given.items() if name not in _STOPS}
    stops = [*sampling.stop, *([token] for token in sampling.stop_token_ids), *map(list, sampling.stop_sequences)]
    return parameters | ({"stop_sequences": stops} if stops else {})


def asked_of(inputs: Prompt | Sequence[Prompt], n: int, routes: Routes, start: int, layout: MoeLayout | None) -> Asked:
    """One prompt or several as what the wire takes: text, or lists of plain integers.

    Raises:
        RequestError: a prompt is neither.
    """
    is_batch = _is_run(inputs) and any(isinstance(item, str) or hasattr(item, "__len__") for item in inputs)
    prompts: Sequence[Any] = inputs if is_batch else [inputs]
    plain = [prompt if isinstance(prompt, str) else _token_ids(prompt) for prompt in prompts]
    return Asked(plain, is_batch, n, routes, start, layout)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Whole numbers as Python's; `int` alone would round others, and read texts."""
    if _is_run(prompt):
        with suppress(TypeError):
            return [int(operator.index(token)) for token in prompt]
    raise RequestError(
        "the prompt is neither text nor token ids",
        expected="text, whole numbers, or a list of such prompts",
        got=repr(prompt)[:80],
    )


def _is_run(value: Any) -> bool:
    """Whether it holds items one after the other; text and bytes do not, and a mapping's keys are no prompts."""
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping | Set)


@dataclass(frozen=True)
class Said:
    """What a server said of one sequence.

    Attributes:
        payloads: its routes, all at once or as deltas, each with the number of output tokens there were.
    """

    prompt: list[int]
    output: list[int]
    text: str | None
    logprobs: list[float] | None
    prompt_logprobs: list[float | None] | None
    finish_reason: str
    weight_version: str | None
    payloads: list[tuple[dict[str, Any], int]]


def completions_of(answer: Any, asked: Asked, request_id: str) -> list[Completion]:
    """The sequences of an answer of `/generate`: prompts in order, the sequences of each together.

    Raises:
        ServerError: it is not an answer of `/generate` to this request.
        FormatError: its routes are damaged.
        TraceError: its routes are not those of its tokens.
    """
    with understanding("/generate", answer):
        answers = answer if asked.is_batch else [answer]
        said = [_said(one, prompt, asked.n) for prompt, one in zip(asked.prompts, answers, strict=True)]
        return [
            completion_of(one, number, index, asked, request_id)
            for number, of_prompt in enumerate(said)
            for index, one in enumerate(of_prompt)
        ]


def _said(answer: dict[str, Any], prompt: str | list[int], n: int) -> list[Said]:
    """Of each sequence of a prompt: the answer has single values, and lists only where there are several."""

    def each(name: str) -> list[Any]:
        values = answer.get(name)
        return [values] * n if n == 1 or values is None else list(values)

    ids = prompt_tokens_of(answer, prompt)
    texts = answer.get("generated_text") or [None] * n
    names = ("output_token_ids", "tokens", "finish_reason", "weight_version", "routed_experts")
    said = []
    for text, output, details, reason, version, payload in zip(texts, *map(each, names), strict=True):
        output = [token["id"] for token in details] if output is None else output
        logprobs = None if details is None else [token["logprob"] for token in details]
        payloads = [] if payload is None else [(payload, len(output))]
        said.append(Said(ids, output, text, logprobs, answer.get("prompt_logprobs"), reason, version, payloads))
    if len(said) != n:
        raise ValueError(f"{len(said)} sequences, not {n}")
    return said


def prompt_tokens_of(answer: dict[str, Any], prompt: str | list[int]) -> list[int]:
    """Token ids of the prompt: as the server says, or as they were sent to one that does not say.

    Raises:
        ServerError: nobody knows them, or the server had others than were sent.
    """
    told = answer.get("prompt_token_ids")
    if isinstance(prompt, str):
        if told is None:
            raise ServerError(
                "the server does not say which token ids the prompt had",
                expected="prompt_token_ids",
                got=", ".join(answer),
                fix="Send the prompt as token ids.",
            )
        return list(told)
    if told not in (None, prompt):
        raise ServerError("the answer is of another prompt", expected=prompt[:20], got=told[:20])
    return prompt


def completion_of(said: Said, number: int, index: int, asked: Asked, request_id: str) -> Completion:
    """A sequence with its routes, or where they are, checked against its tokens.

    Raises:
        ServerError: routes were asked for, and there are none.
        FormatError: they are damaged, or have other rows than the tokens ask for.
        TraceError: they were recorded on other tokens, or break their contract.
    """
    trace = reference = None
    tokens = said.prompt + said.output
    if any("reference" in payload for payload, _ in said.payloads):
        ((payload, _),) = said.payloads
        reference = _reference_of(payload, tokens)
    elif said.payloads:
        base = len(said.prompt)
        trace = _joined([_trace_of(payload, tokens[: base + count], asked) for payload, count in said.payloads])
        _require_rows(trace, said, asked)
    elif asked.routes:
        raise ServerError("routes were asked for, and the answer has none", expected="routed_experts")
    return Completion(
        request_id=request_id,
        prompt_number=number,
        index=index,
        prompt_tokens=said.prompt,
        tokens=said.output,
        text=said.text,
        logprobs=said.logprobs,
        prompt_logprobs=said.prompt_logprobs,
        finish_reason=said.finish_reason,
        weight_version=said.weight_version,
        trace=trace,
        reference=reference,
    )


def _trace_of(payload: dict[str, Any], tokens: list[int], asked: Asked) -> RoutingTrace:
    """The trace in a payload, plain or in a container."""
    if payload.get("format") != "moetrace":
        return from_lightllm(payload, tokens, asked.layout)
    try:
        data = base64.b64decode(payload["data"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the payload's data is not base64 ({error!r})") from error
    return only_trace(Container(BytesSource(data)), token_sha256(tokens)).with_tokens(tokens)


def only_trace(container: Container, sha256: str | None) -> RoutingTrace:
    """The one trace of a container.

    Raises:
        FormatError: it holds another number of traces, or is damaged.
        TokenMismatchError: the trace was recorded on other tokens than those with this hash.
    """
    if len(container) != 1:
        raise FormatError("the container is not that of one sequence", expected="1 trace", got=len(container))
    trace = container[0]
    if sha256 not in (None, trace.token_sha256):
        raise TokenMismatchError(
            "the routes were recorded on other tokens than the response has", expected=sha256, got=trace.token_sha256
        )
    return trace


def _joined(deltas: list[RoutingTrace]) -> RoutingTrace:
    """Deltas as one trace; in pairs, so that a row is copied once for each doubling."""
    while len(deltas) > 1:
        pairs = [left.concat(right) for left, right in zip(deltas[::2], deltas[1::2], strict=False)]
        deltas = pairs + deltas[len(pairs) * 2 :]
    return deltas[0]


def _require_rows(trace: RoutingTrace, said: Said, asked: Asked) -> None:
    """Raise `FormatError` unless the rows are those from `start` on of P + O - 1, or P where nothing was generated."""
    rows = len(said.prompt) + len(said.output) - bool(said.output)
    stop = min(trace.stop, rows) if said.finish_reason == "abort" else rows  # an aborted sequence may have fewer
    if (trace.start, trace.stop) != (min(asked.start, stop), stop):
        counts = f"{len(said.prompt)} prompt and {len(said.output)} output tokens"
        raise FormatError(
            "the routes have other rows than were asked for",
            expected=f"positions {asked.start} to {rows} of {counts}",
            got=f"{trace.start} to {trace.stop}",
        )


def _reference_of(payload: dict[str, Any], tokens: list[int]) -> TraceReference:
    facts, digest = payload["reference"], token_sha256(tokens)
    if payload.get("token_sha256", digest) != digest:
        raise TokenMismatchError(
            "the reference is to routes of other tokens", expected=digest, got=payload["token_sha256"]
        )
    return TraceReference(
        id=facts["id"],
        path=facts["path"],
        num_bytes=facts["num_bytes"],
        codec=facts["codec"],
        token_sha256=digest,
        expires_at=facts.get("expires_at"),
    )


@contextmanager
def understanding(path: str, said: Any) -> Iterator[None]:
    """Whatever goes wrong within because `said` is not what `path` answers, as one error."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ServerError(
            f"the answer is not one of {path} ({error!r})", got=repr(said)[:200], fix="Is this a moetrace server?"
        ) from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
