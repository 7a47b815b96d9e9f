"""A layer with two routers (JetMoE: attention and MLP) has two rows of ids, in the order of its modules.

Its first router to run is not the first of the layout: nothing may take that one for the beginning of a forward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moetrace import load, record, replay, save
from moetrace.conformance import verdicts, zoo
from moetrace.conformance.census import batch
from moetrace.conformance.spies import spying
from moetrace.dialects import from_lightllm, to_lightllm
from moetrace.trace import RoutingTrace


@pytest.fixture
def model() -> Any:
    return zoo.tiny(zoo.architecture("jetmoe"))


def recorded(model: Any, ids_BS: torch.Tensor) -> list[RoutingTrace]:
    with torch.no_grad(), record(model) as recording:
        model(input_ids=ids_BS)
    return recording.traces(ids_BS)


def test_a_recording_keeps_the_whole_of_the_last_forward(model: Any) -> None:
    earlier, ids_BS = batch().flip(0, 1), batch()
    with torch.no_grad(), record(model) as recording, spying(model) as calls:
        model(input_ids=earlier)
        model(input_ids=ids_BS)
    assert verdicts.received(calls, recording.experts_LNK)
    assert recording.traces(ids_BS) == recorded(model, ids_BS)


def test_a_forward_that_broke_off_leaves_nothing(model: Any) -> None:
    ids_BS = batch()

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), record(model) as recording:
        hook = model.model.layers[0].mlp.register_forward_pre_hook(broken)  # its attention was routed already
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=batch().flip(0))
        hook.remove()
        model(input_ids=ids_BS)
    assert recording.traces(ids_BS) == recorded(model, ids_BS)


def test_forwards_and_overlap_are_counted_router_by_router(model: Any) -> None:
    ids_BS = batch()
    with torch.no_grad(), replay(model, recorded(model, ids_BS), input_ids=ids_BS) as session:
        for forward in (1, 2):
            model(input_ids=ids_BS)
            assert session.forwards == session.stats().forwards == forward
    assert session.stats().overlap_per_layer == (1.0,) * 8
    assert session.stats().token_mismatch == 0


def test_both_rows_survive_every_format(model: Any) -> None:
    trace = recorded(model, batch())[0]
    assert trace.layout.layers == (0, 0, 1, 1, 2, 2, 3, 3)
    assert load(save(trace)) == [trace]
    assert trace.tokens is not None
    assert from_lightllm(to_lightllm(trace), trace.tokens) == trace
