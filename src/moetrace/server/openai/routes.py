"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response as HTTPResponse

from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.errors import MoetraceError, RequestError, UnknownModelError
from moetrace.server.errors import openai_facts
from moetrace.server.generation import Generator
from moetrace.server.openai.answers import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList, OpenAIError
from moetrace.server.openai.chat import chat_tokens
from moetrace.server.openai.schemas import ChatRequest, CompletionRequest, OpenAIRequest
from moetrace.server.openai.shapes import ChatShape, Choice, CompletionShape, Response, Shape, reason_of, usage_of
from moetrace.server.openapi import answer as answer_of
from moetrace.server.openapi import either, errors, events
from moetrace.server.schemas import prompts_in
from moetrace.server.streaming import Arrivals, EventStream
from moetrace.server.texts import Tokenizer


def openai_routes(generator: Generator, model_name: str) -> APIRouter:
    """The routes that OpenAI's clients know."""
    router = APIRouter(prefix="/v1")
    card: ModelCard = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "moetrace"}

    refusals = errors(400, 404, 409, 413, 429, 503, form=OpenAIError)

    @router.get("/models", summary="The served model (OpenAI's contract)", responses=errors(form=OpenAIError))
    async def models() -> ModelList:
        return {"object": "list", "data": [card]}

    @router.get(
        "/models/{model:path}", summary="The served model, by its name", responses=errors(404, form=OpenAIError)
    )
    async def model(model: str) -> ModelCard:
        _require_served(model, model_name)
        return card

    @router.post(
        "/completions",
        summary="Continue one prompt, or several (OpenAI's contract)",
        responses=either(answer_of(Completion), events(Completion | OpenAIError, end="[DONE]")) | refusals,
    )
    async def completions(request: CompletionRequest, http: Request) -> HTTPResponse:
        tokenizer = _checked(request)
        sampling = request.sampling()
        prompts = await generator.threads.prompt_tokens(prompts_in(request.prompt), True, tokenizer)
        return await answer(request, http, CompletionShape(), tokenizer, prompts, sampling, request.wants_logprobs)

    @router.post(
        "/chat/completions",
        summary="Answer in a conversation (OpenAI's contract)",
        responses=either(answer_of(ChatCompletion), events(ChatChunk | OpenAIError, end="[DONE]")) | refusals,
    )
    async def chat(request: ChatRequest, http: Request) -> HTTPResponse:
        tokenizer = _checked(request)
        prompt = await generator.threads.run(partial(chat_tokens, request.messages, tokenizer))
        sampling = request.sampling(generator.engine.max_model_len - len(prompt))
        return await answer(request, http, ChatShape(), tokenizer, [prompt], sampling, request.wants_logprobs)

    def _checked(request: OpenAIRequest) -> Tokenizer:
        _require_served(request.model, model_name)
        request.check()
        if generator.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer, and OpenAI's responses are text",
                expected="a checkpoint with a tokenizer",
                fix="Send token ids to /generate.",
            )
        return generator.tokenizer

    async def answer(
        request: OpenAIRequest,
        http: Request,
        shape: Shape,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        sampling: SamplingParams,
        logprobs: bool,
    ) -> HTTPResponse:
        generator.check(prompts, sampling)
        response = Response(shape, model_name, tokenizer, sampling.stop, logprobs)
        with ExitStack() as opened:
            running = opened.enter_context(generator.requests.open(http.state.request_id, len(prompts) * sampling.n))
            if request.stream:
                arrivals = Arrivals()
                generator.queue(prompts, sampling, running, on_progress=arrivals.on_progress)
                for generation in running.generations:
                    arrivals.expect(generation)
                events = _events(response, arrivals, sampling.n, request.wants_usage, generator)
                return EventStream(events, opened.pop_all())
            generator.queue(prompts, sampling, running)
            results = await generator.results(running, http)
            body = await asyncio.to_thread(lambda: json.dumps(response.whole(results), allow_nan=False))
        return HTTPResponse(body, media_type="application/json")

    return router


def _require_served(asked: str, served: str) -> None:
    if asked != served:
        raise UnknownModelError(
            f"the model {asked!r} does not exist",
            expected=served,
            got=asked,
            fix="GET /v1/models names what is served.",
            param="model",
        )


async def _events(
    response: Response, arrivals: Arrivals, n: int, wants_usage: bool, generator: Generator
) -> AsyncIterator[bytes]:
    """Chunks as tokens come; where asked for, the usage; and a mark of the end."""
    choices: dict[int, tuple[Choice, Any]] = {}
    results: dict[int, GenerateResult] = {}
    usage = {"usage": None} if wants_usage else {}
    shape = response.shape

    def chunk(choice: dict[str, Any]) -> bytes:
        return _event(response.chunk([choice]) | usage)

    try:
        async for index, tokens, logprobs, result in arrivals:
            if index not in choices:
                choices[index] = Choice(response.tokenizer, response.stop), generator.metrics.stream(arrivals.began)
                opening = shape.opening(index)
                if opening is not None:
                    yield chunk(opening)
            choice, arrived = choices[index]
            arrived(len(tokens) - choice.seen)
            if result is None:
                text, shown = choice.add(tokens, logprobs)
                if text or shown:
                    yield chunk(shape.delta(index, text, shown if response.logprobs else None, None))
                continue
            results[index] = result
            generator.metrics.finished([result])
            text, shown = await asyncio.to_thread(partial(choice.end, result))
            yield chunk(shape.delta(index, text, shown if response.logprobs else None, reason_of(result)))
        if wants_usage:
            of_prompts = [[results[first + i] for i in range(n)] for first in range(0, len(results), n)]
            yield _event(response.chunk([]) | {"usage": usage_of(of_prompts)})
        yield b"data: [DONE]\n\n"
    except MoetraceError as error:
        yield _event({"error": openai_facts(503, error)})


def _event(facts: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(facts, allow_nan=False).encode() + b"\n\n"
