"""Sequences are found where a batch has them, and arguments that contradict each other are refused.

Axes: B rows and S columns of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import refused

from moetrace.batch import Segment, segments_of, to_numpy
from moetrace.errors import ReplayError

examples = settings(max_examples=80, deadline=None)
lengths_and_side = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["left", "right"]))


def ids(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), np.int64)


def pairs(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(segment.start, segment.stop) for segment in segments]


@given(lengths_and_side, st.integers(0, 3), st.sampled_from([bool, np.int64, np.float32]))
@examples
def test_padded_sequences_are_where_the_mask_has_ones(batch: tuple[list[int], str], spare: int, dtype: Any) -> None:
    lengths, side = batch
    columns = max(lengths) + spare
    mask = [[0] * (columns - n) + [1] * n if side == "left" else [1] * n + [0] * (columns - n) for n in lengths]
    expected = []
    for row in range(len(lengths)):
        places = [row * columns + column for column in range(columns) if mask[row][column]]
        expected.append((places[0], places[-1] + 1))
    segments = segments_of(ids(len(lengths), columns), attention_mask=np.array(mask, dtype))
    assert pairs(segments) == expected
    assert [len(segment) for segment in segments] == lengths


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 3))
@examples
def test_packed_sequences_are_between_their_boundaries(lengths: list[int], padding: int) -> None:
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    segments = segments_of(ids(1, bounds[-1] + padding), cu_seqlens=np.array(bounds, np.int32))
    assert pairs(segments) == [(bounds[n], bounds[n] + length) for n, length in enumerate(lengths)]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
@examples
def test_packed_sequences_begin_where_positions_restart(rows: list[list[int]]) -> None:
    columns = max(map(sum, rows))
    rows = [[*lengths, columns - sum(lengths)] if sum(lengths) < columns else lengths for lengths in rows]
    positions = [[position for length in lengths for position in range(length)] for lengths in rows]
    expected, at = [], 0
    for length in (length for lengths in rows for length in lengths):
        expected.append((at, at + length))
        at += length
    assert pairs(segments_of(ids(len(rows), columns), position_ids=np.array(positions))) == expected


def test_without_arguments_each_row_is_a_sequence() -> None:
    assert pairs(segments_of(ids(3, 4))) == [(0, 4), (4, 8), (8, 12)]


def test_one_row_of_positions_stands_for_all_rows() -> None:
    assert pairs(segments_of(ids(2, 3), position_ids=np.array([[0, 1, 2]]))) == [(0, 3), (3, 6)]


@pytest.mark.parametrize("wrap", [np.array, torch.tensor, list], ids=["numpy", "torch", "list"])
def test_arguments_are_read_from_arrays_tensors_and_lists(wrap: Any) -> None:
    assert pairs(segments_of(ids(2, 3), attention_mask=wrap([[0, 1, 1], [1, 1, 1]]))) == [(1, 3), (3, 6)]
    assert pairs(segments_of(ids(1, 5), cu_seqlens=wrap([0, 2, 5]))) == [(0, 2), (2, 5)]
    assert pairs(segments_of(ids(1, 5), position_ids=wrap([[0, 1, 0, 1, 2]]))) == [(0, 2), (2, 5)]


def test_a_tensor_that_needs_grad_is_read() -> None:
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]


# --- agreeing arguments ---


def test_left_padding_may_state_its_positions_too() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for filler in (0, 1):  # transformers fills padding with 0 or 1
        positions = np.array([[filler, filler, 0, 1, 2], [0, 1, 2, 3, 4]])
        segments = segments_of(ids(2, 5), attention_mask=mask, position_ids=positions)
        assert pairs(segments) == [(2, 5), (5, 10)]


def test_boundaries_may_come_with_positions_that_say_the_same() -> None:
    segments = segments_of(ids(1, 5), cu_seqlens=np.array([0, 2, 5]), position_ids=np.array([[0, 1, 0, 1, 2]]))
    assert pairs(segments) == [(0, 2), (2, 5)]


# --- contradictions ---


@pytest.mark.parametrize("shape", [(4,), (), (1, 2, 3)])
def test_what_is_no_batch_is_refused(shape: tuple[int, ...]) -> None:
    with refused(ReplayError, "input_ids must be a batch", expected="shape [B, S]", got=f"shape {shape}"):
        segments_of(np.zeros(shape, np.int64))


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (6,), (2, 1, 3, 3)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    expected, got = "shape (2, 3)", f"shape {shape}"
    with refused(ReplayError, "attention_mask does not fit", expected=expected, got=got, fix="cu_seqlens"):
        segments_of(ids(2, 3), attention_mask=np.ones(shape))


@pytest.mark.parametrize(
    ("row", "got"), [([1, 0, 1, 1], "3 ones with holes"), ([0, 1, 0, 1], "2 ones with holes"), ([0] * 4, "no token")]
)
def test_a_mask_with_holes_or_without_tokens_is_refused_by_its_row(row: list[int], got: str) -> None:
    with refused(ReplayError, "attention_mask row 1 is not one run of ones", expected="left or on the right", got=got):
        segments_of(ids(2, 4), attention_mask=[[1, 1, 1, 1], row])


@pytest.mark.parametrize("bounds", [[1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], [], [[0, 5]], [0, -2]])
def test_boundaries_that_do_not_ascend_from_0_are_refused(bounds: list) -> None:
    with refused(ReplayError, "cu_seqlens must be flat boundaries", expected="0 < ... ascending", got=bounds):
        segments_of(ids(1, 5), cu_seqlens=np.array(bounds, np.int64))


def test_unsigned_boundaries_that_descend_are_refused() -> None:
    with refused(ReplayError, "cu_seqlens must be flat boundaries"):
        segments_of(ids(1, 5), cu_seqlens=np.array([0, 4, 2, 5], np.uint32))


def test_a_single_number_is_refused_as_boundaries() -> None:
    with pytest.raises(ReplayError):
        segments_of(ids(1, 5), cu_seqlens=np.array(5))


def test_boundaries_that_leave_the_batch_are_refused() -> None:
    with refused(ReplayError, "cu_seqlens leaves the batch", expected="<= 10 tokens", got=11):
        segments_of(ids(2, 5), cu_seqlens=[0, 4, 11])


@pytest.mark.parametrize("positions", [[[1, 2, 3]], [[0, 1, 2], [3, 4, 5]]])
def test_rows_that_begin_in_the_middle_of_a_sequence_are_refused(positions: list[list[int]]) -> None:
    got = [row[0] for row in positions]
    with refused(ReplayError, "position_ids must begin at 0 in every row", got=got):
        segments_of(ids(len(positions), 3), position_ids=positions)


@pytest.mark.parametrize(
    ("row", "at"), [([0, 1, 3, 4], 0), ([0, 1, 1, 2], 0), ([0, 1, 0, 2], 2), ([0, 2, 1, 3], 0), ([0, 1, -1, -1], 0)]
)
def test_positions_that_do_not_count_up_are_refused_at_their_sequence(row: list[int], at: int) -> None:
    with refused(ReplayError, f"sequence at token {at} are not 0, 1, 2, ...", got=row[at:], fix="cu_seqlens"):
        segments_of(ids(1, 4), position_ids=[row])


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (3, 1, 5)])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ReplayError):
        segments_of(ids(1, 5), position_ids=np.zeros(shape, int))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"cu_seqlens": [0, 2, 5], "position_ids": [[0, 1, 2, 0, 1]]}, id="boundaries and positions"),
        pytest.param({"cu_seqlens": [0, 2, 5], "attention_mask": [[0, 0, 1, 1, 1]]}, id="boundaries and mask"),
        pytest.param({"attention_mask": [[1, 1, 1, 1, 1]], "position_ids": [[0, 1, 0, 1, 2]]}, id="mask and positions"),
        pytest.param({"attention_mask": [[0, 0, 1, 1, 1]], "position_ids": [[0, 1, 2, 3, 4]]}, id="shifted positions"),
        pytest.param({"attention_mask": [[1, 1, 2, 2, 2]]}, id="mask that numbers its sequences"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ReplayError):
        segments_of(ids(1, 5), **arguments)


def test_a_row_without_tokens_is_refused() -> None:
    for arguments in ({}, {"position_ids": np.zeros((1, 0), int)}, {"attention_mask": np.zeros((1, 0), int)}):
        with pytest.raises(ReplayError):
            segments_of(np.zeros((1, 0), np.int64), **arguments)


# --- padding between packed sequences ---


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=4))
@examples
def test_packed_sequences_padded_by_themselves_are_the_ones_between_their_boundaries(
    pieces: list[tuple[int, int, int]],
) -> None:
    mask: list[int] = []
    bounds, expected = [0], []
    for before, length, after in pieces:
        expected.append((len(mask) + before, len(mask) + before + length))
        mask += [0] * before + [1] * length + [0] * after
        bounds.append(len(mask))
    assert pairs(segments_of(ids(1, len(mask)), cu_seqlens=bounds, attention_mask=[mask])) == expected


def test_ones_that_no_boundaries_hold_are_refused() -> None:
    with refused(ReplayError, "ones outside of all boundaries", expected="from token 3 on", got="2 ones"):
        segments_of(ids(1, 5), cu_seqlens=[0, 3], attention_mask=[[1, 1, 0, 1, 1]])
