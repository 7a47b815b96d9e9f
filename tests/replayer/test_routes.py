"""Routes of a batch can be taken apart, and given to consumers that want an id in every place.

Axes: N tokens, L MoE layers, K experts per token, B rows and S columns of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import layouts, make_trace, random_ids, refused

from moetrace.errors import ReplayError
from moetrace.layout import MoeLayout
from moetrace.replayer import AlignedRoutes, ReplayPolicy, TokenMode, align
from moetrace.trace import RoutingTrace

examples = settings(max_examples=60, deadline=None)


@st.composite
def routes(draw: st.DrawFn) -> AlignedRoutes:
    """A left-padded batch with holes."""
    layout = draw(layouts())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    columns = max(lengths) + draw(st.integers(0, 2))
    traces = []
    for length in lengths:
        ids_TLK, valid_T = random_ids(rng, length, layout), rng.random(length) < 0.7
        traces.append(RoutingTrace.build(ids_TLK, layout, [1] * length, valid_T=valid_T))
    mask = [[0] * (columns - length) + [1] * length for length in lengths]
    return align(traces, np.ones((len(lengths), columns), int), attention_mask=mask, missing="live")


@given(routes())
@examples
def test_every_row_of_dense_routes_has_distinct_legal_ids_and_replayed_rows_their_own(given_routes: Any) -> None:
    layout = given_routes.layout
    for pad in ("distinct", "first"):
        dense_LNK = given_routes.dense(pad)
        assert dense_LNK.dtype == layout.dtype
        for layer, rows in enumerate(dense_LNK.tolist()):
            for n, row in enumerate(rows):
                assert len(set(row)) == layout.top_k
                assert all(0 <= expert < layout.num_experts for expert in row)
                if given_routes.mode_N[n] == TokenMode.REPLAY:
                    assert row == given_routes.experts_LNK[layer, n].tolist()
                elif pad == "first":
                    assert row == list(range(layout.top_k))
                else:
                    assert row == [(n * layout.top_k + k) % layout.num_experts for k in range(layout.top_k)]


@given(routes())
@examples
def test_missing_rows_can_be_marked_by_minus_one(given_routes: Any) -> None:
    dense_LNK = given_routes.dense("missing")
    assert dense_LNK.dtype == np.int16
    replayed_N = given_routes.mode_N == TokenMode.REPLAY
    assert (dense_LNK[:, ~replayed_N] == -1).all()
    assert np.array_equal(dense_LNK[:, replayed_N], given_routes.experts_LNK[:, replayed_N])


def test_fillers_load_all_experts_alike() -> None:
    layout = MoeLayout((0,), 12, 3)
    trace = make_trace([1] * 40, layout, rows=0)
    dense_LNK = align([trace], [[1] * 40], missing="live").dense()
    assert np.bincount(dense_LNK.reshape(-1), minlength=12).tolist() == [10] * 12


@pytest.mark.parametrize("num_experts", [128, 129, 256, 257, 32768, 32769, 65536])
def test_dense_ids_fit_their_dtype_or_it_is_refused(num_experts: int) -> None:
    layout = MoeLayout((0,), num_experts, 2)
    top = RoutingTrace.build(np.array([[[num_experts - 1, 0]]]), layout, [1, 2])
    given_routes = align([top], [[1, 2]])
    assert given_routes.dense()[0, 0].tolist() == [num_experts - 1, 0]
    assert given_routes.dense("missing")[0].tolist() == [[num_experts - 1, 0], [-1, -1]]
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64):
        fits = num_experts - 1 <= np.iinfo(dtype).max
        if fits:
            assert given_routes.dense(dtype=dtype)[0, 0].tolist() == [num_experts - 1, 0]
            assert given_routes.dense(dtype=dtype).dtype == dtype
        else:
            with refused(ReplayError, "the ids do not fit the dtype", expected=f"0..{num_experts - 1}"):
                given_routes.dense(dtype=dtype)


def test_a_mark_needs_a_signed_dtype_and_ids_an_integer_one() -> None:
    given_routes = align([make_trace([1, 2, 3])], [[1, 2, 3]])
    with refused(ReplayError, "the ids do not fit the dtype", expected="-1..15", got="uint8"):
        given_routes.dense("missing", np.uint8)
    with refused(ReplayError, "the ids do not fit the dtype", got="float32"):
        given_routes.dense(dtype=np.float32)
    with refused(ReplayError, "pad is unknown", got="'zeros'"):
        given_routes.dense("zeros")  # type: ignore[arg-type]


def test_routes_by_margin_are_not_for_those_who_cannot_look_at_the_live_router() -> None:
    given_routes = align([make_trace([1, 2, 3])], [[1, 2, 3]], policy=ReplayPolicy(margin=0.1))
    with refused(ReplayError, "a replay by margin depends on the live router", got="margin 0.1"):
        given_routes.dense()


@given(routes(), st.randoms(use_true_random=False))
@examples
def test_any_permutation_can_be_undone(given_routes: AlignedRoutes, random: Any) -> None:
    order = list(range(given_routes.num_tokens))
    random.shuffle(order)
    back = given_routes.take(order).take(np.argsort(order), shape=given_routes.shape)
    for name in ("experts_LNK", "mode_N", "sequence_N", "position_N", "follows_N", "tokens_N"):
        assert np.array_equal(getattr(back, name), getattr(given_routes, name)), name
    assert back.shape == given_routes.shape
    assert given_routes.take([]).num_tokens == 0


@given(routes())
@examples
def test_sequence_first_order_is_column_by_column(given_routes: AlignedRoutes) -> None:
    rows, columns = given_routes.require_batch()
    flipped = given_routes.sequence_first()
    place = 0
    for column in range(columns):
        for row in range(rows):
            n = row * columns + column
            assert flipped.position_N[place] == given_routes.position_N[n]
            assert flipped.sequence_N[place] == given_routes.sequence_N[n]
            assert np.array_equal(flipped.experts_LNK[:, place], given_routes.experts_LNK[:, n])
            place += 1
    assert flipped.shape is None


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ([0, 3], "a token that is not there"),
        ([-1], "a token that is not there"),
        ([1, 1], "a token is taken twice"),
        ([[0, 1]], "taken by their numbers"),
        ([True, False, True], "taken by their numbers"),
        ([0.0], "taken by their numbers"),
    ],
)
def test_what_is_no_choice_of_tokens_is_refused(index: list, what: str) -> None:
    with refused(ReplayError, what):
        align([make_trace([1, 2, 3])], [[1, 2, 3]]).take(index)


def test_a_shape_that_is_not_of_the_tokens_taken_is_refused() -> None:
    with refused(ReplayError, "the shape is not that of the tokens taken", expected="2 tokens", got="(1, 3)"):
        align([make_trace([1, 2, 3])], [[1, 2, 3]]).take([0, 1], shape=(1, 3))
