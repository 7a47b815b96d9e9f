"""Rows of a running sequence are written once and gaps stay gaps; rows of KV pages follow their keys and values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import EDGE_EXPERTS, dyed_ids

from moetrace.layout import MoeLayout
from moetrace.recorder.rows import PagedRows, SequenceRows

LAYOUT = MoeLayout((1, 3), 300, 2)


def rows_of(start: int, stop: int, seed: int = 0) -> np.ndarray:
    return dyed_ids(stop, LAYOUT, seed)[start:].astype(LAYOUT.dtype)


def test_what_was_written_is_read() -> None:
    rows = SequenceRows(LAYOUT)
    rows.write(0, rows_of(0, 5))
    rows.write(5, rows_of(5, 6))
    experts_TLK, valid_T = rows.read(0, 6)
    assert experts_TLK.tolist() == dyed_ids(6, LAYOUT).tolist()
    assert experts_TLK.dtype == LAYOUT.dtype
    assert valid_T.tolist() == [True] * 6
    assert rows.read(2, 4)[0].tolist() == dyed_ids(4, LAYOUT)[2:].tolist()


def test_a_position_computed_again_keeps_its_first_row() -> None:
    rows = SequenceRows(LAYOUT)
    rows.write(2, rows_of(2, 4))
    rows.write(0, rows_of(0, 6, seed=100))  # resumed after preemption: 2 and 3 come again
    expected = dyed_ids(6, LAYOUT, 100)
    expected[2:4] = dyed_ids(4, LAYOUT)[2:]
    assert rows.read(0, 6)[0].tolist() == expected.tolist()


def test_gaps_stay_invalid_and_zero() -> None:
    rows = SequenceRows(LAYOUT)
    rows.write(1, rows_of(1, 2))
    rows.write(4, rows_of(4, 5))
    experts_TLK, valid_T = rows.read(0, 6)
    assert valid_T.tolist() == [False, True, False, False, True, False]
    assert not experts_TLK[~valid_T].any()


@pytest.mark.parametrize("capacity", [0, 1, 3, 64])
def test_rows_outgrow_any_capacity(capacity: int) -> None:
    rows = SequenceRows(LAYOUT, capacity)
    for position in range(200):
        rows.write(position, rows_of(position, position + 1))
    experts_TLK, valid_T = rows.read(0, 201)
    assert experts_TLK[:200].tolist() == dyed_ids(200, LAYOUT).tolist()
    assert valid_T.tolist() == [True] * 200 + [False]


def test_what_was_read_is_a_copy() -> None:
    rows = SequenceRows(LAYOUT)
    rows.write(0, rows_of(0, 2))
    experts_TLK, valid_T = rows.read(0, 2)
    experts_TLK[:], valid_T[:] = 9, False
    assert rows.read(0, 2)[0].tolist() == dyed_ids(2, LAYOUT).tolist()
    assert rows.read(0, 2)[1].all()


def test_reusing_the_buffer_that_was_written_changes_nothing() -> None:
    rows, staging = SequenceRows(LAYOUT), rows_of(0, 2)
    rows.write(0, staging)
    staging[:] = 0
    assert rows.read(0, 2)[0].tolist() == dyed_ids(2, LAYOUT).tolist()


@pytest.mark.parametrize("num_experts", EDGE_EXPERTS)
def test_the_highest_expert_is_kept(num_experts: int) -> None:
    layout = MoeLayout((0,), num_experts, 1)
    rows = SequenceRows(layout)
    rows.write(0, np.array([[[num_experts - 1]]], layout.dtype))
    assert rows.read(0, 1)[0].tolist() == [[[num_experts - 1]]]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12), st.integers(0, 8))
@settings(max_examples=80, deadline=None)
def test_any_order_of_writes_equals_a_dictionary_of_first_writes(writes: list[tuple[int, int]], capacity: int) -> None:
    rows, first = SequenceRows(LAYOUT, capacity), dict[int, list]()
    for seed, (start, count) in enumerate(writes):
        written = rows_of(start, start + count, 10 * seed)
        rows.write(start, written)
        for offset, row in enumerate(written.tolist()):
            first.setdefault(start + offset, row)
    experts_TLK, valid_T = rows.read(0, 50)
    nothing = [[0] * LAYOUT.top_k] * LAYOUT.num_layers
    assert valid_T.tolist() == [position in first for position in range(50)]
    assert experts_TLK.tolist() == [first.get(position, nothing) for position in range(50)]


# --- pages ---


def rows_of_pages(store: PagedRows, pages: list[int], tokens: list[int]) -> tuple[int, list, list[bool]]:
    """What a new sequence in these pages gets: how many rows, `experts_TLK`, `valid_T`."""
    rows = SequenceRows(LAYOUT)
    copied = store.copy_to(rows, pages, tokens)
    experts_TLK, valid_T = rows.read(0, len(tokens))
    return copied, experts_TLK.tolist(), valid_T.tolist()


def test_a_sequence_that_shares_a_prefix_gets_the_rows_of_its_pages() -> None:
    store = PagedRows(LAYOUT, page_size=4)
    store.write([7, 2, 5], 0, list(range(10)), rows_of(0, 10))
    expected = dyed_ids(10, LAYOUT).tolist()
    assert rows_of_pages(store, [7, 2], list(range(8))) == (8, expected[:8], [True] * 8)
    assert rows_of_pages(store, [7, 2, 5], list(range(10))) == (10, expected, [True] * 10)


def test_chunks_of_a_prefill_lie_in_their_pages() -> None:
    whole, chunked = PagedRows(LAYOUT, 4), PagedRows(LAYOUT, 4)
    whole.write([3, 1, 0], 0, list(range(11)), rows_of(0, 11))
    for start, stop in ((0, 3), (3, 9), (9, 10), (10, 11)):
        chunked.write([3, 1, 0], start, list(range(start, stop)), rows_of(start, stop))
    for store in (whole, chunked):
        assert rows_of_pages(store, [3, 1, 0], list(range(11)))[1] == dyed_ids(11, LAYOUT).tolist()


def test_a_page_holds_the_rows_of_its_last_owner() -> None:
    store = PagedRows(LAYOUT, 2)
    store.write([0], 0, [5, 6], rows_of(0, 2))
    store.write([0], 0, [5, 6], rows_of(0, 2, seed=50))
    assert rows_of_pages(store, [0], [5, 6])[1] == dyed_ids(2, LAYOUT, 50).tolist()


def test_a_row_computed_for_another_token_is_not_there() -> None:
    store = PagedRows(LAYOUT, 2)
    store.write([0, 1], 0, [5, 6, 7, 8], rows_of(0, 4))
    copied, _, valid = rows_of_pages(store, [0, 1], [5, 6, 7, 9])
    assert valid[:2] == [True, True]
    assert not valid[3]
    assert copied == sum(valid)
    assert rows_of_pages(store, [4], [5, 6])[0] == 0  # a page that was never written
    assert rows_of_pages(store, [0], [])[0] == 0


def test_rows_from_pages_do_not_replace_those_a_sequence_has() -> None:
    store, rows = PagedRows(LAYOUT, 2), SequenceRows(LAYOUT)
    rows.write(0, rows_of(0, 1, seed=50))
    store.write([0], 0, [5, 6], rows_of(0, 2))
    store.copy_to(rows, [0], [5, 6])
    assert rows.read(0, 1)[0].tolist() == dyed_ids(1, LAYOUT, 50).tolist()


@st.composite
def page_writes(draw: st.DrawFn) -> list[tuple[list[int], int, list[int]]]:
    """Pages, first position and tokens of some writes; pages are shared and reused freely."""
    writes = []
    for _ in range(draw(st.integers(0, 6))):
        pages = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        start = draw(st.integers(0, 3 * len(pages) - 1))
        tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3 * len(pages) - start))
        writes.append((pages, start, tokens))
    return writes


@given(page_writes(), st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), st.data())
@settings(max_examples=80, deadline=None)
def test_pages_equal_a_dictionary_of_last_writes(
    writes: list[tuple[list[int], int, list[int]]], pages: list[int], data: st.DataObject
) -> None:
    store, last = PagedRows(LAYOUT, page_size=3), dict[tuple[int, int], tuple[int, list]]()
    for seed, (written_pages, start, tokens) in enumerate(writes):
        written = rows_of(start, start + len(tokens), 20 * seed)
        store.write(written_pages, start, tokens, written)
        for n, token in enumerate(tokens):
            last[written_pages[(start + n) // 3], (start + n) % 3] = token, written[n].tolist()
    kept = [last.get((pages[position // 3], position % 3)) for position in range(3 * len(pages))]
    tokens = [0 if slot is None else slot[0] for slot in kept]
    if data.draw(st.booleans()):
        tokens[data.draw(st.integers(0, len(tokens) - 1))] += 1
    here = [slot is not None and slot[0] == token for slot, token in zip(kept, tokens, strict=True)]
    copied, experts, valid = rows_of_pages(store, pages, tokens)
    assert copied == sum(valid)
    for position, slot in enumerate(kept):
        if valid[position]:
            assert here[position]
            assert slot is not None
            assert experts[position] == slot[1]
        page = 3 * (position // 3)
        if all(here[page : page + 3]):
            assert valid[position]
