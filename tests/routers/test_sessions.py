"""Contexts that overlap on one thread and neither is inside the other: generators, asyncio tasks, exits by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from families import build, experts_spy, left_behind, random_routes, random_tokens, traces_of

from moetrace import record, replay
from moetrace.errors import ReplayError

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
NAME = "mixtral"
TOKENS = random_tokens(1, 10)


def routes(seed: int) -> np.ndarray:
    return random_routes(10, NAME, seed=seed)


def replaying(model: Any, seed: int) -> AbstractContextManager[Any]:
    return replay(model, traces_of(model, routes(seed), TOKENS), input_ids=TOKENS, on_shift="ignore")


def used(model: Any) -> np.ndarray:
    """`[N, L, K]`: what the experts receive in a forward that runs now."""
    with torch.no_grad(), experts_spy(model, NAME) as spy:
        model(TOKENS, use_cache=False)
    return spy.last().permute(1, 0, 2).numpy()


def in_steps(model: Any, seed: int) -> Iterator[np.ndarray]:
    with replaying(model, seed):
        while True:
            yield used(model)


def test_a_replay_that_ends_before_one_inside_it_is_refused_and_the_other_goes_on() -> None:
    model = build(NAME)
    live = used(model)
    first, second = replaying(model, 1), replaying(model, 2)
    first.__enter__()
    used(model)
    second.__enter__()
    used(model)
    with pytest.raises(ReplayError, match="ends before one that began inside it"):
        first.__exit__(None, None, None)
    assert np.array_equal(used(model), routes(2))
    second.__exit__(None, None, None)
    assert left_behind(model) == []
    assert np.array_equal(used(model), live)
    with record(model) as recording:
        assert np.array_equal(used(model), live)
    assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), live)


def test_what_the_caller_raised_is_not_hidden_by_the_refusal() -> None:
    model = build(NAME)
    first, second = replaying(model, 1), replaying(model, 2)
    first.__enter__()
    second.__enter__()
    error = KeyError("the caller's own")
    assert not first.__exit__(KeyError, error, None)
    assert np.array_equal(used(model), routes(2))
    second.__exit__(None, None, None)
    assert left_behind(model) == []


@pytest.mark.parametrize("outer", ["record", "replay"])
def test_a_recording_and_a_replay_may_end_in_any_order(outer: str) -> None:
    model = build(NAME)
    live = used(model)
    recorder, replayer = record(model), replaying(model, 1)
    contexts = (recorder, replayer) if outer == "record" else (replayer, recorder)
    entered: list[Any] = [context.__enter__() for context in contexts]
    recording = entered[contexts.index(recorder)]
    assert np.array_equal(used(model), routes(1))
    contexts[0].__exit__(None, None, None)
    after = used(model)
    assert np.array_equal(after, routes(1) if outer == "record" else live)
    assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), routes(1) if outer == "record" else live)
    contexts[1].__exit__(None, None, None)
    assert np.array_equal(used(model), live)
    assert left_behind(model) == []


def test_tasks_of_one_thread_keep_their_own_routes() -> None:
    """A step of one, a step of the other; the first to begin is the first to end."""
    model = build(NAME)
    live = used(model)
    seen: dict[str, list[np.ndarray]] = {"1": [], "2": [], "plain": []}
    recorded: list[torch.Tensor] = []

    async def replayed(seed: int, steps: int) -> None:
        with replaying(model, seed):
            for _ in range(steps):
                seen[str(seed)].append(used(model))
                await asyncio.sleep(0)

    async def plain() -> None:
        for _ in range(3):
            seen["plain"].append(used(model))
            await asyncio.sleep(0)

    async def recorder() -> None:
        with record(model) as recording:
            used(model)
            for _ in range(2):
                await asyncio.sleep(0)
                recorded.append(recording.experts_LNK)

    async def together() -> None:
        await asyncio.gather(replayed(1, 2), replayed(2, 4), recorder(), plain())

    asyncio.run(together())
    for seed in (1, 2):
        assert all(np.array_equal(ids, routes(seed)) for ids in seen[str(seed)])
    assert all(np.array_equal(ids, live) for ids in seen["plain"])
    assert all(np.array_equal(ids.permute(1, 0, 2).numpy(), live) for ids in recorded)
    assert [len(ids) for ids in seen.values()] == [2, 4, 3]
    assert left_behind(model) == []
    assert np.array_equal(used(model), live)


def test_a_task_made_in_a_replay_has_its_routes_until_it_ends() -> None:
    model = build(NAME)
    live = used(model)
    seen: list[np.ndarray] = []

    async def child(ended: asyncio.Event) -> None:
        seen.append(used(model))
        await ended.wait()
        seen.append(used(model))

    async def parent() -> None:
        ended = asyncio.Event()
        with replaying(model, 1) as session:
            task = asyncio.create_task(child(ended))
            await asyncio.sleep(0)
        with record(model):  # taps are in again
            ended.set()
            await task
        assert session.forwards == 1

    asyncio.run(parent())
    assert np.array_equal(seen[0], routes(1))
    assert np.array_equal(seen[1], live)


def test_a_generator_closed_on_another_thread_ends_its_replay_on_its_own() -> None:
    model = build(NAME)
    live = used(model)
    steps: Any = in_steps(model, 1)
    assert np.array_equal(next(steps), routes(1))
    thread = threading.Thread(target=steps.close)
    thread.start()
    thread.join(60)
    assert left_behind(model) == []
    with record(model):  # taps are in again
        assert np.array_equal(used(model), live)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_generator_closed_while_a_layer_is_followed_stays_ended(reentrant: bool) -> None:
    """As the garbage collector may close it, which runs at any time."""
    model = build(NAME).train()
    live = used(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    steps: Any = in_steps(model, 1)
    next(steps)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: steps.close())
    with record(model) as recording:
        model(TOKENS, use_cache=False)
        handle.remove()
        assert np.array_equal(used(model), live)
    assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), live)
    assert left_behind(model) == []
