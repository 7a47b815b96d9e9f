"""`/sglang/...`: the paths that RL systems call on SGLang's server to generate, and to watch and end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.errors import MoetraceError, RequestError
from moetrace.server.answers import ErrorResponse
from moetrace.server.bodies import Body, BodyResponse, encode_json
from moetrace.server.errors import error_facts
from moetrace.server.generation import Generator
from moetrace.server.openapi import Responses, answer, either, errors, events
from moetrace.server.sglang.answers import ModelInfo, SGLangResponse, WeightVersion
from moetrace.server.sglang.responses import Writer
from moetrace.server.sglang.schemas import SGLangRequest
from moetrace.server.streaming import Arrivals, EventStream
from moetrace.server.texts import ShownText

_UNHEALTHY: Responses = {503: {"description": "No."}}
_HEALTH_SECONDS = 20.0
_OFF_LOOP_TOKENS = 256
"""Events of longer sequences are encoded in another thread: each brings the whole sequence."""


class SGLangAbort(BaseModel):
    """Which request to end, or all."""

    model_config = ConfigDict(extra="ignore", strict=True)

    rid: str = Field("", description="its id")
    abort_all: bool = Field(False, description="all requests")


def sglang_routes(generator: Generator) -> APIRouter:
    """The routes that SGLang's clients know."""
    router = APIRouter(prefix="/sglang")
    engine, requests = generator.engine, generator.requests

    @router.post(
        "/generate",
        summary="Generate from one prompt, or several (SGLang's contract)",
        responses=either(
            answer(SGLangResponse | list[SGLangResponse]), events(SGLangResponse | ErrorResponse, end="[DONE]")
        )
        | errors(400, 409, 413, 422, 429, 503),
    )
    async def generate(request: SGLangRequest, http: Request) -> Response:
        request.check()
        prompts = await generator.threads.prompt_tokens(request.prompts, True, generator.tokenizer)
        sampling = request.sampling(engine.max_model_len - max(map(len, prompts), default=0))
        routes, scores = request.return_routed_experts, request.first_logprob is not None
        generator.check(prompts, sampling, routes, scores)
        for prompt in prompts:
            _check_start("routed_experts_start_len", request.routed_experts_start_len, len(prompt))
            _check_start("logprob_start_len", request.first_logprob or 0, len(prompt))
        request_id = request.rid or http.state.request_id
        writer = Writer(request, sampling, request_id, generator.tokenizer, engine.num_layers)
        with ExitStack() as opened:
            running = opened.enter_context(requests.open(request_id, len(prompts) * sampling.n))
            queue = partial(generator.queue, prompts, sampling, running, routes, scores)
            if request.stream:
                arrivals = Arrivals()
                queue(on_progress=arrivals.on_progress)
                for generation in running.generations:
                    arrivals.expect(generation)
                lengths = [len(prompt) for prompt in prompts]
                return EventStream(_events(writer, arrivals, lengths, generator), opened.pop_all())
            queue()
            results = await generator.results(running, http)
            body = await asyncio.to_thread(_whole, writer, results)
        return BodyResponse(body)

    @router.post(
        "/abort_request",
        summary="End requests; their clients get what there is (SGLang's contract)",
        response_class=Response,
        responses=errors(400, 413, 422),
    )
    async def abort_request(request: SGLangAbort) -> Response:
        if request.abort_all:
            requests.abort_all()
        else:
            requests.abort([request.rid])
        return Response()

    @router.get(
        "/health", summary="200 while requests are taken, else 503", response_class=Response, responses=_UNHEALTHY
    )
    async def health() -> Response:
        return Response(status_code=200 if engine.is_healthy() and not requests.is_draining else 503)

    @router.get(
        "/health_generate",
        summary="200 if a token could be generated, else 503",
        response_class=Response,
        responses=_UNHEALTHY | errors(),
    )
    async def health_generate() -> Response:
        with suppress(MoetraceError, TimeoutError):
            if not engine.is_paused and not requests.is_draining:
                generation = engine.submit([0], SamplingParams(max_new_tokens=1))
                try:
                    await asyncio.wait_for(asyncio.wrap_future(generation.futures[0]), _HEALTH_SECONDS)
                finally:
                    engine.abort(generation.request_id)  # one that is done is left alone
                return Response()
        return Response(status_code=503)

    @router.get("/get_model_info", summary="Which model, with which weights", responses=errors())
    @router.get("/model_info", include_in_schema=False)
    async def model_info() -> ModelInfo:
        path = getattr(generator.tokenizer, "name_or_path", None)
        return {
            "model_path": path,
            "tokenizer_path": path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.weight_version,
        }

    @router.get("/get_weight_version", summary="Which weights", responses=errors())
    @router.get("/weight_version", include_in_schema=False)
    async def weight_version() -> WeightVersion:
        return {"weight_version": engine.weight_version}

    return router


def _check_start(name: str, start: int, prompt_length: int) -> None:
    if not 0 <= start <= prompt_length:
        raise RequestError(
            f"{name} is out of range", expected=f"0 <= start <= {prompt_length} prompt tokens", got=start, param=name
        )


def _whole(writer: Writer, results: list[list[GenerateResult]]) -> Body:
    answers = [writer.whole(number, result) for number, of_prompt in enumerate(results) for result in of_prompt]
    return encode_json(answers if writer.request.is_list else answers[0])


async def _events(writer: Writer, arrivals: Arrivals, lengths: list[int], generator: Generator) -> AsyncIterator[Body]:
    """Each sequence so far, as tokens come; at the end a mark."""
    interval = writer.request.sampling_params_given.stream_interval or 1
    streams: dict[int, _Stream] = {}
    try:
        async for index, tokens, logprobs, result in arrivals:
            number = index // writer.sampling.n
            if index not in streams:
                told = generator.metrics.stream(arrivals.began)
                streams[index] = _Stream(writer, number, index, lengths[number], told)
            stream = streams[index]
            stream.arrived(len(tokens))
            if result is not None:
                generator.metrics.finished([result])
                yield await asyncio.to_thread(stream.last, result)
            elif len(tokens) >= stream.sent + interval:
                part = partial(stream.part, tokens, logprobs, generator.engine.weight_version)
                yield part() if len(tokens) < _OFF_LOOP_TOKENS else await asyncio.to_thread(part)
    except MoetraceError as error:
        yield _event({"error": error_facts(error)})
    yield Body(b"data: [DONE]\n\n")


class _Stream:
    """The events of one sequence."""

    def __init__(
        self, writer: Writer, number: int, index: int, prompt_length: int, told: Callable[[int], None]
    ) -> None:
        self._writer, self._number, self._prompt_length, self._told = writer, number, prompt_length, told
        self._index = {"index": index} if writer.request.is_list else {}
        self._shown: ShownText | None = writer.text()
        self._text = ""
        self.sent = self._seen = 0
        """Tokens of the last event."""

    def arrived(self, count: int) -> None:
        """The sequence has that many tokens now."""
        self._told(count - self._seen)
        self._seen = count

    def part(self, tokens: list[int], logprobs: list[float], version: str) -> Body:
        """The sequence so far."""
        if self._shown is not None:
            self._text += "".join(self._shown.add(token) for token in tokens[self.sent :])
        self.sent = len(tokens)
        facts = self._writer.part(self._number, self._prompt_length, self._text, tokens, logprobs, version)
        return _event(facts | self._index)

    def last(self, result: GenerateResult) -> Body:
        """The whole sequence."""
        return _event(self._writer.whole(self._number, result) | self._index)


def _event(facts: dict[str, Any]) -> Body:
    return Body(b"data: ") + encode_json(facts) + Body(b"\n\n")
