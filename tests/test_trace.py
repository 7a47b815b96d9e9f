"""The nouns keep their contract: validated at birth, immutable, cut and joined without losing or bending an id."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import assert_contract, dyed_ids, make_trace, refused, routing_traces, sha256_of

from moetrace.errors import InvalidTraceError, LayoutMismatchError, MoetraceError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.tokens import first_difference, token_sha256
from moetrace.trace import RoutingTrace, WeightSpan

LAYOUT = MoeLayout((3, 4), 8, 2)
IDS = [[[0, 1], [7, 2]], [[5, 4], [3, 0]], [[6, 7], [1, 5]]]
TOKENS = [10, 11, 12, 13]
examples = settings(max_examples=80, deadline=None)


def build(**changes: Any) -> RoutingTrace:
    arguments: dict[str, Any] = {"experts_TLK": np.array(IDS), "layout": LAYOUT, "tokens": TOKENS} | changes
    return RoutingTrace.build(
        arguments.pop("experts_TLK"), arguments.pop("layout"), arguments.pop("tokens"), **arguments
    )


def raw(**changes: Any) -> RoutingTrace:
    """The constructor itself, which narrows nothing."""
    attributes: dict[str, Any] = {
        "experts_TLK": np.array(IDS, np.uint8),
        "valid_T": np.ones(3, bool),
        "layout": LAYOUT,
        "tokens": np.array(TOKENS, np.int64),
        "num_tokens": 4,
        "token_sha256": sha256_of(TOKENS),
    }
    return RoutingTrace(**(attributes | changes))


# --- layout ---


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [
        (1, "uint8"),
        (127, "uint8"),
        (128, "uint8"),
        (255, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (512, "uint16"),
        (65536, "uint16"),
    ],
)
def test_highest_expert_id_is_kept_in_the_smallest_dtype(num_experts: int, dtype: str) -> None:
    layout = MoeLayout((0,), num_experts, 1)
    trace = RoutingTrace.build(np.array([[[num_experts - 1]], [[0]]]), layout, [1, 2, 3])
    assert str(layout.dtype) == dtype
    assert str(trace.experts_TLK.dtype) == dtype
    assert trace.experts_TLK.tolist() == [[[num_experts - 1]], [[0]]]
    assert trace.valid_T.tolist() == [True, True]
    assert layout.row_bytes == (1 if dtype == "uint8" else 2)
    with refused(InvalidTraceError, "out of range", expected=f"0 <= id < {num_experts}", got=num_experts):
        RoutingTrace.build(np.array([[[num_experts]]]), layout, [1])


def test_layout_sizes_follow_from_its_three_facts() -> None:
    layout = MoeLayout((1, 2, 5), 300, 4)
    assert (layout.num_layers, layout.row_bytes) == (3, 3 * 4 * 2)


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 2, 1), (-1, 0)])
def test_layers_that_do_not_ascend_are_refused(layers: tuple[int, ...]) -> None:
    with refused(InvalidTraceError, "layers", expected="ascending", got=layers):
        MoeLayout(layers, 8, 2)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 0), (8, 9), (0, 1), (8, -1), (65537, 2)])
def test_top_k_and_experts_that_do_not_fit_are_refused(num_experts: int, top_k: int) -> None:
    got = f"top_k={top_k}, num_experts={num_experts}"
    with refused(InvalidTraceError, "do not fit together", expected="<= 65536", got=got):
        MoeLayout((0,), num_experts, top_k)


def test_another_layout_is_refused_by_name() -> None:
    with refused(LayoutMismatchError, "that of my model", expected=(3, 5), got=(3, 4), fix="absolute"):
        LAYOUT.require_same(MoeLayout((3, 5), 8, 2), "my model")
    LAYOUT.require_same(MoeLayout((3, 4), 8, 2), "my model")


# --- birth ---


def test_a_trace_is_what_it_was_built_from() -> None:
    trace = build(
        valid_T=[True, False, True],
        weight_spans=[WeightSpan(0, "a"), WeightSpan(2, "b")],
        order="set",
        fingerprint="f",
        engine="e",
    )
    assert trace.experts_TLK.tolist() == [IDS[0], [[0, 0], [0, 0]], IDS[2]]
    assert trace.valid_T.tolist() == [True, False, True]
    assert trace.tokens is not None
    assert trace.tokens.tolist() == TOKENS
    assert (trace.num_tokens, trace.start, trace.stop, trace.num_rows, len(trace), trace.num_valid) == (
        4,
        0,
        3,
        3,
        3,
        2,
    )
    assert [trace.weight_version(row) for row in range(3)] == ["a", "a", "b"]
    assert build().weight_version(0) is None
    assert (trace.order, trace.fingerprint, trace.engine) == ("set", "f", "e")
    assert "T=3 (2 valid), L=2, K=2, E=8" in repr(trace)
    assert_contract(trace)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_ids_of_every_integer_dtype_narrow_to_the_same_trace(dtype: type) -> None:
    trace = build(experts_TLK=np.array(IDS, dtype))
    assert trace.experts_TLK.dtype == np.uint8
    assert trace == build()


def test_whatever_fills_a_row_that_is_not_valid_is_dropped() -> None:
    filled = np.array(IDS)
    filled[1] = -1
    trace = build(experts_TLK=filled, valid_T=[True, False, True])
    assert trace.experts_TLK[1].tolist() == [[0, 0], [0, 0]]
    filled[1] = 10**6
    assert build(experts_TLK=filled, valid_T=[True, False, True]) == trace


@pytest.mark.parametrize("filler", [0, 7])
def test_a_filled_row_passed_off_as_captured_is_refused(filler: int) -> None:
    ids = np.array(IDS)
    ids[1] = filler
    got, fix = [filler, filler], "marked in valid_T, not filled"
    with refused(
        InvalidTraceError, "row 1, layer 3 names one expert twice", expected="2 distinct ids", got=got, fix=fix
    ):
        build(experts_TLK=ids)
    with refused(InvalidTraceError, "row 1, layer 3 names one expert twice", got=got):
        raw(experts_TLK=ids.astype(np.uint8))


def test_a_duplicate_is_named_by_its_row_in_the_trace_and_its_decoder_layer() -> None:
    ids = np.array(IDS)
    ids[2, 1] = [5, 5]
    with refused(InvalidTraceError, "row 2, layer 4 names one expert twice", expected="2 distinct ids", got=[5, 5]):
        build(experts_TLK=ids, valid_T=[False, True, True])


def test_of_many_duplicates_in_a_long_trace_the_first_is_named() -> None:
    """A trace so long that several threads check it."""
    rows, layout = 20_000, MoeLayout((0, 2), 64, 64)
    experts_TLK = np.tile(np.arange(64, dtype=np.uint8), (rows, 2, 1))
    RoutingTrace.build(experts_TLK, layout, np.arange(rows))
    experts_TLK[12_345:, 1, 5] = 6
    with refused(InvalidTraceError, "row 12345, layer 2 names one expert twice"):
        RoutingTrace.build(experts_TLK, layout, np.arange(rows))


def test_duplicates_that_are_not_neighbours_are_found() -> None:
    layout = MoeLayout((0,), 8, 3)
    with refused(InvalidTraceError, "names one expert twice", got=[4, 1, 4]):
        RoutingTrace.build(np.array([[[4, 1, 4]]]), layout, [1])


@pytest.mark.parametrize(("bad", "shown"), [(-1, "-1"), (8, "8"), (2**40, str(2**40)), (256, "256"), (-256, "-256")])
def test_an_id_out_of_range_is_refused_and_never_wraps(bad: int, shown: str) -> None:
    ids = np.array(IDS)
    ids[1, 1, 0] = bad
    with refused(InvalidTraceError, "row 1, layer 4 is out of range", expected="0 <= id < 8", got=shown):
        build(experts_TLK=ids)


def test_rows_that_somebody_has_checked_are_not_looked_at_again_but_everything_else_is() -> None:
    layout, tokens = MoeLayout((0,), 16, 2), [1, 2, 3]
    twice = np.full((2, 1, 2), 5, np.uint8)
    with pytest.raises(InvalidTraceError, match="names one expert twice"):
        RoutingTrace.build(twice, layout, tokens)
    trace = RoutingTrace.build(twice, layout, tokens, rows_checked=True)
    assert trace.experts_TLK.tolist() == twice.tolist()
    for wrong in (
        {"experts_TLK": twice[:, :, :1]},
        {"tokens": [1]},
        {"weight_spans": [WeightSpan(1, "v")]},
        {"valid_T": np.ones(3, bool)},
    ):
        with pytest.raises(InvalidTraceError):
            RoutingTrace.build(
                **{"experts_TLK": twice, "layout": layout, "tokens": tokens, **wrong},  # type: ignore[arg-type]
                rows_checked=True,
            )


def test_an_id_out_of_range_in_the_right_dtype_is_refused() -> None:
    ids = np.array(IDS, np.uint8)
    ids[0, 0, 0] = 8
    with refused(InvalidTraceError, "out of range", expected="id < 8", got="8"):
        raw(experts_TLK=ids)


@pytest.mark.parametrize(
    ("experts_TLK", "got"),
    [
        (np.zeros((3, 2)), "shape (3, 2), dtype float64"),
        (np.zeros((3, 4), int), "shape (3, 4), dtype int64"),
        (np.array(IDS, np.float32), "dtype float32"),
        (np.array(IDS) > 3, "dtype bool"),
        ([], "shape (0,)"),
    ],
)
def test_what_is_not_an_integer_array_with_three_axes_is_refused(experts_TLK: Any, got: str) -> None:
    with refused(InvalidTraceError, "integer array [T, L, K]", expected="3 axes of integers", got=got):
        build(experts_TLK=experts_TLK)


@pytest.mark.parametrize(
    ("experts_TLK", "got"),
    [
        (np.array(IDS)[:, :1], "shape (3, 1, 2)"),
        (np.array(IDS)[:, :, :1], "shape (3, 2, 1)"),
        (np.array(IDS).transpose(1, 0, 2), "shape (2, 3, 2)"),
        (np.array(IDS)[:2], "shape (2, 2, 2)"),
    ],
)
def test_a_shape_that_does_not_fit_layout_and_bitmap_is_refused(experts_TLK: np.ndarray, got: str) -> None:
    with refused(
        InvalidTraceError, "does not fit", expected="shape (3, 2, 2), dtype uint8", got=got, fix="token-major"
    ):
        build(experts_TLK=experts_TLK, valid_T=np.ones(3, bool))


def test_an_array_of_another_dtype_is_refused_by_the_constructor() -> None:
    with refused(
        InvalidTraceError, "does not fit", expected="dtype uint8", got="dtype int64", fix="RoutingTrace.build"
    ):
        raw(experts_TLK=np.array(IDS))
    with refused(InvalidTraceError, "valid_T must be [T] bool", got="dtype uint8"):
        raw(valid_T=np.ones(3, np.uint8))


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), ()])
def test_a_bitmap_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTraceError):
        build(valid_T=np.ones(shape, bool))


@pytest.mark.parametrize(
    "valid_T", [[-1, 2, 1], [1, 0, 1], ["False", "0", ""], np.ones(3, np.uint8), [1.0, 0.0, 1.0], [None] * 3], ids=repr
)
def test_what_only_looks_like_a_bitmap_is_refused(valid_T: Any) -> None:
    with refused(InvalidTraceError, "valid_T must be [T] bool", got="shape (3,)", fix="mask == 1"):
        build(valid_T=valid_T)


def test_ids_in_a_row_that_is_not_valid_are_refused_by_the_constructor() -> None:
    with refused(InvalidTraceError, "rows that are not valid must hold zeros", expected="0"):
        raw(valid_T=np.array([True, False, True]))


@pytest.mark.parametrize("start", [-1, 2, 3])
def test_more_rows_than_tokens_are_refused(start: int) -> None:
    expected, got = "start + T <= 4 tokens, start >= 0", f"start {start} + T 3"
    with refused(InvalidTraceError, "more rows than tokens", expected=expected, got=got, fix="P + O - 1"):
        build(start=start)
    build(start=1)  # a scored sequence has one row for each token


def test_a_token_count_or_hash_that_is_not_that_of_the_tokens_is_refused() -> None:
    with refused(InvalidTraceError, "num_tokens is not the number of tokens", expected="4", got="5"):
        raw(num_tokens=5)
    wrong = sha256_of([10, 11, 12, 14])
    with refused(InvalidTraceError, "token_sha256 is not the hash", got=wrong):
        raw(token_sha256=wrong)


@pytest.mark.parametrize(
    "tokens", [np.array([10, 11, 12, -1]), np.array([10, 11, 12, 2**32])], ids=["negative", "beyond uint32"]
)
def test_token_ids_that_the_hash_cannot_tell_apart_are_refused(tokens: np.ndarray) -> None:
    with pytest.raises(MoetraceError):
        build(tokens=tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [10.0, 11.0, 12.0, 13.0],
        [10.9, 11, 12, 13],
        np.array(TOKENS, np.float32),
        ["10", "11", "12", "13"],
        [True, False, True, True],
        [10, 11, 12, None],
        [10, 11, 12, 2**70],
        [[10, 11], [12]],
        None,
        10,
    ],
    ids=repr,
)
def test_tokens_that_are_no_whole_numbers_are_refused_and_never_rounded(tokens: Any) -> None:
    ask: list[Callable[[], object]] = [
        lambda: build(tokens=tokens),
        lambda: build().with_tokens(tokens),
        lambda: build().without_tokens().with_tokens(tokens),
        lambda: build().require_tokens(tokens, "these"),
        lambda: token_sha256(tokens),
    ]
    for call in ask:
        with refused(InvalidTraceError, "tokens must be the ids of one sequence", expected="whole numbers"):
            call()


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint32])
def test_tokens_of_another_dtype_are_refused_by_the_constructor(dtype: type) -> None:
    with refused(InvalidTraceError, "tokens must be [num_tokens] int64", got=dtype.__name__, fix="RoutingTrace.build"):
        raw(tokens=np.array(TOKENS, dtype))


@pytest.mark.parametrize("token", [-1, 2**32 + 1])
def test_the_hash_of_token_ids_beyond_its_range_is_refused(token: int) -> None:
    for tokens in ([token], np.array([token])):
        with refused(InvalidTraceError, "tokens must be the ids of one sequence", expected="0 <= id < 2**32"):
            token_sha256(tokens)


def test_tokens_of_a_batch_are_refused_where_those_of_one_sequence_belong() -> None:
    with pytest.raises(MoetraceError):
        build(tokens=[TOKENS, TOKENS, TOKENS])


@pytest.mark.parametrize("starts", [(1,), (0, 2, 1), (0, 1, 1), (0, 3), (0, -1), (-1, 0)])
def test_weight_spans_that_do_not_begin_at_row_0_and_ascend_are_refused(starts: tuple[int, ...]) -> None:
    spans = [WeightSpan(start, str(number)) for number, start in enumerate(starts)]
    with refused(InvalidTraceError, "weight_spans", expected="0 < ... < 3", got=list(starts)):
        build(weight_spans=spans)


def test_an_unknown_order_is_refused() -> None:
    with refused(InvalidTraceError, "order is unknown", expected="'rank' or 'set'", got="'sorted'"):
        build(order="sorted")


def test_an_empty_trace_is_legal() -> None:
    trace = build(experts_TLK=np.zeros((0, 2, 2), int), tokens=[])
    assert (trace.num_rows, trace.num_valid, trace.stop) == (0, 0, 0)
    assert_contract(trace)


@given(routing_traces())
@examples
def test_every_trace_that_is_born_keeps_the_contract(trace: RoutingTrace) -> None:
    assert_contract(trace)


# --- immutable ---


def test_a_trace_cannot_be_changed() -> None:
    trace = build()
    assert trace.tokens is not None
    for array in (trace.experts_TLK, trace.valid_T, trace.tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(FrozenInstanceError):
        trace.start = 1  # type: ignore[misc]
    part = trace.slice(1, 2)
    with pytest.raises(ValueError, match="read-only"):
        part.experts_TLK[0] = 0


def test_changing_what_a_trace_was_built_from_does_not_change_it() -> None:
    ids, valid, tokens = np.array(IDS, np.uint8), np.ones(3, bool), np.array(TOKENS, np.int64)
    for trace in (
        build(experts_TLK=ids, valid_T=valid, tokens=tokens),
        raw(experts_TLK=ids, valid_T=valid, tokens=tokens),
    ):
        saved = ids.copy(), valid.copy(), tokens.copy()
        ids[:], valid[:], tokens[:] = 0, False, 0
        assert trace == build()
        assert trace.tokens is not None
        assert trace.tokens.tolist() == TOKENS
        ids[:], valid[:], tokens[:] = saved
        assert ids.flags.writeable  # the caller's own array stays as it was


def test_a_read_only_view_of_a_callers_buffer_does_not_leak_into_a_trace() -> None:
    ids, tokens = np.array(IDS, np.uint8), np.array(TOKENS, np.int64)
    views = ids.view(), tokens.view()
    for view in views:
        view.flags.writeable = False
    trace = raw(experts_TLK=views[0], tokens=views[1])
    ids[:], tokens[:] = 0, 0
    assert trace.experts_TLK.tolist() == IDS
    assert trace.tokens is not None
    assert trace.tokens.tolist() == TOKENS


def copies(trace: RoutingTrace) -> list[RoutingTrace]:
    """What Python makes of a trace on its way to another process, and otherwise."""
    pickled = [pickle.loads(pickle.dumps(trace, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*pickled, copy.copy(trace), copy.deepcopy(trace)]


@given(routing_traces())
@settings(max_examples=20, deadline=None)
def test_copies_and_pickles_are_the_same_trace_and_as_immutable(trace: RoutingTrace) -> None:
    assert trace.num_valid == trace.valid_T.sum()  # which is kept, and must not be taken for a fact
    for same in (*copies(trace), *copies(trace.without_tokens())):
        assert_contract(same)
        assert same == (trace if same.tokens is not None else trace.without_tokens())


def test_a_pickle_of_what_is_no_trace_is_refused() -> None:
    trace = build()
    trace.experts_TLK.flags.writeable = True  # what nobody should do
    trace.experts_TLK[1, 0] = 5
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with refused(InvalidTraceError, "row 1, layer 3 names one expert twice"):
            pickle.loads(pickle.dumps(trace, protocol))


def test_arrays_in_another_memory_order_are_stored_in_c_order() -> None:
    trace = raw(experts_TLK=np.asfortranarray(np.array(IDS, np.uint8)))
    assert trace.experts_TLK.flags.c_contiguous
    assert trace == build()


@pytest.mark.parametrize(
    "changes",
    [
        {"experts_TLK": np.array([[[0, 1], [7, 3]], *IDS[1:]])},
        {"valid_T": [True, True, False]},
        {"tokens": [10, 11, 12, 14]},
        {"tokens": [10, 11, 12]},
        {"layout": MoeLayout((3, 5), 8, 2)},
        {"layout": MoeLayout((3, 4), 9, 2)},
        {"start": 1},
        {"weight_spans": [WeightSpan(0, "a")]},
        {"order": "set"},
        {"fingerprint": "f"},
        {"engine": "e"},
    ],
)
def test_traces_are_equal_only_if_every_fact_is(changes: dict[str, Any]) -> None:
    assert build() == build()
    assert hash(build()) == hash(build())
    assert build(**changes) != build()
    assert build() != "a trace"


def test_a_trace_that_knows_only_the_hash_is_not_the_one_that_knows_the_tokens() -> None:
    assert raw(tokens=None) != raw()


# --- tokens ---


@pytest.mark.parametrize("tokens", [[], [0], [1, 2, 3], [2**32 - 1, 0, 151_643]])
def test_token_hash_is_sha256_over_little_endian_uint32(tokens: list[int]) -> None:
    expected = hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens)).hexdigest()
    assert token_sha256(tokens) == expected
    assert token_sha256(np.array(tokens, np.int64)) == expected
    assert token_sha256(np.array(tokens, ">u4")) == expected
    assert build(tokens=[*TOKENS, *tokens]).token_sha256 == sha256_of([*TOKENS, *tokens])


def test_token_hash_has_a_known_value() -> None:
    # printf '\1\0\0\0\2\0\0\0' | sha256sum
    assert token_sha256([1, 2]) == "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f"


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
@examples
def test_first_difference_equals_its_loop(a: list[int], b: list[int]) -> None:
    expected = None
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            expected = position
            break
    assert first_difference(np.array(a, int), np.array(b, int)) == expected


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:2], [*TOKENS, 99], []])
def test_the_same_tokens_cut_short_or_gone_on_are_accepted(tokens: list[int]) -> None:
    build().require_tokens(tokens, "mine")


@pytest.mark.parametrize(("position", "length"), [(0, 4), (2, 4), (3, 4), (1, 2), (3, 9)])
def test_other_tokens_are_refused_and_the_first_difference_is_named(position: int, length: int) -> None:
    tokens = (TOKENS + [0] * 9)[:length]
    expected = f"token {tokens[position]}"
    tokens[position] = 77
    what = f"than mine: first difference at position {position}"
    with refused(TokenMismatchError, what, expected=expected, got="token 77", fix="order of the sequences"):
        build().require_tokens(tokens, "mine")


def test_a_batch_of_tokens_is_not_taken_for_a_sequence() -> None:
    with pytest.raises(MoetraceError):
        build().require_tokens(np.array([[10, 10, 10, 10]]), "mine")


@pytest.mark.parametrize("tokens", [[10, 11, 12], [*TOKENS, 1], [10, 11, 12, 14]])
def test_where_only_the_hash_is_known_all_tokens_must_be_the_same(tokens: list[int]) -> None:
    trace = raw(tokens=None)
    trace.require_tokens(TOKENS, "mine")
    expected = f"4 tokens with SHA-256 {sha256_of(TOKENS)[:16]}"
    got = f"{len(tokens)} with {sha256_of(tokens)[:16]}"
    with refused(TokenMismatchError, "other tokens than mine", expected=expected, got=got, fix="order"):
        trace.require_tokens(tokens, "mine")


# --- slice ---


@given(st.data())
@examples
def test_a_slice_has_exactly_the_rows_of_its_positions(data: st.DataObject) -> None:
    trace = data.draw(routing_traces())
    start = data.draw(st.integers(trace.start, trace.stop))
    stop = data.draw(st.integers(start, trace.stop))
    part = trace.slice(start, stop)
    assert_contract(part)
    assert (part.start, part.stop, part.num_rows) == (start, stop, stop - start)
    for row, position in enumerate(range(start, stop)):
        origin = position - trace.start
        assert part.experts_TLK[row].tolist() == trace.experts_TLK[origin].tolist()
        assert part.valid_T[row] == trace.valid_T[origin]
        assert part.weight_version(row) == trace.weight_version(origin)
    assert bool(part.weight_spans) == bool(trace.weight_spans)
    whole = replace(
        part,
        experts_TLK=trace.experts_TLK,
        valid_T=trace.valid_T,
        start=trace.start,
        weight_spans=trace.weight_spans,
    )
    assert whole == trace  # nothing else changed, the tokens stay whole


@pytest.mark.parametrize(("start", "stop"), [(1, 4), (2, 6), (4, 3), (-1, 3), (6, 6)])
def test_a_slice_that_leaves_the_trace_is_refused(start: int, stop: int) -> None:
    trace = build(tokens=range(9), start=2)  # positions 2, 3, 4
    with refused(InvalidTraceError, "leaves the trace", expected="2 <= start <= stop <= 5", got=f"{start}, {stop}"):
        trace.slice(start, stop)


def test_weight_spans_of_a_slice_count_from_its_own_first_row() -> None:
    trace = make_trace(range(11), versions=[(0, "a"), (3, "b"), (7, "c")])
    assert trace.slice(0, 3).weight_spans == (WeightSpan(0, "a"),)
    assert trace.slice(3, 8).weight_spans == (WeightSpan(0, "b"), WeightSpan(4, "c"))
    assert trace.slice(2, 7).weight_spans == (WeightSpan(0, "a"), WeightSpan(1, "b"))
    assert trace.slice(8, 10).weight_spans == (WeightSpan(0, "c"),)


# --- concat ---


@given(st.data())
@examples
def test_slices_joined_again_are_the_original(data: st.DataObject) -> None:
    trace = data.draw(routing_traces(min_rows=1))
    inner = st.sets(st.integers(trace.start + 1, trace.stop - 1), max_size=3) if len(trace) > 1 else st.just(set())
    cuts = [trace.start, *sorted(data.draw(inner)), trace.stop]
    parts = [trace.slice(a, b) for a, b in pairwise(cuts)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.concat(part)
    assert_contract(joined)
    assert joined == trace


@given(st.data())
@examples
def test_joining_an_empty_slice_changes_nothing(data: st.DataObject) -> None:
    trace = data.draw(routing_traces())
    cut = data.draw(st.integers(trace.start, trace.stop))
    nothing = trace.slice(cut, cut)
    before, after = trace.slice(trace.start, cut), trace.slice(cut, trace.stop)
    assert before.concat(nothing) == before
    assert nothing.concat(after) == after


def test_a_turn_after_a_turn_that_captured_nothing_keeps_its_own_weights() -> None:
    nothing = make_trace([5], rows=0, versions=[(0, "a")])
    later = make_trace([5, 6, 7], versions=[(0, "b")])
    assert nothing.concat(later).weight_version(0) == "b"


def test_a_later_turn_follows_on() -> None:
    first = make_trace([1, 2, 3, 4], versions=[(0, "a")], fingerprint="f")  # rows 0, 1, 2
    later = make_trace([1, 2, 3, 4, 5, 6, 7], start=3, versions=[(0, "a"), (1, "b")], fingerprint="f")  # rows 3, 4, 5
    both = first.concat(later)
    assert both == make_trace(range(1, 8), versions=[(0, "a"), (4, "b")], fingerprint="f")
    assert both.experts_TLK.tolist() == dyed_ids(6, first.layout).tolist()
    assert [both.weight_version(row) for row in range(6)] == ["a", "a", "a", "a", "b", "b"]


def test_new_weights_at_the_seam_of_two_turns_are_seen() -> None:
    first = make_trace([1, 2, 3, 4], versions=[(0, "a"), (2, "b")])
    later = make_trace([1, 2, 3, 4, 5, 6], start=3, versions=[(0, "c")])
    spans = (WeightSpan(0, "a"), WeightSpan(2, "b"), WeightSpan(3, "c"))
    assert first.concat(later).weight_spans == spans


def test_a_turn_whose_weights_are_unknown_makes_the_whole_unknown() -> None:
    known, unknown = make_trace([1, 2, 3], versions=[(0, "a")]), make_trace([1, 2, 3, 4], start=2)
    assert known.concat(unknown).weight_spans == ()
    assert make_trace([1, 2, 3]).concat(make_trace([1, 2, 3, 4], start=2, versions=[(0, "a")])).weight_spans == ()


@pytest.mark.parametrize(("a", "b", "both"), [("rank", "rank", "rank"), ("rank", "set", "set"), ("set", "rank", "set")])
def test_ranks_are_claimed_only_if_both_turns_have_them(a: str, b: str, both: str) -> None:
    first, later = build(order=a), build(order=b, tokens=range(10, 17), start=3)
    assert first.concat(later).order == both


def test_a_retokenised_context_is_refused_and_the_first_difference_is_named() -> None:
    first, later = make_trace([1, 2, 3, 4]), make_trace([1, 2, 9, 9, 5], start=3)
    what = "do not continue this one's: first difference at position 2"
    with refused(TokenMismatchError, what, expected="3", got="9", fix="Send token ids, not text"):
        first.concat(later)


def test_a_context_that_was_cut_is_refused() -> None:
    first, later = make_trace([1, 2, 3, 4, 5]), make_trace([1, 2, 3], start=1)
    with refused(TokenMismatchError, "first difference at position 3", expected="4", fix="Send token ids, not text"):
        first.concat(later)


@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_gap_or_overlap_between_turns_is_refused(start: int) -> None:
    first, later = make_trace([1, 2, 3, 4]), make_trace([1, 2, 3, 4, 5, 6], start=start)
    with refused(InvalidTraceError, "do not follow on", expected="start 3", got=start):
        first.concat(later)


def test_turns_of_different_models_are_refused() -> None:
    first = make_trace([1, 2, 3], fingerprint="f")
    other = make_trace([1, 2, 3, 4], MoeLayout((1, 2, 6), 16, 2), start=2)
    with refused(LayoutMismatchError, "the later turn", expected=(1, 2, 6), got=(1, 2, 5)):
        first.concat(other)
    with refused(LayoutMismatchError, "different models", expected="f", got="g"):
        first.concat(make_trace([1, 2, 3, 4], start=2, fingerprint="g"))


def test_a_later_turn_without_token_ids_is_not_joined_on_trust() -> None:
    first, later = build(), build(tokens=range(10, 17), start=3)
    with refused(TokenMismatchError, "without token ids", fix="later.with_tokens"):
        first.concat(later.without_tokens())


def test_an_earlier_turn_that_knows_only_its_hash_is_joined_by_it() -> None:
    first, later = build(), build(tokens=range(10, 17), start=3)
    assert first.without_tokens().concat(later) == first.concat(later)


@pytest.mark.parametrize("tokens", [[10, 11, 12, 14, 15, 16, 17], [9, *range(11, 17)]])
def test_an_edited_context_is_noticed_by_its_hash_alone(tokens: list[int]) -> None:
    first, later = build().without_tokens(), build(tokens=tokens, start=3)
    with refused(TokenMismatchError, "one of the first 4 differs", expected=sha256_of(TOKENS)[:16], fix="token ids"):
        first.concat(later)


def test_a_cut_context_is_noticed_by_its_hash_alone() -> None:
    first = build(tokens=[*TOKENS, 99], start=0).without_tokens()
    with refused(TokenMismatchError, "one of the first 5 differs"):
        first.concat(build(experts_TLK=np.array(IDS[:1]), start=3))


# --- sets, and traces without their tokens ---


def test_a_set_forgets_ranks_and_nothing_else() -> None:
    trace = build(valid_T=[True, False, True], weight_spans=[WeightSpan(0, "a")], fingerprint="f", engine="e", start=0)
    forgetful = trace.as_set()
    assert forgetful.experts_TLK.tolist() == [[[0, 1], [2, 7]], [[0, 0], [0, 0]], [sorted(ids) for ids in IDS[2]]]
    assert replace(forgetful, experts_TLK=trace.experts_TLK, order="rank") == trace
    assert forgetful.as_set() == forgetful
    assert_contract(forgetful)


def test_sets_are_equal_whatever_the_order_of_their_ids() -> None:
    flipped = build(experts_TLK=np.flip(np.array(IDS), axis=2))
    assert build().as_set() == flipped.as_set()
    assert build() != flipped
    assert build(order="set").experts_TLK.tolist() == IDS  # the order of arrival is how the model summed


@given(routing_traces())
@examples
def test_sorting_for_a_set_equals_its_loop(trace: RoutingTrace) -> None:
    ids = [[sorted(route) for route in row] for row in trace.experts_TLK.tolist()]
    assert trace.as_set().experts_TLK.tolist() == ids


def test_a_trace_gets_its_tokens_back_if_they_are_its_own() -> None:
    trace = build()
    assert trace.without_tokens().tokens is None
    assert trace.without_tokens().with_tokens(TOKENS) == trace
    assert trace.without_tokens().with_tokens([*TOKENS, 1, 2]) == trace
    assert trace.with_tokens([*TOKENS, 1, 2]) == trace


def test_other_tokens_are_not_given_to_a_trace() -> None:
    with refused(TokenMismatchError, "other tokens than these", expected="4 tokens with SHA-256"):
        build().without_tokens().with_tokens([10, 11, 12, 14])
    with refused(TokenMismatchError, "other tokens than these", got="3 with"):
        build().without_tokens().with_tokens(TOKENS[:3])
    with refused(TokenMismatchError, "first difference at position 3"):
        build().with_tokens([10, 11, 12, 14])
