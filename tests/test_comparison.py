"""Comparison measures equal their definitions, written out as loops over sets and floats."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import layouts, make_trace, random_ids, refused, routing_traces

from moetrace.comparison import RoutingComparison, compare, extreme_token_ratio, kl_k3, shared_experts
from moetrace.errors import InvalidTraceError, LayoutMismatchError, TokenMismatchError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((3, 4), 8, 2)
examples = settings(max_examples=60, deadline=None)


def slow_compare(a: RoutingTrace, b: RoutingTrace) -> RoutingComparison:
    """The definition: expert sets, one position and one layer at a time."""
    counts = dict.fromkeys(RoutingComparison.__dataclass_fields__, 0)
    for position in range(max(a.start, b.start), min(a.stop, b.stop)):
        row_a, row_b = position - a.start, position - b.start
        if not (a.valid_T[row_a] and b.valid_T[row_b]):
            counts["skipped_tokens"] += 1
            continue
        token_differs = False
        for layer in range(a.layout.num_layers):
            shared = set(a.experts_TLK[row_a, layer].tolist()) & set(b.experts_TLK[row_b, layer].tolist())
            counts["routers"] += 1
            counts["experts"] += a.layout.top_k
            counts["shared_experts"] += len(shared)
            if len(shared) < a.layout.top_k:
                counts["differing_routers"] += 1
                token_differs = True
        counts["tokens"] += 1
        counts["differing_tokens"] += token_differs
    return RoutingComparison(**counts)


def trace_of(ids: list, valid: list[bool] | None = None) -> RoutingTrace:
    return RoutingTrace.build(
        np.array(ids), LAYOUT, range(len(ids) + 1), valid_T=None if valid is None else np.array(valid)
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[RoutingTrace, RoutingTrace]:
    """Two records of one sequence that agree in some routes and have another start and length."""
    a = draw(routing_traces(draw(layouts()), min_rows=1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = a.experts_TLK.astype(np.int64)
    redraw = (rng.random(ids.shape[:2]) < draw(st.sampled_from([0.0, 0.3, 1.0]))) | ~a.valid_T[:, None]
    ids[redraw] = random_ids(rng, len(a), a.layout)[redraw]
    ids = rng.permuted(ids, axis=-1)
    assert a.tokens is not None
    b = RoutingTrace.build(ids, a.layout, a.tokens, valid_T=rng.random(len(a)) < 0.8, start=a.start)
    first = draw(st.integers(a.start, a.stop - 1))
    return a, b.slice(first, draw(st.integers(first + 1, a.stop)))


@given(pairs())
@examples
def test_comparison_equals_its_definition_over_sets(pair: tuple[RoutingTrace, RoutingTrace]) -> None:
    a, b = pair
    assert compare(a, b) == slow_compare(a, b)
    assert compare(b, a) == compare(a, b)


def test_comparison_has_known_values() -> None:
    a = trace_of([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    b = trace_of([[[0, 1], [2, 3]], [[1, 0], [2, 4]], [[5, 6], [4, 7]], [[0, 7], [3, 2]]])
    both = compare(a, b)
    assert both == RoutingComparison(
        tokens=4, routers=8, experts=16, shared_experts=10, differing_routers=4, differing_tokens=3
    )
    assert (both.overlap, both.router_mismatch, both.token_mismatch) == (10 / 16, 0.5, 0.75)


def test_the_order_of_experts_in_a_route_is_ignored() -> None:
    a, b = trace_of([[[0, 1], [7, 2]]]), trace_of([[[1, 0], [2, 7]]])
    assert a != b
    assert (compare(a, b).overlap, compare(a, b).token_mismatch) == (1.0, 0.0)


def test_a_trace_overlaps_fully_with_itself() -> None:
    trace = make_trace(range(9), MoeLayout((0, 1), 512, 4))
    same = compare(trace, trace)
    assert (same.tokens, same.overlap, same.router_mismatch, same.token_mismatch) == (8, 1.0, 0.0, 0.0)


def test_rows_that_one_side_lacks_are_skipped_and_counted() -> None:
    ids = [[[0, 1], [2, 3]]] * 4
    other = compare(trace_of(ids, [True, True, False, False]), trace_of(ids, [True, False, True, False]))
    assert (other.tokens, other.skipped_tokens, other.overlap) == (1, 3, 1.0)


def test_where_nothing_was_compared_nothing_is_claimed() -> None:
    ids = [[[0, 1], [2, 3]]]
    nothing = compare(trace_of(ids, [False]), trace_of(ids))
    assert nothing == RoutingComparison(skipped_tokens=1)
    assert all(math.isnan(value) for value in (nothing.overlap, nothing.router_mismatch, nothing.token_mismatch))


@given(pairs(), pairs())
@examples
def test_adding_comparisons_pools_their_counts(
    one: tuple[RoutingTrace, RoutingTrace], two: tuple[RoutingTrace, RoutingTrace]
) -> None:
    pooled, first, second = compare(*one) + compare(*two), slow_compare(*one), slow_compare(*two)
    for name in RoutingComparison.__dataclass_fields__:
        assert getattr(pooled, name) == getattr(first, name) + getattr(second, name)
    assert RoutingComparison() + compare(*one) == compare(*one)


def test_pooling_weighs_by_tokens_not_by_sequences() -> None:
    one = RoutingComparison(tokens=1, routers=1, experts=2, shared_experts=0, differing_routers=1, differing_tokens=1)
    three = RoutingComparison(tokens=3, routers=3, experts=6, shared_experts=6)
    assert ((one + three).overlap, (one + three).token_mismatch) == (0.75, 0.25)


@pytest.mark.parametrize("layout", [MoeLayout((3, 5), 8, 2), MoeLayout((3, 4), 9, 2)])
def test_traces_of_other_models_are_not_compared(layout: MoeLayout) -> None:
    with refused(LayoutMismatchError, "the other trace", expected=layout):
        compare(make_trace(range(4), LAYOUT), make_trace(range(4), layout))


def test_traces_of_other_tokens_are_not_compared() -> None:
    a, b = make_trace([1, 2, 3, 4], LAYOUT), make_trace([1, 2, 9, 4], LAYOUT)
    with refused(TokenMismatchError, "first difference at position 2", expected="token 9", got="token 3"):
        compare(a, b)
    for x, y in ((a, b), (b, a)):
        with refused(TokenMismatchError, "other tokens"):
            compare(replace(x, tokens=None), y)
        with refused(TokenMismatchError, "other tokens"):
            compare(x, replace(y, tokens=None))
    assert compare(replace(a, tokens=None), a).overlap == 1.0
    assert compare(a, replace(a, tokens=None)).overlap == 1.0


def test_traces_without_a_common_position_are_not_compared() -> None:
    trace = make_trace(range(9), LAYOUT)
    with refused(InvalidTraceError, "no position in common", got="[0, 3) and [3, 8)"):
        compare(trace.slice(0, 3), trace.slice(3, 8))


@given(layouts(), st.integers(0, 8), st.integers(0, 2**32 - 1))
@examples
def test_shared_experts_equals_set_intersection(layout: MoeLayout, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (random_ids(rng, rows, layout).astype(layout.dtype) for _ in range(2))
    expected = [
        [len(set(x) & set(y)) for x, y in zip(row_a, row_b, strict=True)]
        for row_a, row_b in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert shared_experts(a, b).tolist() == expected


# --- probabilities ---

log_probabilities = st.floats(-30, 0, allow_subnormal=False)


@given(st.lists(st.tuples(log_probabilities, log_probabilities), min_size=1, max_size=20))
@examples
def test_kl_k3_equals_its_formula(logprobs: list[tuple[float, float]]) -> None:
    rollout, trainer = zip(*logprobs, strict=True)
    terms = [math.exp(q - p) - 1.0 - (q - p) for p, q in logprobs]
    assert kl_k3(np.array(rollout), np.array(trainer)) == pytest.approx(
        math.fsum(terms) / len(terms), rel=1e-9, abs=1e-12
    )


def test_kl_k3_has_known_values() -> None:
    half, quarter = np.log([0.5]), np.log([0.25])
    assert kl_k3(half, quarter) == pytest.approx(0.5 - 1 + math.log(2))  # r = p_trainer / p_rollout = 1/2
    assert kl_k3(quarter, half) == pytest.approx(2 - 1 - math.log(2))
    assert kl_k3(np.log([[0.5, 0.5]]), np.log([[0.5, 0.25]])) == pytest.approx((math.log(2) - 0.5) / 2)


@given(st.lists(st.tuples(log_probabilities, st.floats(-1e-3, 1e-3)), min_size=1, max_size=20))
@examples
def test_kl_k3_is_never_negative_and_zero_for_equal_passes(logprobs: list[tuple[float, float]]) -> None:
    rollout = np.array([p for p, _ in logprobs])
    assert kl_k3(rollout, rollout) == 0.0
    assert kl_k3(rollout, rollout + np.array([step for _, step in logprobs])) >= 0.0


def test_kl_k3_does_not_lose_small_differences_to_cancellation() -> None:
    rollout = np.full(4, -1.0, np.float64)
    assert kl_k3(rollout, rollout + 1e-6) == pytest.approx(0.5e-12, rel=1e-3)


@given(
    st.lists(st.tuples(log_probabilities, log_probabilities), min_size=1, max_size=20), st.sampled_from([1.5, 2.0, 10])
)
@examples
def test_extreme_token_ratio_equals_its_formula(logprobs: list[tuple[float, float]], tau: float) -> None:
    distances = [abs(p - q) for p, q in logprobs]
    rollout, trainer = (np.array(side) for side in zip(*logprobs, strict=True))
    expected = sum(distance > math.log(tau) for distance in distances) / len(distances)
    assert extreme_token_ratio(rollout, trainer, tau) == pytest.approx(expected)
    assert extreme_token_ratio(trainer, rollout, tau) == pytest.approx(expected)


def test_extreme_token_ratio_counts_both_directions_at_tau_2() -> None:
    rollout, trainer = np.log([0.5, 0.5, 0.1, 0.5]), np.log([0.5, 0.2, 0.3, 0.3])
    assert extreme_token_ratio(rollout, trainer) == 0.5
    assert extreme_token_ratio(rollout, trainer, tau=1.5) == 0.75


@pytest.mark.parametrize("tau", [1.0, 0.5, -2.0, float("nan")])
def test_a_tau_that_is_no_factor_is_refused(tau: float) -> None:
    with refused(InvalidTraceError, "tau", expected="tau > 1", got=tau):
        extreme_token_ratio(np.zeros(1), np.zeros(1), tau)


@pytest.mark.parametrize(("rollout", "trainer"), [((3,), (4,)), ((2, 3), (3, 2)), ((0,), (0,)), ((3, 1), (3,))])
def test_log_probabilities_of_other_tokens_are_refused(rollout: tuple[int, ...], trainer: tuple[int, ...]) -> None:
    for measure in (kl_k3, extreme_token_ratio):
        with refused(InvalidTraceError, "of the same tokens", expected=f"shape {rollout}", got=trainer):
            measure(np.zeros(rollout), np.zeros(trainer))
