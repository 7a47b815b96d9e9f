"""Engines in this process: moetrace's engine contract, or any function from an `Ask` to `Answer`s."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moetrace.conformance.suite.asking import Answer, Ask, Rows, Subject
from moetrace.engines.base import Engine
from moetrace.engines.requests import GenerateResult, Generation, SamplingParams
from moetrace.errors import CheckError, LackingError, MoetraceError, RequestError
from moetrace.trace import RoutingTrace

_PIECE = 5
"""Tokens after which a stream asks for the rows that are there."""


def subject_of(engine: Any) -> Subject:
    """A subject of an engine, a function, or a subject.

    Raises:
        CheckError: it is none of these.
    """
    if hasattr(engine, "ask") and hasattr(engine, "dialect"):
        return engine
    if hasattr(engine, "submit"):
        return EngineSubject(engine)
    if callable(engine):
        return FunctionSubject(engine)
    raise CheckError("this cannot be asked", expected="an engine, or a function from Ask to Answers", got=type(engine))


def rows_of(trace: RoutingTrace, seams: tuple[int, ...] = ()) -> Rows:
    """A trace as the suite looks at it."""
    return Rows(
        trace.experts_TLK.astype(np.int64),
        trace.valid_T,
        layout=trace.layout,
        order=trace.order,
        start=trace.start,
        seams=seams,
    )


class FunctionSubject:
    """A function, plain (then called in a thread) or async."""

    dialect = "in process"
    window: int | None = None

    def __init__(self, function: Callable[[Ask], Any]) -> None:
        self.name, self._function = getattr(function, "__name__", type(function).__name__), function

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(ask)
            return await asyncio.to_thread(self._function, ask)
        except CheckError:
            raise
        except Exception as error:
            raise CheckError("the function failed", got=repr(error)) from error

    async def update_weights(self, folder: str, version: str) -> None:
        """Functions cannot."""
        raise LackingError("a function has no weights to update")

    async def close(self) -> None:
        """Nothing was opened."""


class EngineSubject:
    """An engine that keeps moetrace's contract, without a server."""

    dialect = "in process"
    window: int | None

    def __init__(self, engine: Engine) -> None:
        self.name, self.window, self._engine = engine.name, engine.max_model_len, engine

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        if ask.start:
            raise LackingError("the engine returns all rows; its server slices them")
        told, stream = asyncio.Queue[list[int]](), ask.stream or ask.abort_after is not None
        loop = asyncio.get_running_loop()

        def on_progress(sequence: int, tokens: list[int], logprobs: list[float]) -> None:
            loop.call_soon_threadsafe(told.put_nowait, tokens)

        try:
            hot = {"do_sample": True, "temperature": ask.temperature} if ask.temperature else {}
            sampling = SamplingParams(ask.max_new_tokens, n=ask.n, ignore_eos=ask.ignore_eos, **hot)  # type: ignore[arg-type]
            generation = self._engine.submit(
                ask.prompt, sampling, return_routes=True, on_progress=on_progress if stream else None
            )
            pieces = await self._follow(ask, generation, told) if stream else []
            results = [await asyncio.wrap_future(future) for future in generation.futures]
        except RequestError as error:
            raise LackingError(error.what, expected=error.expected, got=error.got) from error
        except MoetraceError as error:
            raise CheckError(str(error)) from error
        except Exception as error:  # an engine's error is a finding, and the run goes on
            raise CheckError("the engine failed", got=repr(error)) from error
        return [_answer(result, pieces) for result in results]

    async def _follow(self, ask: Ask, generation: Generation, told: asyncio.Queue[list[int]]) -> list[RoutingTrace]:
        """Read rows while the request runs, or abort it; returns the pieces that were read."""
        pieces: list[RoutingTrace] = []
        done = asyncio.ensure_future(asyncio.wait([asyncio.wrap_future(future) for future in generation.futures]))
        count = 0
        while not done.done():
            news = asyncio.ensure_future(told.get())
            await asyncio.wait([news, done], return_when=asyncio.FIRST_COMPLETED)
            if not news.done():
                news.cancel()
                break
            tokens = news.result()
            if ask.abort_after is not None and len(tokens) >= ask.abort_after:
                self._engine.abort(generation.request_id)
                break
            if ask.stream and len(tokens) >= count + _PIECE:
                count, start = len(tokens), pieces[-1].stop if pieces else 0
                piece = await asyncio.to_thread(self._engine.read_routes, generation, 0, tokens, start)
                if piece is not None and piece.num_rows:
                    pieces.append(piece)
        await done
        return pieces

    async def update_weights(self, folder: str, version: str) -> None:
        """See `Subject`."""
        try:
            await asyncio.to_thread(self._engine.update_weights, folder, version)
        except MoetraceError as error:
            raise CheckError(str(error)) from error
        except Exception as error:
            raise CheckError("the engine failed", got=repr(error)) from error

    async def close(self) -> None:
        """The engine goes on."""


def _answer(result: GenerateResult, pieces: list[RoutingTrace]) -> Answer:
    output = tuple(result.output_tokens)
    if result.trace is None:
        return Answer(output, result.finish_reason, None)
    rows = rows_of(result.trace)
    if pieces:
        parts = [*map(rows_of, pieces), rows_of(result.trace.slice(pieces[-1].stop, result.trace.stop))]
        rows = Rows(
            np.concatenate([part.ids_TLK for part in parts]),
            np.concatenate([part.valid_T for part in parts]),
            layout=rows.layout,
            order=rows.order,
            start=parts[0].start,
            seams=tuple(np.cumsum([len(part.ids_TLK) for part in parts])[:-1].tolist()),
        )
    return Answer(output, result.finish_reason, rows)
