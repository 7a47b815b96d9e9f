"""`/generate` and `/generate_stream`. Tokenising and encoding run in worker threads, never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from moetrace import codecs
from moetrace.codecs import zstd
from moetrace.dialects import require_id_type
from moetrace.engines.base import Engine, check_request
from moetrace.engines.requests import GenerateResult, Generation, Progress, SamplingParams
from moetrace.errors import FormatError, RequestError
from moetrace.layout import MoeLayout
from moetrace.server.answers import ErrorResponse, GenerateResponse, StreamEvent
from moetrace.server.archive import Archive
from moetrace.server.bodies import BodyResponse
from moetrace.server.config import ServerConfig
from moetrace.server.metrics import Metrics
from moetrace.server.openapi import answer, errors, events
from moetrace.server.requests import RequestTable, Running
from moetrace.server.responses import encode_responses
from moetrace.server.schemas import GenerateParameters, GenerateRequest
from moetrace.server.streaming import Arrivals, EventStream, token_events, unless_disconnected
from moetrace.server.texts import Tokenizer
from moetrace.server.tokenizing import TokenizerThreads


@dataclass(frozen=True)
class Generator:
    """What it takes to serve a request."""

    engine: Engine
    tokenizer: Tokenizer | None
    requests: RequestTable
    config: ServerConfig
    metrics: Metrics
    archive: Archive
    threads: TokenizerThreads = field(default_factory=TokenizerThreads)

    async def submit(
        self, request: GenerateRequest, sampling: SamplingParams, running: Running, on_progress: Progress | None = None
    ) -> None:
        """Tokenise and queue all prompts of a request, or none.

        Raises:
            RequestError: one of them cannot be served as asked.
            EngineError: the engine has stopped.
        """
        parameters, routes = request.parameters, bool(request.parameters.return_routed_experts)
        scores = parameters.return_prompt_logprobs
        prompts = await self.threads.prompt_tokens(request.prompts, parameters.add_special_tokens, self.tokenizer)
        self.check(prompts, sampling, routes, scores)
        for prompt in prompts:
            _check_routing(self.engine, self.archive, len(prompt), parameters)
        self.queue(prompts, sampling, running, routes, scores, on_progress)

    def check(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        return_routes: bool = False,
        return_prompt_logprobs: bool = False,
    ) -> None:
        """Raise `RequestError` unless all prompts can be served as asked."""
        for prompt in prompts:
            self._check_length(len(prompt))
            check_request(self.engine, prompt, sampling, return_routes, return_prompt_logprobs)

    def queue(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        running: Running,
        return_routes: bool = False,
        return_prompt_logprobs: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        """Queue prompts that were checked. Progress is told by the number of a sequence among those of all prompts."""
        for number, prompt in enumerate(prompts):  # if one fails after all, leaving `running` aborts the others
            told = on_progress and _counted_from(number * sampling.n, on_progress)
            running.generations.append(
                self.engine.submit(
                    prompt,
                    sampling,
                    return_routes=return_routes,
                    return_prompt_logprobs=return_prompt_logprobs,
                    on_progress=told,
                )
            )
        if running.is_aborted:
            self.requests.abort([running.request_id])

    async def results(self, running: Running, http: Request) -> list[list[GenerateResult]]:
        """Wait for what was queued: the sequences of each prompt.

        Raises:
            ClientDisconnect: the client has gone.
            EngineError: the engine has stopped.
        """
        results = await unless_disconnected(http.receive, _results(running.generations))
        for sequences in results:
            self.metrics.finished(sequences)
        http.state.facts = _facts(results)
        return results

    def _check_length(self, length: int) -> None:
        limit = self.config.max_prompt_tokens
        if limit is not None and length > limit:
            raise RequestError("the prompt is too long for this server", expected=f"at most {limit} tokens", got=length)


def generation_routes(generator: Generator) -> APIRouter:
    """The routes that generate."""
    router = APIRouter()
    tokenizer, requests, metrics = generator.tokenizer, generator.requests, generator.metrics

    refusals = errors(400, 409, 413, 422, 429, 503)

    @router.post(
        "/generate",
        summary="Generate from one prompt, or several (LightLLM's contract)",
        responses=answer(GenerateResponse | list[GenerateResponse]) | refusals,
    )
    async def generate(request: GenerateRequest, http: Request) -> Response:
        parameters = request.parameters
        sampling = parameters.sampling()
        if parameters.routed_experts_every:
            raise RequestError(
                "routed_experts_every is for streams", expected="it absent, or 0", fix="Use /generate_stream."
            )
        with requests.open(http.state.request_id, len(request.prompts) * sampling.n) as running:
            await generator.submit(request, sampling, running)
            results = await generator.results(running, http)
            body = await asyncio.to_thread(
                encode_responses, results, request.is_batch, parameters, tokenizer, generator.archive
            )
        return BodyResponse(body)

    @router.post(
        "/generate_stream",
        summary="Generate from one prompt; tokens come as server-sent events",
        response_class=Response,
        responses=events(StreamEvent | ErrorResponse) | refusals,
    )
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
            running = opened.enter_context(requests.open(http.state.request_id, sampling.n))
            arrivals = Arrivals()
            await generator.submit(request, sampling, running, arrivals.on_progress)
            arrivals.expect(running.generations[0])
            return EventStream(
                token_events(generator.engine, arrivals, parameters, tokenizer, metrics, generator.archive),
                opened.pop_all(),
            )

    return router


def _counted_from(first: int, on_progress: Progress) -> Progress:
    return lambda sequence, tokens, logprobs: on_progress(first + sequence, tokens, logprobs)


async def _results(generations: Sequence[Generation]) -> list[list[GenerateResult]]:
    return [[await asyncio.wrap_future(future) for future in generation.futures] for generation in generations]


def _facts(results: list[list[GenerateResult]]) -> dict[str, Any]:
    """What the log says of a finished request."""
    sequences = [sequence for of_prompt in results for sequence in of_prompt]
    return {
        "prompt_tokens": sum(len(of_prompt[0].prompt_tokens) for of_prompt in results),
        "output_tokens": sum(len(sequence.output_tokens) for sequence in sequences),
        "finish_reasons": sorted({sequence.finish_reason for sequence in sequences}),
    }


def _check_routing(engine: Engine, archive: Archive, prompt_length: int, parameters: GenerateParameters) -> None:
    if not 0 <= parameters.routed_experts_start <= prompt_length:
        raise RequestError(
            "routed_experts_start is out of range",
            expected=f"0 <= start <= {prompt_length} prompt tokens",
            got=parameters.routed_experts_start,
            fix="Pass how many rows of the conversation you have: prompt + output - 1 of the turn before.",
        )
    if parameters.return_routed_experts and engine.layout is not None:
        codec = parameters.routed_experts_codec
        if parameters.return_routed_experts == "reference":
            archive.require_room_for(engine.layout, prompt_length + parameters.max_new_tokens)
        try:
            if codec is None:
                require_id_type(engine.layout, parameters.routed_experts_dtype)
            else:
                _require_codec(codec, engine.layout)
        except FormatError as error:
            raise RequestError(error.what, expected=error.expected, got=error.got, fix=error.fix) from error


def _require_codec(name: str, layout: MoeLayout) -> None:
    """Raise `FormatError` unless ids of this layout can be packed so, here."""
    base, _, compressed = name.partition("+")
    if base != codecs.AUTO:
        codecs.find(name)[0].check(layout)
    if compressed and not zstd.available():
        raise FormatError(
            f"this server cannot write the codec {name!r}",
            expected=f"{base!r}, or a server with zstd",
            fix="Run on the server: pip install 'moetrace[zstd]'",
        )
