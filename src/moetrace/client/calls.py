"""What a client can ask of a server, each as steps (`steps.py`): the one source of `Client` and `AsyncClient`."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from moetrace.client.events import Events
from moetrace.client.refusals import error_of
from moetrace.client.results import Completion, ModelInfo, StreamEvent, TraceReference
from moetrace.client.steps import (
    REQUEST_ID,
    Emit,
    Part,
    Patience,
    Reply,
    Request,
    Sleep,
    Steps,
    Work,
    exchange,
    more,
)
from moetrace.client.wire import (
    Asked,
    Prompt,
    Routes,
    asked_of,
    completions_of,
    only_trace,
    parameters_of,
    understanding,
)
from moetrace.container import BytesSource, Container
from moetrace.errors import FormatError, RequestError, UnreachableError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace


class Calls:
    """The calls of a client: what they need beside their arguments.

    Args:
        patience: how long and how often a request is tried.
        layout: of the model, for LightLLM's own payloads, which do not say it.
    """

    def __init__(self, patience: Patience, layout: MoeLayout | None = None) -> None:
        self._patience, self._layout = patience, layout

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        routes: Routes = True,
        codec: str | None = "bits",
        start: int = 0,
        logprobs: bool = True,
        prompt_logprobs: bool = False,
        request_id: str | None = None,
        **sampling: Any,
    ) -> Steps[list[Completion]]:
        """Generate from one prompt, or several.

        Args:
            inputs: text, or token ids; or a list of such prompts.
            n: sequences to generate from each prompt; a prompt is computed once.
            routes: return the routes (True), where the server keeps them ("reference", see `fetch`), or neither.
            codec: how the routes travel, see `moetrace.codecs.NAMES`: "bits" is the smallest that keeps ranks, "set" is
                smaller and keeps which experts were chosen; None for LightLLM's plain payload.
            start: position of the first row that is wanted: how many rows of the conversation are there already.
            logprobs, prompt_logprobs: return the log-probability of each output token, of each prompt token.
            request_id: to abort it by, and to find it in the server's log; a new one by default.
            sampling: what `moetrace.engines.requests.SamplingParams` has (`max_new_tokens`, `do_sample`, ...), and
                `add_special_tokens`, `skip_special_tokens`. What is not given is as the server has it by default.

        Returns:
            a `Completion` for each sequence: prompts in order, the n sequences of each together.

        Raises:
            RequestError: it cannot be served as asked.
            UnreachableError, ServerError: there is no answer, or not one of `/generate`.
            FormatError, TraceError: its routes are damaged, or not those of its tokens.
        """
        asked = asked_of(inputs, n, routes, start, self._layout)
        parameters = _parameters(asked, codec, prompt_logprobs, sampling)
        parameters |= {"return_details": True} if logprobs else {}
        request = _generation("/generate", asked, parameters, request_id)
        reply = yield from exchange(request, self._patience, self._patience.deadline())
        completions = partial(_completions, reply, asked, request.headers[REQUEST_ID])
        yield Emit((yield Work(completions)))

    def stream(
        self,
        inputs: Prompt,
        *,
        n: int = 1,
        routes: Routes = True,
        codec: str | None = "bits",
        start: int = 0,
        every: int = 0,
        prompt_logprobs: bool = False,
        request_id: str | None = None,
        **sampling: Any,
    ) -> Steps[StreamEvent]:
        """Generate from one prompt; tokens come as they are sampled. Who stops listening ends the request.

        Args:
            inputs: text, or token ids.
            every: let routes come as deltas about every so many tokens, so that none are left to send at the end.
            n, routes, codec, start, prompt_logprobs, request_id, sampling: as of `generate`.

        Yields:
            a `StreamEvent` for each token; the last one of a sequence has its `Completion`, with all its routes.

        Raises:
            MoetraceError: as `generate`. A stream that has begun is not tried again.
        """
        asked = asked_of(inputs, n, routes, start, self._layout)
        if asked.is_batch:
            raise RequestError("a stream has one prompt", got=f"{len(asked.prompts)}", fix="Open a stream for each.")
        parameters = _parameters(asked, codec, prompt_logprobs, sampling)
        if every and routes is not True:
            raise RequestError(
                "every says when to send rows, but none are to be sent", expected="routes=True", got=repr(routes)
            )
        parameters |= {"routed_experts_every": every} if every else {}
        request = _generation("/generate_stream", asked, parameters, request_id, streamed=True)
        deadline = self._patience.deadline()
        yield from exchange(request, self._patience, deadline)
        events = Events(asked, request.headers[REQUEST_ID])
        while data := (yield from more(request, deadline)):
            for event in (yield Work(partial(events.feed, data))):
                yield Emit(event)
        events.end()

    def fetch(self, reference: TraceReference | Mapping[str, Any] | str) -> Steps[RoutingTrace]:
        """The trace that a reference stands for. A download that breaks off goes on where it was.

        Args:
            reference: of a `Completion`, or its fields; or only its `id`, and then the tokens are not checked.

        Raises:
            RequestError: that is no reference.
            StoreError: it was deleted, or has expired.
            FormatError: what came is damaged, or not what was referred to.
            TokenMismatchError: the trace is of other tokens.
        """
        reference = _reference_of(reference)
        known = None if isinstance(reference, str) else reference
        digest = reference if isinstance(reference, str) else reference.id
        path = f"/routing/traces/{digest}" if known is None else known.path
        limit = None if known is None else known.num_bytes
        data = yield from self._download(path, digest, limit)
        sha256 = None if known is None else known.token_sha256
        yield Emit((yield Work(partial(_fetched, data, digest, sha256))))

    def _download(self, path: str, digest: str, limit: int | None) -> Part[bytes]:
        """All bytes of a path, in as many pieces as it takes; only failures that brought nothing count."""
        deadline, data, failures = self._patience.deadline(), bytearray(), 0
        while True:
            rest = {"Range": f"bytes={len(data)}-", "If-Range": f'"{digest}"'} if data else {}
            headers = {"Accept-Encoding": "identity", **rest}
            request = Request("GET", path, headers=headers, repeat="always", streamed=True)
            reply = yield from exchange(request, self._patience, deadline)
            if reply.status != 206:
                data.clear()
            had = len(data)
            try:
                while piece := (yield from more(request, deadline)):
                    data += piece
                    if limit is not None and len(data) > limit:
                        raise FormatError("the trace is larger than its reference says", expected=f"{limit} bytes")
                return bytes(data)
            except UnreachableError:
                failures = 0 if len(data) > had else failures + 1
                pause = self._patience.wait(failures + 1)
                if failures > self._patience.retries or time.monotonic() + pause >= deadline:
                    raise
            yield Sleep(pause)

    def delete(self, reference: TraceReference | Mapping[str, Any] | str) -> Steps[None]:
        """Let the server forget a trace that it keeps.

        Args:
            reference: as of `fetch`.

        Raises:
            RequestError: that is no reference.
            StoreError: it has none, or not any more.
        """
        reference = _reference_of(reference)
        path = f"/routing/traces/{reference}" if isinstance(reference, str) else reference.path
        yield from exchange(Request("DELETE", path), self._patience, self._patience.deadline())
        yield Emit(None)

    def routing(self) -> Steps[dict[str, Any]]:
        """State of the capture: whether it is on, and what it holds."""
        yield Emit((yield from self._ask("GET", "/routing")))

    def start_routing(self) -> Steps[dict[str, Any]]:
        """Capture the routes of what is sent from now on."""
        yield Emit((yield from self._ask("POST", "/routing/start")))

    def stop_routing(self) -> Steps[dict[str, Any]]:
        """Capture no more."""
        yield Emit((yield from self._ask("POST", "/routing/stop")))

    def pause(self) -> Steps[None]:
        """Let the engine launch no step until `resume`."""
        yield from self._ask("POST", "/pause")
        yield Emit(None)

    def resume(self) -> Steps[None]:
        """Go on after `pause`."""
        yield from self._ask("POST", "/resume")
        yield Emit(None)

    def abort(self, *request_ids: str) -> Steps[list[str]]:
        """End requests, all of them if none is named; whoever waits for them gets what there is.

        Returns:
            the ids that were under way.
        """
        body = {"request_ids": list(request_ids)} if request_ids else {"all": True}
        yield Emit((yield from self._ask("POST", "/abort", body))["aborted"])

    def update_weights(self, path: str, version: str) -> Steps[str]:
        """Replace the weights, all or none.

        Args:
            path: a checkpoint folder or a safetensors file, as the server sees it.
            version: name of the weights, recorded with every row.

        Returns:
            the version in force now.

        Raises:
            WeightsError: they do not fit; the old ones stay.
        """
        answer = yield from self._ask("POST", "/update_weights", {"path": path, "version": version})
        yield Emit(answer["weight_version"])

    def model(self) -> Steps[ModelInfo]:
        """Which model the server has, with which weights."""
        yield Emit(_model_of((yield from self._ask("GET", "/model"))))

    def health(self) -> Steps[bool]:
        """Whether the engine can serve, asked once.

        Raises:
            UnreachableError: nobody answers.
        """
        yield Emit((yield from self._look("/health")))

    def ready(self) -> Steps[bool]:
        """Whether a request would be served at once, asked once.

        Raises:
            UnreachableError: nobody answers.
        """
        yield Emit((yield from self._look("/ready")))

    def _ask(self, method: str, path: str, body: Any = None) -> Part[Any]:
        """The JSON that a path answers with. What is lost on the way is asked again only if it changes nothing."""
        request = Request(method, path, body, repeat="always" if method == "GET" else "unsent")
        reply = yield from exchange(request, self._patience, self._patience.deadline())
        return _json(reply, path)

    def _look(self, path: str) -> Part[bool]:
        patience = replace(self._patience, retries=0)
        reply = yield from exchange(Request("GET", path), patience, patience.deadline(), lambda reply: True)
        if reply.status not in (200, 503):
            raise error_of(reply.status, reply.headers, reply.body, path)
        return reply.status == 200


def _generation(
    path: str, asked: Asked, parameters: dict[str, Any], request_id: str | None, streamed: bool = False
) -> Request:
    request_id = uuid.uuid4().hex if request_id is None else request_id
    if not re.fullmatch(r"[\x21-\x7e]{1,120}", request_id):
        raise RequestError("the request id cannot be sent", expected="1 to 120 printable characters", got=request_id)
    inputs = asked.prompts if asked.is_batch else asked.prompts[0]
    headers = {REQUEST_ID: request_id}
    return Request("POST", path, {"inputs": inputs, "parameters": parameters}, headers, "by id", streamed)


def _parameters(asked: Asked, codec: str | None, prompt_logprobs: bool, sampling: dict[str, Any]) -> dict[str, Any]:
    parameters = parameters_of({"n": asked.n, **sampling})
    parameters |= {"return_prompt_logprobs": True} if prompt_logprobs else {}
    if asked.routes:
        parameters["return_routed_experts"] = asked.routes
        parameters |= {} if codec is None else {"routed_experts_codec": codec}
        parameters |= {"routed_experts_start": asked.start} if asked.start else {}
    elif asked.start:
        raise RequestError("start says which routes to return, but none were asked for", got=asked.start)
    return parameters


def _reference_of(reference: TraceReference | Mapping[str, Any] | str) -> TraceReference | str:
    if isinstance(reference, TraceReference | str):
        return reference
    try:
        return TraceReference(**reference)
    except TypeError as error:
        expected = "a TraceReference, its fields, or its id"
        raise RequestError("this is no reference to a trace", expected=expected, got=repr(reference)[:80]) from error


def _json(reply: Reply, path: str) -> Any:
    with understanding(path, reply.body):
        return json.loads(reply.body)


def _completions(reply: Reply, asked: Asked, request_id: str) -> list[Completion]:
    return completions_of(_json(reply, "/generate"), asked, request_id)


def _fetched(data: bytes, digest: str, sha256: str | None) -> RoutingTrace:
    container = Container(BytesSource(data))
    if container.digest != digest:
        raise FormatError("the server sent another trace than was asked for", expected=digest, got=container.digest)
    return only_trace(container, sha256)


def _model_of(answer: Any) -> ModelInfo:
    with understanding("/model", answer):
        known = {knob.name: answer[knob.name] for knob in fields(ModelInfo)}
        layout = answer["layout"]
        if layout is not None:
            known["layout"] = MoeLayout(tuple(layout["layers"]), layout["num_experts"], layout["top_k"])
        return ModelInfo(**known)
