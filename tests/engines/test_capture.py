"""`StepCapture` against a stand-in for the loop, for orders of events that need a GPU or bad luck otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye

from moetrace.engines.transformers import capture as capture_module
from moetrace.engines.transformers.capture import CapturedRows, StepCapture
from moetrace.errors import CaptureError
from moetrace.recorder import StepSlots

PAGE, PAGES = 4, 12


class Loop:
    """What capture needs of a loop; steps are forwards of the dye model."""

    device, max_batch_tokens = torch.device("cpu"), 64
    offloads_to_host = False

    def __init__(self, dye: Dye, window: int | None = None, max_model_len: int = 64) -> None:
        self.model = dye.model()
        self.pages = SimpleNamespace(page_size=PAGE, num_pages=PAGES, window=window)
        self.capture: Any = None
        self.owners: dict[str, tuple[list[int], int]] = {}
        self.capture = StepCapture(self.model, self, max_model_len)  # type: ignore[arg-type]

    def listen(self, listener: Any) -> None:
        self.capture = listener

    def running(self) -> dict[str, tuple[list[int], int]]:
        return self.owners

    def stop(self, **owners: tuple[list[int], int]) -> None:
        """Stop capture while requests own pages, of which so many positions are computed."""
        self.owners = owners
        self.capture.stop()

    def step(self, *shares: tuple[list[int], list[int], int]) -> None:
        """One step of (tokens, pages, position of the first token), settled before it as the real loop does."""
        self.capture.settle()
        tokens = [token for share in shares for token in share[0]]
        slots = [
            pages[(start + i) // PAGE] * PAGE + (start + i) % PAGE
            for some, pages, start in shares
            for i in range(len(some))
        ]
        padding = [0] * 3  # as with CUDA graphs
        ids_1N = torch.tensor([tokens + padding])
        with torch.no_grad(), self.capture.forwards():
            self.model(ids_1N)
        self.capture.after_forward(StepSlots(ids_1N[0], PAGE, write_index_N=torch.tensor(slots + [-1] * 3)))

    def finish(self, request_id: str, pages: list[int], tokens: list[int], computed: int | None = None) -> CapturedRows:
        self.capture.freed(request_id, pages, computed, over=True)
        self.capture.settle()
        return self.capture.collect(request_id, tokens[:-1])


@pytest.fixture
def dye() -> Dye:
    return Dye()


@pytest.fixture
def loop(dye: Dye) -> Loop:
    return Loop(dye)


def assert_rows(dye: Dye, rows: CapturedRows, tokens: list[int]) -> None:
    assert rows.valid_T.all()
    np.testing.assert_array_equal(rows.experts_TLK, dye.routes(tokens[:-1]))


def reroute(loop: Loop) -> None:
    """From now on layer 1 routes as layer 2 does."""
    layers = loop.model.model.layers
    layers[1].mlp.gate.weight.data.copy_(layers[2].mlp.gate.weight.data)


def test_rows_of_a_request_in_chunks_beside_another(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.capture.watch("b")
    loop.step(([1, 2, 3], [5, 2], 0), ([9, 8], [7], 0))
    loop.step(([4, 5], [5, 2], 3), ([7], [7], 2))
    assert_rows(dye, loop.finish("a", [5, 2], [1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6])
    assert_rows(dye, loop.finish("b", [7], [9, 8, 7, 6]), [9, 8, 7, 6])


def test_requests_of_several_pages_that_end_in_one_step_get_their_own(dye: Dye, loop: Loop) -> None:
    sequences = {"a": ([1, 2, 3, 4, 5, 6], [5, 2]), "b": ([9, 8, 7, 6, 5], [7, 1]), "c": ([30, 31], [4])}
    for request_id in sequences:
        loop.capture.watch(request_id)
    loop.step(*((tokens, pages, 0) for tokens, pages in sequences.values()))
    for request_id, (_, pages) in sequences.items():
        loop.capture.freed(request_id, pages, None, over=True)
    loop.capture.settle()
    for request_id, (tokens, _) in sequences.items():
        assert_rows(dye, loop.capture.collect(request_id, tokens), [*tokens, 0])


def test_pages_given_back_are_gathered_before_the_next_owner_writes(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("old")
    loop.step(([1, 2, 3], [5], 0))
    loop.capture.freed("old", [5], None, over=True)
    loop.step(([30, 31, 32], [5], 0))  # the page has another owner now
    assert_rows(dye, loop.capture.collect("old", [1, 2, 3]), [1, 2, 3, 4])


def test_a_step_in_flight_that_is_thrown_away_leaves_no_row(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2, 3], [5], 0))
    loop.step(([50], [5], 3))  # computed for a token that was not taken
    rows = loop.finish("a", [5], [1, 2, 3, 4, 5])
    assert rows.valid_T.tolist() == [True, True, True, False]
    assert not rows.experts_TLK[3].any()


def test_a_preempted_request_keeps_its_first_rows(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2, 3, 4, 5], [3, 4], 0))
    loop.capture.freed("a", [3, 4], 4, over=False)
    reroute(loop)
    loop.step(([1, 2, 3, 4, 5], [7, 8], 0))  # computed again, otherwise
    rows = loop.finish("a", [7, 8], [1, 2, 3, 4, 5, 6])
    expected = dye.routes([1, 2, 3, 4, 5])
    expected[4, 0] = expected[4, 1]
    np.testing.assert_array_equal(rows.experts_TLK, expected)


def test_of_several_preemptions_the_oldest_row_counts(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2], [3], 0))
    loop.capture.freed("a", [3], 2, over=False)
    reroute(loop)
    loop.step(([1, 2, 3], [4], 0))
    loop.capture.freed("a", [4], 3, over=False)
    loop.model.load_state_dict(dye.model().state_dict())
    loop.step(([1, 2, 3, 4], [5], 0))
    rows = loop.finish("a", [5], [1, 2, 3, 4, 5])
    expected = dye.routes([1, 2, 3, 4])
    expected[2, 0] = expected[2, 1]
    np.testing.assert_array_equal(rows.experts_TLK, expected)


def test_a_page_that_became_another_requests_equal_page_keeps_its_own_rows(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("b")
    loop.step(([1, 2, 3, 4], [1], 0))  # a
    reroute(loop)
    loop.step(([1, 2, 3, 4], [2], 0))  # b, the same tokens
    loop.capture.replaced("b", 0, 2)
    loop.step(([5], [1, 3], 4), ([40, 41, 42, 43], [2], 0))
    rows = loop.finish("b", [1, 3], [1, 2, 3, 4, 5, 6])
    expected = dye.routes([1, 2, 3, 4, 5])
    expected[:, 0] = expected[:, 1]
    np.testing.assert_array_equal(rows.experts_TLK, expected)


def test_a_forks_copied_page_has_its_rows_also_where_the_target_was_just_given_back(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("gone")
    loop.capture.watch("fork")
    loop.step(([1, 2, 3], [1], 0), ([20, 21, 22], [6], 0))
    loop.capture.freed("gone", [6], None, over=True)
    loop.capture.copied([1], [6])
    loop.step(([4], [6], 3))
    assert_rows(dye, loop.capture.collect("gone", [20, 21, 22]), [20, 21, 22, 23])
    assert_rows(dye, loop.finish("fork", [6], [1, 2, 3, 4, 5]), [1, 2, 3, 4, 5])


@pytest.mark.parametrize("asked", [True, False])
def test_pages_that_return_from_the_host_bring_their_rows_for_whoever_shares_them(
    dye: Dye, loop: Loop, asked: bool
) -> None:
    loop.offloads_to_host = True
    loop.capture.watch("sharer")
    if asked:
        loop.capture.watch("a")
    loop.step(([1, 2, 3, 4, 5], [1, 2], 0))
    loop.capture.freed("a", [1, 2], 5, over=False)
    loop.capture.freed("a", [], 5, over=False)  # 5.23 says it twice
    loop.step(([30, 31, 32, 33], [1], 0))
    loop.capture.restored("a", [8, 9, 10])
    loop.step(([6], [8, 9], 5), ([7], [8, 11], 4))
    assert_rows(dye, loop.finish("sharer", [8, 11], [1, 2, 3, 4, 7, 8]), [1, 2, 3, 4, 7, 8])
    if asked:
        assert_rows(dye, loop.finish("a", [8, 9], [1, 2, 3, 4, 5, 6, 7]), [1, 2, 3, 4, 5, 6, 7])
    else:
        loop.capture.freed("a", [8, 9], None, over=True)
    assert not loop.capture._histories


def test_what_an_aborted_request_had_not_computed_is_missing_whatever_lies_in_its_pages(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2, 3, 4], [1], 0))  # an earlier owner of the page, with the same tokens
    loop.step(([1, 2], [1], 0))
    rows = loop.finish("a", [1], [1, 2, 3, 4, 5], computed=2)
    assert rows.valid_T.tolist() == [True, True, False, False]


def test_a_request_that_never_ran_has_no_valid_row(loop: Loop) -> None:
    loop.capture.watch("a")
    assert not loop.finish("a", [], [1, 2, 3]).valid_T.any()
    assert loop.capture.counts.missing_rows == 2


def test_rows_say_which_weights_they_are_of(loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2], [1], 0))
    loop.capture.set_version(3)
    loop.step(([3], [1], 2))
    assert loop.finish("a", [1], [1, 2, 3, 4]).versions_T.tolist() == [0, 0, 3]


def test_stopped_a_request_keeps_what_it_has_and_gets_no_more(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2, 3, 4, 5, 6], [1, 2], 0))  # an earlier owner of the pages, with the same tokens
    loop.step(([1, 2, 3], [1], 0))
    loop.stop(a=([1, 2], 3))
    loop.step(([4, 5], [1, 2], 3))
    rows = loop.finish("a", [1, 2], [1, 2, 3, 4, 5, 6])
    assert rows.valid_T.tolist() == [True, True, True, False, False]
    np.testing.assert_array_equal(rows.experts_TLK[:3], dye.routes([1, 2, 3]))
    assert not rows.experts_TLK[3:].any()


def test_started_again_rows_go_on_and_the_gap_stays(dye: Dye, loop: Loop) -> None:
    loop.capture.watch("a")
    loop.step(([1, 2], [1], 0))
    loop.stop(a=([1], 2))
    loop.stop(a=([1], 2))  # twice is once
    loop.step(([3], [1], 2))
    loop.capture.start()
    loop.capture.start()
    loop.step(([4, 5], [1, 2], 3))
    rows = loop.finish("a", [1, 2], [1, 2, 3, 4, 5, 6])
    assert rows.valid_T.tolist() == [True, True, False, True, True]
    expected = dye.routes([1, 2, 3, 4, 5])
    np.testing.assert_array_equal(rows.experts_TLK[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_a_row_of_a_recomputation_does_not_fill_the_gap(dye: Dye, loop: Loop) -> None:
    """What the tokens were sampled from was computed while capture was stopped."""
    loop.capture.watch("a")
    loop.step(([1, 2], [1], 0))
    loop.stop(a=([1], 2))
    loop.step(([3, 4], [1], 2))
    loop.capture.freed("a", [1], 4, over=False)
    loop.capture.start()
    reroute(loop)
    loop.step(([1, 2, 3, 4, 5], [3, 4], 0))
    rows = loop.finish("a", [3, 4], [1, 2, 3, 4, 5, 6])
    assert rows.valid_T.tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(rows.experts_TLK[:2], dye.routes([1, 2]))


def test_pages_that_return_from_the_host_while_stopped_leave_no_mark_for_the_next_owner(dye: Dye, loop: Loop) -> None:
    loop.offloads_to_host = True
    loop.capture.watch("a")
    loop.capture.watch("next")
    loop.step(([1, 2, 3, 4], [1], 0))
    loop.capture.freed("a", [1], 4, over=False)
    loop.stop()
    loop.capture.restored("a", [5])
    assert_rows(dye, loop.finish("a", [5], [1, 2, 3, 4, 5]), [1, 2, 3, 4, 5])
    loop.step(([1, 2], [5], 0))
    loop.capture.start()
    loop.step(([3], [5], 2))
    assert loop.finish("next", [5], [1, 2, 3, 4]).valid_T.tolist() == [False, False, True]


def test_pages_that_went_to_the_host_while_stopped_return_without_rows(loop: Loop) -> None:
    loop.offloads_to_host = True
    loop.stop()
    loop.step(([1, 2, 3, 4], [1], 0))
    loop.capture.freed("a", [1], 4, over=False)
    loop.capture.start()
    loop.step(([1, 2, 3, 4], [5], 0))  # an earlier owner of the page they return to
    loop.capture.watch("sharer")
    loop.capture.restored("a", [5])
    assert not loop.finish("sharer", [5], [1, 2, 3, 4, 5]).valid_T.any()


def test_a_request_that_did_not_ask_costs_nothing(loop: Loop) -> None:
    loop.step(([1, 2, 3, 4], [1], 0))
    loop.capture.replaced("a", 0, 1)
    loop.capture.freed("a", [1], 4, over=False)
    loop.capture.freed("a", [1], None, over=True)
    assert not loop.capture._queued
    assert not loop.capture._histories


def test_rows_that_never_leave_are_an_error_not_a_hang(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_PULL_TIMEOUT_S", 0.01)
    loop.capture.watch("a")
    with pytest.raises(CaptureError, match="never left"):
        loop.capture.collect("a", [1])


def test_sliding_attention_only_is_refused_where_positions_would_be_forgotten(dye: Dye) -> None:
    Loop(dye, window=64, max_model_len=64)
    with pytest.raises(CaptureError, match="max_model_len <= 64"):
        Loop(dye, window=64, max_model_len=65)
