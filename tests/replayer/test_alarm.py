"""When the shift alarm is raised: by the end of the context, or by the backward pass, and never by neither.

A CPU has no wait to spare, so it judges at the end of the context; these tests let it defer as a GPU does.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import ONE_OF_EACH, assert_same_gradients, gradients_of, loss_of, random_tokens
from trained import CHECKPOINTS, made

from moetrace import record, replay
from moetrace.errors import ShiftedRoutesError
from moetrace.replayer import ReplaySession, alarm, monitor
from moetrace.trace import RoutingTrace

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
READS = pytest.mark.parametrize("read", [ReplaySession.stats, ReplaySession.counts])


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(alarm, "defers", lambda device: True)


def batch(model: Any, seed: int = 0, by: int = 1) -> tuple[torch.Tensor, RoutingTrace]:
    """Tokens and the model's own routes, each one in the row of the token `by` later."""
    tokens = random_tokens(1, 64, seed=seed)
    with torch.no_grad(), record(model) as recording:
        model(tokens, use_cache=False)
    (trace,) = recording.traces(tokens)
    ids_TLK = np.roll(trace.experts_TLK, by, axis=0)
    return tokens, RoutingTrace.build(ids_TLK, trace.layout, tokens[0].numpy(), fingerprint=trace.fingerprint)


def replayed(model: Any, seed: int = 0, by: int = 1, on_shift: Any = "error") -> tuple[ReplaySession, torch.Tensor]:
    tokens, trace = batch(model, seed, by)
    with replay(model, trace, input_ids=tokens, on_shift=on_shift) as session:
        loss = loss_of(model(tokens, use_cache=False).logits)
    return session, loss


def raises(run: Callable[[], Any]) -> bool:
    try:
        run()
    except ShiftedRoutesError:
        return True
    return False


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_backward_raises_the_alarm_when_it_is_through(
    name: str, reentrant: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(name, reentrant)
    replayed(model, on_shift="ignore")[1].backward()
    expected = gradients_of(model)
    assert caplog.records == []
    model.zero_grad()
    _, loss = replayed(model)
    with pytest.raises(ShiftedRoutesError, match="the row later than each token's own fits better"):
        loss.backward()
    assert_same_gradients(gradients_of(model), expected)
    replayed(model, by=0)[1].backward()


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_counts_are_sent_by_the_context_and_read_when_all_gradients_are_there(
    reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = made(reentrant=reentrant), list[str]()
    own = monitor._to_host

    def to_host(values: torch.Tensor) -> Any:
        seen.append("sent")
        arrived = own(values)

        def read() -> torch.Tensor:
            seen.append("read" if all(p.grad is not None for p in model.parameters()) else "read early")
            return arrived()

        return read

    monkeypatch.setattr(monitor, "_to_host", to_host)
    _, loss = replayed(model, by=0)
    assert seen == ["sent"]
    loss.backward()
    assert seen == ["sent", "read"]


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["fifo", "lifo"])
def test_each_microbatch_in_flight_is_judged_by_its_own_backward(
    order: tuple[int, ...], reentrant: bool | None
) -> None:
    model = made(reentrant=reentrant)
    losses = [replayed(model, seed, by)[1] for seed, by in enumerate((0, 1, 0))]
    assert [number for number in order if raises(losses[number].backward)] == [1]


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_one_backward_of_many_microbatches_judges_them_all(
    reentrant: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(reentrant=reentrant)
    losses = [replayed(model, seed, by, on_shift="warn")[1] for seed, by in enumerate((1, 0, -1))]
    torch.stack(losses).sum().backward()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(direction for direction in ("earlier", "later") for text in said if direction in text) == [
        "earlier",
        "later",
    ]


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_two_forwards_of_a_session_are_judged_together_by_the_first_backward(reentrant: bool | None) -> None:
    model = made(reentrant=reentrant)
    tokens, trace = batch(model)
    with replay(model, trace, input_ids=tokens) as session:
        first, second = (loss_of(model(tokens, use_cache=False).logits) for _ in range(2))
    assert raises(second.backward)
    assert not raises(first.backward)
    assert session.stats().forwards == 2


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
@pytest.mark.parametrize("grad", [True, False])
def test_a_backward_within_the_context_judges_and_what_comes_after_it_is_judged_too(
    grad: bool, reentrant: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(reentrant=reentrant)
    tokens, trace = batch(model)
    with replay(model, trace, input_ids=tokens, on_shift="warn"):
        loss_of(model(tokens, use_cache=False).logits).backward()
        assert len(caplog.records) == 1
        with torch.set_grad_enabled(grad):
            loss = loss_of(model(tokens, use_cache=False).logits)
    assert len(caplog.records) == (1 if grad else 2)
    if grad:
        loss.backward()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_a_backward_within_the_context_leaves_nothing_to_its_end(
    reentrant: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(reentrant=reentrant)
    tokens, trace = batch(model)
    with replay(model, trace, input_ids=tokens) as session:
        assert raises(loss_of(model(tokens, use_cache=False).logits).backward)
    assert session.stats().shifted
    del session
    gc.collect()
    assert caplog.records == []


@pytest.mark.usefixtures("deferring")
def test_a_second_walk_of_the_graph_judges_nothing_again(caplog: pytest.LogCaptureFixture) -> None:
    _, loss = replayed(made(reentrant=False), on_shift="warn")
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_a_backward_on_another_thread_raises_there(reentrant: bool | None) -> None:
    """On a GPU autograd runs the backward on threads of its own."""
    _, loss = replayed(made(reentrant=reentrant))
    caught = []
    thread = threading.Thread(target=lambda: caught.append(raises(loss.backward)))
    thread.start()
    thread.join(60)
    assert caught == [True]


@pytest.mark.usefixtures("deferring")
@READS
def test_who_reads_before_the_backward_gets_the_alarm_and_the_backward_does_not(
    read: Callable[[ReplaySession], Any], caplog: pytest.LogCaptureFixture
) -> None:
    session, loss = replayed(made())
    with pytest.raises(ShiftedRoutesError):
        read(session)
    assert read(session).forwards == 1
    loss.backward()
    assert caplog.records == []


@pytest.mark.usefixtures("deferring")
@READS
def test_who_reads_within_the_context_gets_numbers(read: Callable[[ReplaySession], Any]) -> None:
    model = made()
    tokens, trace = batch(model)
    with replay(model, trace, input_ids=tokens) as session:
        loss = loss_of(model(tokens, use_cache=False).logits)
        assert read(session).forwards == 1
    assert raises(loss.backward)


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize(
    ("by", "on_shift", "said"), [(1, "error", 1), (1, "warn", 1), (1, "ignore", 0), (0, "error", 0)]
)
def test_a_verdict_that_nobody_waited_for_is_logged_when_all_is_forgotten(
    by: int, on_shift: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    session, loss = replayed(made(), by=by, on_shift=on_shift)
    del session
    gc.collect()
    assert caplog.records == []  # a backward may still come
    del loss
    gc.collect()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * said
    assert all("the row later than each token's own fits better" in record.getMessage() for record in caplog.records)


def fail(loss: torch.Tensor, model: Any) -> None:
    """A backward pass that does not get to its end."""
    hook = model.model.embed_tokens.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    hook.remove()


@pytest.mark.usefixtures("deferring")
def test_a_backward_that_fails_loses_no_verdict() -> None:
    model = made()
    session, loss = replayed(model)
    fail(loss, model)
    with pytest.raises(ShiftedRoutesError):
        session.stats()


@pytest.mark.usefixtures("deferring")
def test_a_verdict_that_a_later_one_contains_is_not_logged_beside_it(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    tokens, trace = batch(model)
    with replay(model, trace, input_ids=tokens):
        fail(loss_of(model(tokens, use_cache=False).logits), model)
        loss = loss_of(model(tokens, use_cache=False).logits)
    del loss
    gc.collect()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.usefixtures("deferring")
@CHECKPOINTS
def test_a_pass_without_gradients_is_judged_by_its_context(reentrant: bool | None) -> None:
    with torch.no_grad(), pytest.raises(ShiftedRoutesError):
        replayed(made(reentrant=reentrant))


@pytest.mark.usefixtures("deferring")
def test_a_frozen_model_is_judged_by_its_context() -> None:
    with pytest.raises(ShiftedRoutesError):
        replayed(made().requires_grad_(False))


@CHECKPOINTS
def test_a_cpu_judges_at_the_end_of_the_context(reentrant: bool | None) -> None:
    with pytest.raises(ShiftedRoutesError):
        replayed(made(reentrant=reentrant))


def test_a_gpu_defers() -> None:
    assert [alarm.defers(torch.device(kind)) for kind in ("cuda", "cuda:1", "cpu")] == [True, True, False]
