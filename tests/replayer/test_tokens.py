"""A model that is called with other tokens than those that were aligned is refused: at once, or as a shift is."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import ONE_OF_EACH, left_behind, loss_of, random_routes, random_tokens, traces_of
from trained import CHECKPOINTS, made

from moetrace import record, replay
from moetrace.errors import ReplayError, TokenMismatchError
from moetrace.replayer import AlignedRoutes, ReplaySession, alarm, align
from moetrace.replayer.ranks import context_parallel, pipeline
from moetrace.trace import RoutingTrace

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
SHIFTS = pytest.mark.parametrize("on_shift", ["error", "warn", "ignore"])


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(alarm, "defers", lambda device: True)


def own(model: Any, tokens: torch.Tensor) -> list[RoutingTrace]:
    with torch.no_grad(), record(model) as recording:
        model(tokens, use_cache=False)
    return recording.traces(tokens)


def other(tokens: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The same tokens but one."""
    changed = tokens.clone()
    changed[row, column] = (changed[row, column] + 1) % 64
    return changed


def replayed(model: Any, called: Callable[[torch.Tensor], torch.Tensor], on_shift: Any = "error") -> Any:
    tokens = random_tokens(3, 40)
    with replay(model, own(model, tokens), input_ids=tokens, on_shift=on_shift) as session:
        loss = loss_of(model(called(tokens), use_cache=False).logits)
    return session, loss


WRONG: dict[str, tuple[Callable, str]] = {
    "one token": (lambda tokens: other(tokens, 2, 7), "at position 7 of sequence 2"),
    "rows in another order": (lambda tokens: tokens[[0, 2, 1]], "at position 0 of sequence 1"),
    "other batch": (lambda tokens: random_tokens(3, 40, seed=1), "of sequence 0"),
}


def hooks(model: Any) -> int:
    return len(model.get_input_embeddings()._forward_pre_hooks)


@SHIFTS
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_another_batch_is_refused_before_anything_is_computed(name: str, wrong: str, on_shift: str) -> None:
    called, where = WRONG[wrong]
    model, ran = made(name), []
    tokens = random_tokens(3, 40)
    traces = own(model, tokens)
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    with (
        pytest.raises(TokenMismatchError, match=where),
        replay(model, traces, input_ids=tokens, on_shift=on_shift),  # type: ignore[arg-type]
    ):
        model(called(tokens))
    handle.remove()
    assert ran == []
    assert hooks(model) == 0
    assert left_behind(model) == []


@pytest.mark.usefixtures("deferring")
@SHIFTS
@CHECKPOINTS
def test_where_nobody_may_wait_the_backward_refuses_it(reentrant: bool | None, on_shift: str) -> None:
    for called, where in WRONG.values():
        _, loss = replayed(made(reentrant=reentrant), called, on_shift)
        with pytest.raises(TokenMismatchError, match=where):
            loss.backward()
    _, loss = replayed(made(reentrant=reentrant), lambda tokens: tokens, on_shift)
    loss.backward()


@pytest.mark.usefixtures("deferring")
@SHIFTS
def test_where_nobody_may_wait_and_no_backward_comes_the_context_refuses_it(on_shift: str) -> None:
    model = made()
    with torch.no_grad(), pytest.raises(TokenMismatchError, match="the first of 1 that differ"):
        replayed(model, lambda tokens: other(tokens, 1, 3), on_shift)
    assert hooks(model) == 0


@pytest.mark.usefixtures("deferring")
@SHIFTS
@pytest.mark.parametrize("read", [ReplaySession.stats, ReplaySession.counts])
def test_who_reads_counts_of_other_tokens_gets_the_error_each_time(read: Callable, on_shift: str) -> None:
    session, loss = replayed(made(), lambda tokens: other(tokens, 0, 39), on_shift)
    for _ in range(2):
        with pytest.raises(TokenMismatchError, match="position 39 of sequence 0"):
            read(session)
    loss.backward()  # it has been said


@pytest.mark.usefixtures("deferring")
@SHIFTS
def test_what_nobody_waited_for_is_logged(on_shift: str, caplog: pytest.LogCaptureFixture) -> None:
    session, loss = replayed(made(), lambda tokens: other(tokens, 0, 0), on_shift)
    del session, loss
    gc.collect()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "other tokens" in caplog.text


@pytest.mark.usefixtures("deferring")
def test_a_wrong_forward_among_right_ones_is_found() -> None:
    model, tokens = made(), random_tokens(2, 12)
    with replay(model, own(model, tokens), input_ids=tokens, on_shift="ignore"):
        losses = [
            loss_of(model(ids, use_cache=False).logits) for ids in (tokens, other(tokens, 1, 5), other(tokens, 1, 9))
        ]
    with pytest.raises(TokenMismatchError, match="position 5 of sequence 1, got another there, the first of 2"):
        losses[0].backward()


@pytest.mark.parametrize("defer", [False, True])
def test_padding_may_be_anything_and_packed_sequences_are_known_by_their_places(
    defer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarm, "defers", lambda device: defer)
    model, tokens = made(), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    traces = traces_of(model, random_routes(24, "mixtral"), tokens)
    traces[0] = RoutingTrace.build(traces[0].experts_TLK[4:], traces[0].layout, tokens[0, 4:].numpy())
    with torch.no_grad(), replay(model, traces, input_ids=tokens, attention_mask=mask, on_shift="ignore"):
        model(other(tokens, 0, 3), attention_mask=mask)
    bounds, positions = [0, 8, 20], torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = torch.cat([tokens[0, 4:], tokens[1]])[None]
    with (
        torch.no_grad(),
        pytest.raises(TokenMismatchError, match="at position 1 of sequence 1"),
        replay(model, traces, input_ids=packed, cu_seqlens=bounds, on_shift="ignore"),
    ):
        model(other(packed, 0, 9), position_ids=positions)


def test_a_batch_that_changes_after_it_was_aligned_is_another_one() -> None:
    model, tokens = made(), random_tokens(1, 10)
    traces = own(model, tokens)
    routes = align(traces, tokens)
    tokens[0, 4] = (tokens[0, 4] + 1) % 64
    with pytest.raises(TokenMismatchError, match="position 4"), replay(model, routes):
        model(tokens)


def test_placeholders_of_images_may_be_looked_up_as_others() -> None:
    """Gemma 4 and others look up padding there, and put an image's own embeddings in its place."""
    model, tokens = made(), random_tokens(1, 10)
    tokens[0, 4] = 50
    traces = own(model, tokens)
    model.config.image_token_id = 50
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore"):
        model(other(tokens, 0, 4))
    with pytest.raises(TokenMismatchError), replay(model, traces, input_ids=tokens):
        model(other(tokens, 0, 5))


def test_what_cannot_be_compared_is_not() -> None:
    model, tokens = made(), random_tokens(2, 10)
    traces = traces_of(model, random_routes(20, "mixtral"), tokens)
    aligned, wrong = align(traces, tokens), other(tokens, 0, 4)
    unknown: list[AlignedRoutes] = [replace(aligned, tokens_N=None), aligned.take(np.arange(20))]
    for routes in unknown:
        with torch.no_grad(), replay(model, routes, on_shift="ignore"):
            model(wrong)
    with torch.no_grad(), replay(model, aligned, on_shift="ignore"):
        model(inputs_embeds=model.get_input_embeddings().weight[wrong])
    with pytest.raises(ReplayError, match="another batch"), replay(model, aligned, on_shift="ignore"):
        model(random_tokens(1, 10))
    model.get_input_embeddings = lambda: None
    with torch.no_grad(), replay(model, aligned, on_shift="ignore"):
        model(wrong)


def test_a_slice_is_compared_as_the_batch_that_it_is() -> None:
    model, tokens = made(), random_tokens(2, 12)
    whole = align(traces_of(model, random_routes(24, "mixtral"), tokens), tokens)
    assert whole.tokens_N is not None
    assert whole.tokens_N.tolist() == tokens.reshape(-1).tolist()
    mine = context_parallel(whole, 1, 2, "zigzag")
    columns = tokens[:, 3:9]
    with torch.no_grad(), replay(model, mine, on_shift="ignore"):
        model(columns)
    with pytest.raises(TokenMismatchError, match="position 5 of sequence 1"), replay(model, mine, on_shift="ignore"):
        model(other(columns, 1, 2))
    stage = pipeline(whole, [0])
    assert stage is not None
    assert stage.tokens_N is whole.tokens_N
    assert whole.sequence_first().tokens_N.tolist() == tokens.T.reshape(-1).tolist()  # type: ignore[union-attr]


def test_of_replays_within_each_other_the_inner_ones_tokens_count() -> None:
    model, tokens = made(), [random_tokens(1, 10, seed=seed) for seed in (0, 1)]
    traces = [traces_of(model, random_routes(10, "mixtral", seed=seed), tokens[seed]) for seed in (0, 1)]
    with torch.no_grad(), replay(model, traces[0], input_ids=tokens[0], on_shift="ignore"):
        model(tokens[0])
        with replay(model, traces[1], input_ids=tokens[1], on_shift="ignore"):
            model(tokens[1])
            with pytest.raises(TokenMismatchError):
                model(tokens[0])
            model(tokens[1])
        with pytest.raises(TokenMismatchError):
            model(tokens[1])
        model(tokens[0])
    assert hooks(model) == 0


def test_another_thread_may_call_the_model_with_what_it_likes() -> None:
    model, tokens, caught = made(), random_tokens(1, 10), []

    def beside() -> None:
        try:
            model(random_tokens(1, 10, seed=1))
        except TokenMismatchError as error:
            caught.append(error)

    with torch.no_grad(), replay(model, own(model, tokens), input_ids=tokens):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join(60)
        model(tokens)
    assert caught == []


def test_tasks_of_asyncio_are_compared_with_their_own_tokens() -> None:
    model, done = made(), []

    async def replayed_in_turn(seed: int) -> None:
        tokens = random_tokens(1, 10, seed=seed)
        traces = traces_of(model, random_routes(10, "mixtral", seed=seed), tokens)
        with replay(model, traces, input_ids=tokens, on_shift="ignore"):
            for _ in range(seed):
                await asyncio.sleep(0)
                with torch.no_grad():
                    model(tokens)
        done.append(seed)

    async def together() -> None:
        await asyncio.gather(replayed_in_turn(2), replayed_in_turn(4))

    asyncio.run(together())
    assert done == [2, 4]
    assert hooks(model) == 0


def test_hooks_of_others_see_the_ids_after_us_and_stay() -> None:
    """A tensor-parallel plan makes shards of the ids in a hook of its own."""
    model, tokens = made(), random_tokens(1, 10)
    traces = own(model, tokens)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: (args[0].flip(0, 1),), prepend=True)
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore"):
        model(tokens)
    assert hooks(model) == 1
    handle.remove()


def test_the_hook_is_gone_whatever_happens() -> None:
    model, tokens = made(), random_tokens(1, 10)
    traces = own(model, tokens)
    with pytest.raises(ZeroDivisionError), replay(model, traces, input_ids=tokens):
        raise ZeroDivisionError
    assert hooks(model) == 0
    with pytest.raises(ReplayError, match=re.escape("nothing was replayed")), replay(model, traces, input_ids=tokens):
        pass
    assert hooks(model) == 0
    with torch.no_grad():
        model(random_tokens(1, 10, seed=1))
