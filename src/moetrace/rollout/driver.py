"""Many prompts at once through a server, each into the journal when it is finished."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moetrace.client import AsyncClient, Completion
from moetrace.errors import EngineError, MoetraceError, RolloutError, UnreachableError
from moetrace.rollout.config import RolloutConfig
from moetrace.rollout.journal import Entry, Journal
from moetrace.rollout.prompts import PromptLine

ABORTS = 3
"""How often a prompt is sent again because somebody, such as a server that is shut down, aborted it."""


@dataclass
class Report:
    """What a run came to.

    Attributes:
        prompts: how many there are in all, and `before` how many of them were finished before this run.
        finished, failed: prompts of this run.
        sequences, tokens, rows: what those that were finished brought.
    """

    prompts: int = 0
    before: int = 0
    finished: int = 0
    failed: int = 0
    sequences: int = 0
    tokens: int = 0
    rows: int = 0


async def roll_out(
    client: AsyncClient,
    lines: Sequence[PromptLine],
    journal: Journal,
    config: RolloutConfig,
    report: Report,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Generate from the prompts that the journal does not have yet.

    A prompt that cannot be served is written to `errors.jsonl`, which is begun anew, and the rest goes on.

    Args:
        report: counts what happens; `on_progress` is called after each prompt.

    Raises:
        UnreachableError, EngineError: the server is gone. What was finished is in the journal.
        OSError: the journal cannot be written.
    """
    waiting = iter([line for line in lines if line.number not in journal.done])
    loop = asyncio.get_running_loop()

    def keep(line: PromptLine, completions: Sequence[Completion]) -> None:
        journal.commit(*_entry(line, completions))
        report.finished += 1
        report.sequences += len(completions)
        report.tokens += sum(len(completion.tokens) for completion in completions)
        report.rows += sum(len(completion.trace or ()) for completion in completions)

    with (journal.path / "errors.jsonl").open("w") as errors, ThreadPoolExecutor(1) as writer:

        async def work() -> None:
            for line in waiting:
                try:
                    completions = await _generate(client, line, config)
                except MoetraceError as error:
                    await _require_server(client, error)
                    facts = {"number": line.number, "id": line.id, "type": type(error).__name__, "message": str(error)}
                    print(json.dumps(facts), file=errors, flush=True)
                    report.failed += 1
                else:
                    await loop.run_in_executor(writer, keep, line, completions)
                on_progress()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(config.concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the others are the same: the server is gone, or the disk is full


async def _generate(client: AsyncClient, line: PromptLine, config: RolloutConfig) -> list[Completion]:
    for _ in range(1 + ABORTS):
        completions = await client.generate(line.inputs, codec=config.codec, **line.parameters)
        if all(completion.finish_reason != "abort" for completion in completions):
            return completions
    raise RolloutError(
        f"prompt {line.id!r} was aborted {1 + ABORTS} times", fix="Run the rollout again when nobody does."
    )


async def _require_server(client: AsyncClient, error: MoetraceError) -> None:
    """Raise an error again that is not one prompt's but the server's end."""
    if isinstance(error, EngineError):
        raise error
    if isinstance(error, UnreachableError):  # this prompt may only have taken too long
        try:
            if await client.health():
                return
        except MoetraceError:
            pass
        raise error


def _entry(line: PromptLine, completions: Sequence[Completion]) -> tuple[Entry, list[Any]]:
    """The line of a finished prompt, and its traces."""
    sequences = [
        {
            "text": completion.text,
            "output_token_ids": completion.tokens,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "weight_version": completion.weight_version,
            "trace": f"{line.number}.{completion.index}",
        }
        for completion in completions
    ]
    entry = {
        "number": line.number,
        "id": line.id,
        "request_id": completions[0].request_id,
        "prompt_token_ids": completions[0].prompt_tokens,
        "sequences": sequences,
        "given": line.given,
    }
    return entry, [completion.trace for completion in completions]
