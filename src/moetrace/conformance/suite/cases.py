"""What is asked, and why. Each case is a check of the report; its docstring says what it is for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moetrace.conformance.suite.asking import Ask
from moetrace.conformance.suite.session import Session
from moetrace.errors import LackingError

_CHUNKS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_HOT = 100.0
"""A temperature at which samples part: the margin of a dye's next token is some 30."""


@dataclass(frozen=True)
class Case:
    """One check.

    Attributes:
        name: as in the report.
        run: asks; what it raises as `LackingError` is why the check was skipped.
    """

    name: str
    run: Callable[[Session], Awaitable[None]]

    @property
    def why(self) -> str:
        """What it is for."""
        return " ".join((inspect.getdoc(self.run) or "").split())


async def length(session: Session) -> None:
    """P + O - 1 rows when the output ends by length: the last sampled token was never an input."""
    sizes = [(2, 1), (5, 1), (5, 2), (17, 3), (31, 16), (33, 7), (64, 2), (100, 33)]
    await session.all([Ask(session.tokens(prompt), output) for prompt, output in sizes])


async def one_token(session: Session) -> None:
    """A prompt of one token: no row of a prefill that could hide an error of the first decode."""
    await session.all([Ask(session.tokens(1), output) for output in (1, 2, 9, 24)])


async def stop(session: Session) -> None:
    """P + O - 1 rows when an end-of-sequence token ends the output, at once or later."""
    if session.form.eos_token_id is None:
        raise LackingError("the checkpoint has no end-of-sequence token", fix="Write it with: moetrace dye --eos")
    asks = [
        Ask((*session.tokens(prompt - 1), session.before_end(distance)), distance + 8, ignore_eos=False)
        for prompt in (1, 12, 40)
        for distance in (1, 2, 5, 20)
    ]
    await session.all(asks)


async def scoring(session: Session) -> None:
    """Scoring (no new tokens): all P rows, the last one too."""
    await session.all([Ask(session.tokens(prompt), 0) for prompt in (1, 2, 9, 65)], optional=True)


async def streamed(session: Session) -> None:
    """Streams bring the same rows, each once, however they are cut into pieces; also where many run at once."""
    sizes = [(7, 1), (20, 40), (70, 24), *[(30, 24)] * (session.plan.requests // 8)]
    await session.all([Ask(session.tokens(prompt), output, stream=True) for prompt, output in sizes], optional=True)


async def samples(session: Session) -> None:
    """n > 1: every sample has its own rows. The samples are drawn hot, so that their tokens differ."""
    asks = [Ask(session.tokens(prompt), 14, n=count, temperature=_HOT) for prompt, count in [(21, 2), (1, 3), (64, 4)]]
    await session.all(asks, optional=True)


async def offsets(session: Session) -> None:
    """A start offset spares the rows of earlier turns: the payload is exactly the suffix."""
    prompt = session.tokens(40)
    await session.all([Ask(prompt, 9, start=start, cached=40) for start in (1, 17, 39)], optional=True)
    first = session.tokens(24)
    for answer in await session.one(Ask(first, 12)):
        turn = (*first, *answer.output, *session.tokens(6))
        await session.one(Ask(turn, 8, start=35, cached=35), optional=True)


async def aborted(session: Session) -> None:
    """A request that is aborted keeps the rows of what it had generated."""
    room = min(session.max_tokens - 64, session.plan.pressure_tokens * 4)
    asks = [Ask(session.tokens(prompt), room, abort_after=after) for prompt, after in [(8, 4), (33, 12), (48, 24)]]
    answers = [answer for of_ask in await session.all(asks, optional=True) for answer in of_ask]
    early = sum(answer.finish_reason == "abort" for answer in answers)
    if answers and not early:
        session.tally.notes.append("every request had ended before the abort reached it")


async def prefix_full(session: Session) -> None:
    """The whole prompt was computed before: its rows come with the cached keys and values, right ones."""
    prompts = [session.tokens(size) for size in (16, 64, 129, 300)]
    await session.all([Ask(prompt, 4) for prompt in prompts])
    for output in (4, 1):
        await session.all([Ask(prompt, output, cached=len(prompt)) for prompt in prompts])
    await session.all([Ask(prompts[2], 6, cached=129)] * 6)


async def prefix_partial(session: Session) -> None:
    """A part of the prompt was computed before, by another prompt or an earlier turn, cut at any place."""
    shared = session.tokens(260)
    first = await session.one(Ask(shared, 20))
    cuts = (1, 15, 16, 17, 31, 64, 100, 128, 200, 255, 256, 257, 260)
    await session.all([Ask((*shared[:cut], *session.tokens(23)), 5, cached=cut) for cut in cuts])
    for answer in first:
        turn = (*shared, *answer.output, *session.tokens(9))
        await session.all([Ask(turn, 8, cached=279)] * 2)


async def prefix_evicted(session: Session) -> None:
    """A prompt was computed, pushed out of the cache by others, and comes again."""
    prompts = [session.tokens(size) for size in (48, 130, 257)]
    await session.all([Ask(prompt, 6) for prompt in prompts])
    size, flood = min(session.max_tokens // 2, 2000), session.plan.flood_tokens
    await session.all([Ask(session.tokens(size), 1) for _ in range(-(-flood // size))])
    await session.all([Ask(prompt, 6, cached=len(prompt)) for prompt in prompts])
    await session.all([Ask((*prompt, *session.tokens(11)), 3, cached=len(prompt)) for prompt in prompts])
    session.tally.notes.append(f"{flood} tokens between; whether that emptied the cache cannot be seen from outside")


async def chunked(session: Session) -> None:
    """Long prompts, prefilled in chunks: lengths around the usual chunk sizes, alone and together."""
    lengths = [chunk + by for chunk in _CHUNKS for by in (-1, 0, 1)]
    lengths += [session.max_tokens // 2 + 3, session.max_tokens - 4]
    fitting = sorted({size for size in lengths if 1 <= size <= session.max_tokens - 4})
    for size in fitting:
        try:
            await session.one(Ask(session.tokens(size), 3), optional=True)
        except LackingError as error:
            if size <= 64:
                raise
            session.tally.notes.append(f"prompts of {size} tokens and more were refused: {error.what}")
            break
    together = [size for size in fitting if size <= 1025]
    await session.all([Ask(session.tokens(size), 2) for size in together])


async def load(session: Session) -> None:
    """Many requests of mixed lengths at once: no row of a neighbour in the batch, none lost."""
    asks = []
    for _ in range(session.plan.requests):
        prompt = min(int(2 ** session.random.uniform(0, 8.5)), session.max_tokens - 64)
        asks.append(Ask(session.tokens(prompt), session.random.randint(1, 48)))
    await session.all(asks)


async def preemption(session: Session) -> None:
    """Long outputs, all at once: an engine short of cache preempts and computes again; the first rows count."""
    output = min(session.plan.pressure_tokens, session.max_tokens - 100)
    await session.all([Ask(session.tokens(20 + i % 60), output) for i in range(session.plan.pressure)])
    session.tally.notes.append("start the engine with a small cache: whether it preempted cannot be seen from outside")


async def edges(session: Session) -> None:
    """Ids at the edges of integer types: 127, 128, 255 (a fill value elsewhere), 256 and the highest."""
    form = session.form
    near = {127, 128, 255, 256, form.num_experts - 1} & set(range(form.num_experts))
    if form.num_experts <= 128:
        fix = "Write a dye with --num-experts 257 or more, and one with 256."
        raise LackingError(f"{form.num_experts} experts pass no edge of an integer type", fix=fix)
    routes_VLK = form.routes(np.arange(form.vocab_size - 1))
    tokens = []
    for expert in sorted(near):
        holders = np.flatnonzero((routes_VLK == expert).any(axis=(1, 2)))
        tokens += [int(token) for token in holders[:: max(1, len(holders) // 8)][:8]]
    await session.all([Ask(tuple(tokens[i:] + tokens[:i]), 4) for i in range(0, len(tokens), 7)])
    if len(near) < 5:
        session.tally.notes.append(f"{form.num_experts} experts reach the edges {sorted(near)}")


async def repeatable(session: Session) -> None:
    """The same request again, alone and among others: each answer is judged by one form, so right ones are equal."""
    asks = [Ask(session.tokens(size), 9) for size in (1, 30, 90)]
    again = [replace(ask, cached=len(ask.prompt)) for ask in asks]
    for ask in (*asks, *again):
        await session.one(ask)
    await session.all([*again, *(Ask(session.tokens(33), 12) for _ in range(8))])


async def weights(session: Session) -> None:
    """New weights: rows before follow the old ones, rows after the new ones, and no cached prefix brings old rows."""
    if session.newer is None:
        raise LackingError("there is no second checkpoint", fix="Write one with --weight-version 1, pass --update-dye.")
    newer_folder, newer, folder = session.newer
    session.world.coming = newer
    older, prompts = session.form, [session.tokens(size) for size in (40, 100, 200)]
    await session.all([Ask(prompt, 6) for prompt in prompts])
    output = min(session.plan.pressure_tokens, session.max_tokens - 100)
    running = [asyncio.ensure_future(session.one(Ask(session.tokens(20), output, switches=True))) for _ in range(4)]
    await asyncio.sleep(0.05)
    try:
        for path, form in ((newer_folder, newer), (folder, older)):
            await session.update_weights(path, form)
            await asyncio.gather(*running)
            running = []
            again = [Ask(prompt, 6, cached=len(prompt)) for prompt in prompts]
            await session.all([*again, *(Ask(session.tokens(50), 6) for _ in range(3))])
    finally:
        await asyncio.gather(*running, return_exceptions=True)


async def offset_at_end(session: Session) -> None:
    """A start at the end of the prompt gets the rows of the output, or is refused; the engine lives on."""
    prompt, refusal = session.tokens(40), None
    try:
        await session.one(Ask(prompt, 9, start=40, cached=40), optional=True)
    except LackingError as error:
        refusal = error
    await session.one(Ask(session.tokens(12), 5))
    if refusal is not None:
        raise refusal


CASES: Sequence[Case] = (
    Case("length", length),
    Case("one-token prompt", one_token),
    Case("stop", stop),
    Case("scoring", scoring),
    Case("streamed", streamed),
    Case("n > 1", samples),
    Case("start offset", offsets),
    Case("abort", aborted),
    Case("full prefix hit", prefix_full),
    Case("partial prefix hit", prefix_partial),
    Case("evicted prefix", prefix_evicted),
    Case("chunked prefill", chunked),
    Case("concurrency", load),
    Case("preemption", preemption),
    Case("dtype edges", edges),
    Case("determinism", repeatable),
    Case("weight update", weights),
    Case("start at the prompt's end", offset_at_end),
)
"""The checks in the order they run: the plain ones first, those that change the engine, or end some, last."""
