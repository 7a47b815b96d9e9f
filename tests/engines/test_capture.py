"""Capture against a stand-in for the engine's loop, to run orders of events that need a GPU or bad luck otherwise."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from transformers.generation.continuous_batching.requests import RequestStatus

from moetrace.engines.transformers.capture import StepCapture
from moetrace.errors import CaptureError

PAGE = 4


@dataclass
class State:
    """What capture reads of a request."""

    request_id: str
    initial_tokens: list[int]
    generated_tokens: list[int] = field(default_factory=list)
    position_offset: int = 0
    status: RequestStatus = RequestStatus.DECODING


class Loop:
    """An engine loop in miniature; `update` may come one step late, as with asynchronous batching."""

    compute_stream = None

    def __init__(self, dye: Dye) -> None:
        self.model = dye.model()
        self.in_flight: deque[list[Any]] = deque()
        self.packed: list[int] = []
        self.tables: dict[str, list[int]] = {}
        cache = SimpleNamespace(
            device="cpu",
            max_batch_tokens=64,
            use_prefix_sharing=True,
            cache_allocators={"full": SimpleNamespace(tokens_per_page=PAGE, block_table=self.tables)},
        )
        self.processor = SimpleNamespace(inputs_and_outputs=self, cache=cache, _generation_step=self.forward)
        self.capture = StepCapture(self.model, self.processor)
        self.capture.attach()

    def prepare_batch_tensors(self, requests: list[Any]) -> None:
        self.packed = []
        for request in requests:
            state, start = request.state, request.state.position_offset
            tokens = state.initial_tokens + state.generated_tokens + [state.initial_tokens[0]] * 8
            self.packed += request.tokens or tokens[start : start + request.query_length]
            state.position_offset += request.query_length
        self.in_flight.append(requests)

    def forward(self, model: torch.nn.Module) -> None:
        padding = [0] * 3  # as with CUDA graphs
        with torch.no_grad():
            model(torch.tensor([self.packed + padding]))

    def retrieve_device_outputs(self) -> None:
        pass

    def prepare_batch_update(self) -> tuple[list[Any], None, None]:
        return self.in_flight.popleft(), None, None

    def launch(self, *shares: tuple[State, int], tokens: list[int] | None = None) -> None:
        requests = [SimpleNamespace(state=state, query_length=count, tokens=tokens) for state, count in shares]
        self.prepare_batch_tensors(requests)
        self.processor._generation_step(self.model)
        self.retrieve_device_outputs()

    def update(self) -> None:
        self.prepare_batch_update()


@pytest.fixture
def dye() -> Dye:
    return Dye()


def test_rows_in_flight_are_never_taken_from_pages_of_an_earlier_owner(dye: Dye) -> None:
    loop = Loop(dye)
    loop.tables["old"] = loop.tables["new"] = [3, 4]
    loop.launch((State("old", [1, 2, 7, 9]), 4))
    loop.update()
    loop.capture._pages._experts[3][:] = 0  # so that reading them would show
    new = State("new", [1, 2, 7, 8, 9])
    loop.launch((new, 3))
    loop.launch((new, 2))  # planned while the first chunk is in flight, as with asynchronous batching
    loop.update()
    loop.update()
    experts_TLK, valid_T = loop.capture.collect("new", 5)
    assert valid_T.all()
    np.testing.assert_array_equal(experts_TLK, dye.routes([1, 2, 7, 8, 9]))


def test_a_step_launched_before_the_last_update_knows_its_tokens_when_it_is_harvested(dye: Dye) -> None:
    loop = Loop(dye)
    state = State("r", [1, 2])
    loop.tables["r"] = [0]
    loop.launch((state, 2))  # samples 7
    loop.launch((state, 1), tokens=[7])
    loop.update()
    state.generated_tokens.append(7)
    loop.launch((state, 1), tokens=[8])
    loop.update()
    state.generated_tokens.append(8)
    loop.update()
    np.testing.assert_array_equal(loop.capture.collect("r", 4)[0], dye.routes([1, 2, 7, 8]))
    assert loop.capture._pages._tokens[0].tolist() == [1, 2, 7, 8]


@pytest.mark.parametrize("status", [RequestStatus.FINISHED, RequestStatus.PENDING])
def test_rows_of_a_step_whose_tokens_were_thrown_away_are_not_kept(dye: Dye, status: RequestStatus) -> None:
    loop = Loop(dye)
    state, other = State("r", [1, 2, 3]), State("o", [4, 5])
    loop.launch((state, 3), (other, 2))
    state.status = status
    loop.update()
    assert not loop.capture.collect("r", 3)[1].any()
    experts_TLK, valid_T = loop.capture.collect("o", 2)
    assert valid_T.all()
    np.testing.assert_array_equal(experts_TLK, dye.routes([4, 5]))


def test_a_preempted_request_keeps_its_first_rows_and_pages_hold_the_latest(dye: Dye) -> None:
    loop = Loop(dye)
    state = State("r", [1, 2, 3, 4])
    loop.tables["r"] = [0]
    loop.launch((state, 4))
    loop.update()
    resumed = State("r", [1, 2, 3, 4, 5])
    loop.tables["r"] = [7, 8]
    loop.model.model.layers[1].mlp.gate.weight.data.copy_(loop.model.model.layers[2].mlp.gate.weight.data)
    loop.launch((resumed, 5))  # the recomputation routes differently
    loop.update()
    first = dye.routes([1, 2, 3, 4, 5])
    second = first.copy()
    second[:, 0] = first[:, 1]
    pages = loop.capture._pages
    np.testing.assert_array_equal(pages._experts[7], second[:4])
    experts_TLK, valid_T = loop.capture.collect("r", 5)
    assert valid_T.all()
    np.testing.assert_array_equal(experts_TLK, np.concatenate([first[:4], second[4:]]))


def test_a_shared_page_without_captured_rows_leaves_them_missing(dye: Dye) -> None:
    loop = Loop(dye)
    state = State("r", [1, 2, 3, 4, 5, 6], position_offset=4)
    loop.tables["r"] = [9, 10]
    loop.launch((state, 2))
    loop.update()
    experts_TLK, valid_T = loop.capture.collect("r", 6)
    assert valid_T.tolist() == [False] * 4 + [True] * 2
    assert not experts_TLK[:4].any()
    assert loop.capture.counts.missing_rows == 4


def test_a_shared_page_with_rows_of_other_tokens_leaves_them_missing(dye: Dye) -> None:
    loop = Loop(dye)
    loop.tables["a"] = [9]
    loop.launch((State("a", [1, 2, 3, 4]), 4))
    loop.update()
    state = State("b", [1, 2, 3, 8, 5], position_offset=4)
    loop.tables["b"] = [9, 10]
    loop.launch((state, 1))
    loop.update()
    assert loop.capture.collect("b", 5)[1].tolist() == [False] * 4 + [True]


def test_padding_of_a_step_reaches_no_sequence(dye: Dye) -> None:
    loop = Loop(dye)
    states = [State(f"r{i}", [i, i + 1]) for i in range(5)]
    loop.launch(*((state, 2) for state in states))
    loop.update()
    for i, state in enumerate(states):
        np.testing.assert_array_equal(loop.capture.collect(state.request_id, 2)[0], dye.routes([i, i + 1]))


def test_an_engine_that_finishes_another_step_than_planned_is_stopped(dye: Dye) -> None:
    loop = Loop(dye)
    loop.launch((State("r", [1, 2]), 2))
    loop.in_flight[0] = [SimpleNamespace(state=State("r", [1, 2]), query_length=2, tokens=None)]
    with pytest.raises(CaptureError, match="another step than the one that was planned"):
        loop.update()


def test_an_engine_without_the_known_methods_is_refused_by_name(dye: Dye) -> None:
    processor = SimpleNamespace(cache=SimpleNamespace())
    with pytest.raises(CaptureError, match=r"no 'inputs_and_outputs'.*5\.17 to 5\.23"):
        StepCapture(dye.model(), processor)
