"""`/generate_stream`: what the engine tells on its threads, as server-sent events, with LightLLM's names."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moetrace.engines.base import Engine
from moetrace.engines.requests import GenerateResult, Generation
from moetrace.errors import MoetraceError
from moetrace.server.archive import Archive
from moetrace.server.bodies import Body, encode_json
from moetrace.server.errors import error_facts
from moetrace.server.metrics import Metrics
from moetrace.server.payloads import routes_of
from moetrace.server.responses import token_of, usage_of
from moetrace.server.schemas import GenerateParameters
from moetrace.server.texts import TextStream, Tokenizer
from moetrace.trace import RoutingTrace

Item = TypeVar("Item")
Arrival = tuple[int, list[int], list[float], GenerateResult | None]


class Arrivals:
    """Tokens and results of generations, from the engine's threads to the event loop, in order.

    Sequences are numbered through: those of the first generation that was expected, then those of the next.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Arrival | BaseException] = asyncio.Queue()
        self._open = self._expected = 0
        self.began = time.perf_counter()

    def on_progress(self, sequence: int, tokens: list[int], logprobs: list[float]) -> None:
        """The engine has new tokens."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (sequence, tokens, logprobs, None))

    def expect(self, generation: Generation) -> None:
        """Wait for the results of `generation` too."""
        first, self.generation = self._expected, generation
        self._open += len(generation.futures)
        self._expected += len(generation.futures)
        for number, future in enumerate(generation.futures, first):
            asyncio.wrap_future(future).add_done_callback(partial(self._on_result, number))

    def _on_result(self, number: int, done: asyncio.Future[GenerateResult]) -> None:
        if (error := done.exception()) is not None:
            self._queue.put_nowait(error)
        else:
            result = done.result()
            self._queue.put_nowait((number, result.output_tokens, result.logprobs, result))

    async def __aiter__(self) -> AsyncIterator[Arrival]:
        while self._open:
            arrival = await self._queue.get()
            if isinstance(arrival, BaseException):
                raise arrival
            self._open -= arrival[3] is not None
            yield arrival


async def token_events(
    engine: Engine,
    arrivals: Arrivals,
    parameters: GenerateParameters,
    tokenizer: Tokenizer | None,
    metrics: Metrics,
    archive: Archive,
) -> AsyncIterator[Body]:
    """An event for each token; the last one of a sequence is `finished` and brings what `/generate` would say of it."""
    streams: dict[int, _SequenceEvents] = {}
    try:
        async for number, tokens, logprobs, result in arrivals:
            if number not in streams:
                told = metrics.stream(arrivals.began)
                streams[number] = _SequenceEvents(
                    number, arrivals.generation.prompt_length, parameters, tokenizer, archive, told
                )
            stream = streams[number]
            if result is not None:
                metrics.finished([result])
                yield await asyncio.to_thread(stream.last, result)
            elif stream.wants_rows(len(tokens)):
                read = partial(engine.read_routes, arrivals.generation, number)
                yield await asyncio.to_thread(stream.of_tokens, tokens, logprobs, read)
            else:
                yield stream.of_tokens(tokens, logprobs)
    except MoetraceError as error:
        yield _event({"error": error_facts(error)})


class _SequenceEvents:
    """The events of one sequence."""

    def __init__(
        self,
        number: int,
        prompt_length: int,
        parameters: GenerateParameters,
        tokenizer: Tokenizer | None,
        archive: Archive,
        arrived: Callable[[int], None],
    ) -> None:
        self._number, self._prompt_length = number, prompt_length
        self._parameters, self._tokenizer, self._archive = parameters, tokenizer, archive
        self._text = None if tokenizer is None else TextStream(tokenizer, parameters.skip_special_tokens)
        self._sent, self._arrived = 0, arrived
        self._rows, self._rows_at = parameters.routed_experts_start, 0

    def wants_rows(self, count: int) -> bool:
        """Whether an event that brings `count` tokens in all is to bring rows too."""
        every = self._parameters.routed_experts_every
        return bool(every) and count >= self._rows_at + every

    def of_tokens(
        self,
        tokens: list[int],
        logprobs: list[float],
        read_routes: Callable[[list[int], int], RoutingTrace | None] | None = None,
    ) -> Body:
        """Events of the tokens that were not sent yet, the last one with the rows that were not."""
        events = self._events(tokens, logprobs)
        trace = None if read_routes is None else read_routes(tokens, self._rows)
        if trace is not None and trace.num_rows:
            events[-1]["routed_experts"] = routes_of(trace, self._parameters, self._rows, self._archive)
            self._rows, self._rows_at = trace.stop, len(tokens)
        return _joined(events)

    def last(self, result: GenerateResult) -> Body:
        """Events of the tokens that were not sent yet; the last one ends the sequence."""
        events = self._events(result.output_tokens, result.logprobs)
        last = events.pop() if events else self._event_of(None)
        if self._text is not None and last["token"] is not None:
            last["token"]["text"] += self._text.rest()
        last |= {
            "finished": True,
            "finish_reason": result.finish_reason,
            "weight_version": result.weight_version,
            "usage": usage_of([result]),
            "prompt_token_ids": result.prompt_tokens,
            "output_token_ids": result.output_tokens,
        }
        if result.prompt_logprobs is not None:
            last["prompt_logprobs"] = result.prompt_logprobs
        if result.trace is not None:
            last["routed_experts"] = routes_of(result.trace, self._parameters, self._rows, self._archive)
        return _joined([*events, last])

    def _events(self, tokens: list[int], logprobs: list[float]) -> list[dict[str, Any]]:
        events = []
        self._arrived(len(tokens) - self._sent)
        for token, logprob in zip(tokens[self._sent :], logprobs[self._sent :], strict=True):
            self._sent += 1
            facts = token_of(token, logprob, self._tokenizer)
            facts["text"] = None if self._text is None else self._text.add(token)
            events.append(
                self._event_of(facts | {"count_output_tokens": self._sent, "prompt_tokens": self._prompt_length})
            )
        return events

    def _event_of(self, token: dict[str, Any] | None) -> dict[str, Any]:
        empty = {"generated_text": None, "finished": False, "finish_reason": None, "details": None}
        return {"token": token, "index": self._number, **empty}


def _joined(events: Sequence[dict[str, Any]]) -> Body:
    *small, last = map(_event, events)
    return sum(small, Body()) + last


def _event(facts: dict[str, Any]) -> Body:
    if "routed_experts" in facts:
        return Body(b"data:") + encode_json(facts) + Body(b"\n\n")
    return Body(b"data:" + json.dumps(facts, allow_nan=False).encode() + b"\n\n")


class EventStream(StreamingResponse):
    """Server-sent events until they end or the client goes away; then what was opened for them is closed.

    Args:
        events: encoded events, as bytes or as bodies.
        opened: closed at the end, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes] | AsyncIterator[Body], opened: ExitStack) -> None:
        super().__init__(_pieces(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened, suppress(ClientDisconnect):
            await unless_disconnected(receive, self.stream_response(send))


async def _pieces(events: AsyncIterator[bytes] | AsyncIterator[Body]) -> AsyncIterator[bytes]:
    async for event in events:
        if isinstance(event, bytes):
            yield event
        else:
            async for piece in event.pieces():
                yield piece


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Item]) -> Item:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
