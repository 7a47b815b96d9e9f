"""`/generate` and `/generate_stream`. Tokenising and encoding run in worker threads, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

from fastapi import APIRouter, Request
from fastapi.responses import Response

from moetrace.dialects import require_id_type
from moetrace.engines.base import Engine, GenerateResult, Generation, Progress, SamplingParams, check_request
from moetrace.errors import FormatError, RequestError
from moetrace.server.requests import RequestTable
from moetrace.server.responses import encode_responses
from moetrace.server.schemas import GenerateParameters, GenerateRequest
from moetrace.server.streaming import Arrivals, EventStream, token_events, unless_disconnected
from moetrace.server.texts import Tokenizer, prompt_tokens


def generation_routes(engine: Engine, tokenizer: Tokenizer | None, requests: RequestTable) -> APIRouter:
    """The routes that generate."""
    router = APIRouter()

    @router.post("/generate", summary="Generate from one prompt, or several (LightLLM's contract)")
    async def generate(request: GenerateRequest, http: Request) -> Response:
        parameters = request.parameters
        sampling = parameters.sampling()
        with requests.open(http.state.request_id) as running:
            prompts = await asyncio.to_thread(prompt_tokens, request.prompts, parameters.add_special_tokens, tokenizer)
            running.generations = submit_all(engine, prompts, sampling, parameters)
            results = await unless_disconnected(http.receive, _results(running.generations))
            body = await asyncio.to_thread(encode_responses, results, request.is_batch, parameters, tokenizer)
        return Response(body, media_type="application/json")

    @router.post("/generate_stream", summary="Generate from one prompt; tokens come as server-sent events")
    async def generate_stream(request: GenerateRequest, http: Request) -> Response:
        parameters = request.parameters
        sampling = parameters.sampling()
        if request.is_batch:
            raise RequestError(
                "a stream has one prompt",
                expected="text, or a list of token ids",
                got=f"a list of {len(request.prompts)} prompts",
                fix="Open a stream for each.",
            )
        with ExitStack() as opened:
            running = opened.enter_context(requests.open(http.state.request_id))
            prompts = await asyncio.to_thread(prompt_tokens, request.prompts, parameters.add_special_tokens, tokenizer)
            arrivals = Arrivals()
            running.generations = submit_all(engine, prompts, sampling, parameters, arrivals.on_progress)
            arrivals.expect(running.generations[0])
            return EventStream(token_events(arrivals, len(prompts[0]), parameters, tokenizer), opened.pop_all())

    return router


async def _results(generations: Sequence[Generation]) -> list[list[GenerateResult]]:
    return [[await asyncio.wrap_future(future) for future in generation.futures] for generation in generations]


def submit_all(
    engine: Engine,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    parameters: GenerateParameters,
    on_progress: Progress | None = None,
) -> list[Generation]:
    """Queue all prompts of a request, or none.

    Raises:
        RequestError: one of them cannot be served as asked.
        EngineError: the engine has stopped.
    """
    for prompt in prompts:
        check_request(engine, prompt, sampling, parameters.return_routed_experts)
        _check_routing(engine, len(prompt), parameters)
    generations: list[Generation] = []
    try:
        for prompt in prompts:
            routes = parameters.return_routed_experts
            generations.append(engine.submit(prompt, sampling, return_routes=routes, on_progress=on_progress))
    except Exception:
        for generation in generations:
            engine.abort(generation.request_id)
        raise
    return generations


def _check_routing(engine: Engine, prompt_length: int, parameters: GenerateParameters) -> None:
    if not 0 <= parameters.routed_experts_start <= prompt_length:
        raise RequestError(
            "routed_experts_start is out of range",
            expected=f"0 <= start <= {prompt_length} prompt tokens",
            got=parameters.routed_experts_start,
            fix="Pass how many rows of the conversation you have: prompt + output - 1 of the turn before.",
        )
    if parameters.return_routed_experts and engine.layout is not None:
        try:
            require_id_type(engine.layout, parameters.routed_experts_dtype)
        except FormatError as error:
            raise RequestError(error.what, expected=error.expected, got=error.got, fix=error.fix) from error
