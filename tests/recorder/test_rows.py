"""Rows reach their tokens' slots exactly, padding never does, and pages travel with their rows."""

from __future__ import annotations

import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import EDGE_EXPERTS

from moetrace.errors import CaptureError
from moetrace.layout import MoeLayout
from moetrace.recorder import NO_TOKEN, RowStore, Staging, StepSlots
from moetrace.recorder.commit import commit_rows_twin
from moetrace.recorder.staging import NO_EXPERT

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
PAGE, PAGES = 4, 9


def filled(layout: MoeLayout, capacity: int, device: str, seed: int = 0) -> Staging:
    """Staging with distinct random ids everywhere, the largest and the smallest id among them."""
    staging = Staging(layout, capacity, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(layout.num_layers, capacity, layout.num_experts, generator=generator)
    draws[0, 0, layout.num_experts - 1] = draws[-1, -1, 0] = -1.0
    staging.ids_LNK.copy_(draws.argsort(-1)[..., : layout.top_k])
    return staging


def by_index(tokens: list[int], slots: list[int | None], stride: int, device: str) -> StepSlots:
    """A step whose tokens go to slots (None: padding) of pages that are `stride` indices apart."""
    index = [-1 if slot is None else slot // PAGE * stride + slot % PAGE for slot in slots]
    return StepSlots(
        torch.tensor(tokens, dtype=torch.int32, device=device),
        stride,
        write_index_N=torch.tensor(index, dtype=torch.int64, device=device),
    )


def by_table(tokens: list[int], slots: list[int | None], stride: int, device: str) -> StepSlots:
    """The same, one token a request; every request is three pages long and its token anywhere in them."""
    table, positions = [], []
    for number, slot in enumerate(slots):
        row = [-1, -1, -1] if slot is None else [(7 * number + i) % PAGES * stride for i in range(3)]
        page = number % 3
        if slot is not None:
            row[page] = slot // PAGE * stride
        table.append(row)
        positions.append(page * PAGE + (0 if slot is None else slot % PAGE))
    return StepSlots(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        stride,
        block_table_RB=torch.tensor(table, dtype=torch.int32, device=device),
        positions_N=torch.tensor(positions, dtype=torch.int32, device=device),
    )


class SlowStore:
    """The twin: a dictionary from slot to (row, token, version), filled by plain loops."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[list[list[int]], int, int]] = {}

    def commit(self, staging: Staging, tokens: list[int], slots: list[int | None], version: int) -> None:
        ids_LNK = staging.ids_LNK.tolist()
        for n, (token, slot) in enumerate(zip(tokens, slots, strict=True)):
            if slot is not None:
                self.slots[slot] = ([list(layer[n]) for layer in ids_LNK], token, version)

    def assert_same(self, store: RowStore) -> None:
        experts_SLK, marks_S2 = store.take(range(PAGES)).read(0, PAGES)
        assert experts_SLK.dtype == store.layout.dtype
        for slot in range(PAGES * PAGE):
            if slot in self.slots:
                row, *mark = self.slots[slot]
                assert experts_SLK[slot].tolist() == row
                assert marks_S2[slot].tolist() == mark
            else:
                assert marks_S2[slot].tolist() == [NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", [PAGE, 10])
@pytest.mark.parametrize("place", [by_index, by_table])
@pytest.mark.parametrize("num_experts", EDGE_EXPERTS)
def test_rows_go_to_their_slots(device: str, stride: int, place, num_experts: int) -> None:
    layout = MoeLayout((1, 2, 5), num_experts, min(4, num_experts))
    store, slow = RowStore(layout, PAGES, PAGE, torch.device(device)), SlowStore()
    rng = np.random.default_rng(num_experts)
    for version in range(3):
        store.set_version(version)
        count = int(rng.integers(1, 13))
        slots: list[int | None] = [int(slot) for slot in rng.permutation(PAGES * PAGE)[:count]]
        slots[int(rng.integers(count))] = None
        tokens = rng.integers(0, 1 << 20, count).tolist()
        staging = filled(layout, 12, device, seed=version)
        slow.commit(staging, tokens, slots, version)
        store.commit(staging, place(tokens, slots, stride, device))
    slow.assert_same(store)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.one_of(st.none(), st.integers(0, PAGES * PAGE - 1)), min_size=1, max_size=8).filter(
            lambda slots: len({*slots} - {None}) == len(slots) - slots.count(None)
        ),
        max_size=5,
    ),
    index=st.booleans(),
)
def test_any_schedule_of_steps(steps: list[list[int | None]], index: bool) -> None:
    layout = MoeLayout((0, 3), 300, 2)
    store, slow = RowStore(layout, PAGES, PAGE, torch.device("cpu")), SlowStore()
    for version, slots in enumerate(steps):
        store.set_version(version)
        staging, tokens = filled(layout, 8, "cpu", version), [100 * version + n for n in range(len(slots))]
        slow.commit(staging, tokens, slots, version)
        store.commit(staging, (by_index if index else by_table)(tokens, slots, PAGE, "cpu"))
    slow.assert_same(store)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "top_k"),
    [(48, 128, 8), (58, 256, 8), (61, 384, 8), (24, 32, 4), (3, 8, 1), (94, 512, 22)],
)
def test_the_kernel_equals_its_twin_bit_for_bit(num_layers: int, num_experts: int, top_k: int) -> None:
    layout = MoeLayout(tuple(range(num_layers)), num_experts, top_k)
    for place in (by_index, by_table):
        stores = [RowStore(layout, 300, PAGE, torch.device("cuda")) for _ in range(2)]
        for tokens in (1, 7, 640):
            slots: list[int | None] = np.random.default_rng(tokens).permutation(300 * PAGE)[:tokens].tolist()
            slots[0] = None
            step = place(list(range(tokens)), slots, PAGE, "cuda")
            staging, twin = (filled(layout, 640, "cuda") for _ in range(2))
            for ids_LNK in (staging.ids_LNK, twin.ids_LNK):
                ids_LNK[-1, tokens // 2, -1] = NO_EXPERT  # a router that did not write
            stores[0].commit(staging, step)
            commit_rows_twin(twin.ids_LNK, step, stores[1])
            assert torch.equal(staging.ids_LNK, twin.ids_LNK)
            assert torch.equal(stores[0].rows_SR, stores[1].rows_SR)
            assert torch.equal(stores[0].marks_S2, stores[1].marks_S2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", [by_index, by_table])
def test_a_step_that_wrote_nothing_leaves_no_row_of_the_step_before(device: str, place) -> None:
    store = RowStore(MoeLayout((0, 1), 8, 2), PAGES, PAGE, torch.device(device))
    staging = filled(store.layout, 6, device)
    store.commit(staging, place([5, 6, 7, 8], [0, 9, None, 3], PAGE, device))  # padding may be a token the next time
    assert (staging.ids_LNK[:, :4] == NO_EXPERT).all()
    assert (staging.ids_LNK[:, 4:] >= 0).all()
    staging.ids_LNK[:, 0] = torch.arange(2, device=device)
    staging.ids_LNK[0, 1] = torch.arange(2, device=device)  # one layer of two
    store.commit(staging, place([5, 6, 7, 8], [1, 10, 20, 4], PAGE, device))
    _, marks_S2 = store.take(range(PAGES)).read(0, PAGES)
    assert {slot: token for slot, token in enumerate(marks_S2[:, 0].tolist()) if token != NO_TOKEN} == {
        0: 5,
        9: 6,
        3: 8,
        1: 5,
    }


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_step_too_must_write_to_have_rows(device: str) -> None:
    store = RowStore(MoeLayout((0, 1), 8, 1), PAGES, PAGE, torch.device(device))
    store.commit(Staging(store.layout, 4, torch.device(device)), by_index([1, 2], [0, 1], PAGE, device))
    _, marks_S2 = store.take(range(PAGES)).read(0, PAGES)
    assert (marks_S2[:, 0] == NO_TOKEN).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [40, -3, 1 << 40, "twice", "twice, far apart"])
def test_a_row_that_is_none_is_not_marked_as_one(device: str, wrong: int | str) -> None:
    store = RowStore(MoeLayout((0, 1, 2), 40, 6), PAGES, PAGE, torch.device(device))
    staging = filled(store.layout, 5, device)
    of_router = staging.ids_LNK[1, 3]
    if isinstance(wrong, int):
        of_router[4] = wrong
    else:
        of_router[0] = of_router[1 if wrong == "twice" else 3]
    store.commit(staging, by_index([7, 7, 7, 7, 7], [0, 1, 2, 3, 4], PAGE, device))
    _, marks_S2 = store.take(range(PAGES)).read(0, PAGES)
    assert marks_S2[:5, 0].tolist() == [7, 7, 7, NO_TOKEN, 7]


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_beyond_the_store_is_not_written(device: str) -> None:
    store = RowStore(MoeLayout((0,), 8, 2), PAGES, PAGE, torch.device(device))
    store.commit(filled(store.layout, 4, device), by_index([1, 2], [PAGES * PAGE, PAGES * PAGE + 100], PAGE, device))
    SlowStore().assert_same(store)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_are_copied_and_put_back_with_rows_and_marks(device: str) -> None:
    layout = MoeLayout((0, 1), 300, 2)
    store, slow = RowStore(layout, PAGES, PAGE, torch.device(device)), SlowStore()
    slots: list[int | None] = list(range(2 * PAGE))
    staging = filled(layout, 8, device)
    slow.commit(staging, list(range(8)), slots, 0)
    store.commit(staging, by_index(list(range(8)), slots, PAGE, device))
    taken = store.take([0, 1])
    store.copy([1, 0], [5, 7])
    store.put_back([3], taken, first=1)
    for source, target in ((1, 5), (0, 7), (1, 3)):
        for offset in range(PAGE):
            slow.slots[target * PAGE + offset] = slow.slots[source * PAGE + offset]
    slow.assert_same(store)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("computed", [False, True])
def test_what_was_taken_does_not_change_when_the_slots_are_written_again(computed: bool, device: str) -> None:
    layout = MoeLayout((0, 1), 300, 2)
    store, slow = RowStore(layout, PAGES, PAGE, torch.device(device)), SlowStore()
    slots: list[int | None] = list(range(PAGES * PAGE))
    step = by_index(slots, slots, PAGE, device)  # type: ignore[arg-type]
    first, second = filled(layout, PAGES * PAGE, device), filled(layout, PAGES * PAGE, device, seed=1)
    slow.commit(first, slots, slots, 0)  # type: ignore[arg-type]
    store.commit(first, step)
    if device == "cuda":
        store.take(range(PAGES), computed=computed).read(0, 1)  # pinned memory is there: making it may wait
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)  # a step that still runs, half a second long
    pulled = store.take(range(PAGES), computed=computed)
    running = torch.cuda.current_stream().record_event() if device == "cuda" else None
    store.commit(second, step)
    experts_SLK, marks_S2 = pulled.read(2, 3)
    if running is not None:
        assert running.query() is not computed  # what the host knows to be computed does not wait for that step
    for row, slot in enumerate(range(2 * PAGE, 5 * PAGE)):
        assert experts_SLK[row].tolist() == slow.slots[slot][0]
        assert marks_S2[row].tolist() == [slot, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_however_many_pages_leave_none_waits_for_another_stream() -> None:
    """torch has 32 streams and hands them out in turn: with one for each batch of pages, each 32nd was the engine's
    own, and waited for the steps there."""
    store, steps = RowStore(MoeLayout((0, 1), 300, 2), PAGES, PAGE, torch.device("cuda")), torch.cuda.Stream()
    store.take(range(PAGES), computed=True).read(0, PAGES)  # pinned memory is there: making it may wait
    for _ in range(40):
        torch.cuda.synchronize()
        with torch.cuda.stream(steps):
            torch.cuda._sleep(1 << 25)  # some 20 ms
            running = steps.record_event()
        store.take(range(PAGES), computed=True).read(0, PAGES)
        assert not running.query()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_of_a_running_step_hold_up_no_others() -> None:
    store = RowStore(MoeLayout((0, 1), 300, 2), PAGES, PAGE, torch.device("cuda"))
    first = [store.take(range(PAGES), computed=computed) for computed in (True, False)]
    for pulled in first:
        pulled.read(0, PAGES)
    del first, pulled  # pinned memory for both is there: making it may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)  # half a second
    running = torch.cuda.current_stream().record_event()
    ready, late = (store.take(range(PAGES), computed=computed) for computed in (True, False))
    waiting = threading.Thread(target=late.read, args=(0, PAGES))
    waiting.start()
    time.sleep(0.1)  # it waits for the step now
    ready.read(0, PAGES)
    assert not running.query()
    waiting.join()
    assert running.query()


def test_rows_take_their_information_size() -> None:
    store = RowStore(MoeLayout(tuple(range(48)), 128, 8), 10, 256, torch.device("cpu"))
    assert store.nbytes == 2560 * (48 * 8 * 1 + 8)
    wide = RowStore(MoeLayout(tuple(range(61)), 384, 8), 10, 256, torch.device("cpu"))
    assert wide.nbytes == 2560 * (61 * 8 * 2 + 8)


def test_committing_more_tokens_than_staging_holds_is_refused_not_cut_short() -> None:
    store = RowStore(MoeLayout((0, 1), 300, 2), PAGES, PAGE, torch.device("cpu"))
    with pytest.raises(CaptureError, match="expected <= 6, got 7"):
        store.commit(filled(store.layout, 6, "cpu"), by_index([0] * 7, [*range(7)], PAGE, "cpu"))
    assert not any(chain.from_iterable(store.rows_SR.tolist()))
