"""Counts of a replay add up: over microbatches and ranks they are those of one batch that holds everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.errors import LayoutMismatchError
from moetrace.layout import MoeLayout
from moetrace.replayer import ReplayCounts, align
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((1, 2, 5), 6, 2)


def counts_of(lengths: list[int], seed: int, forwards: int) -> tuple[list[RoutingTrace], np.ndarray, ReplayCounts]:
    """Sequences with random rows, some of them missing; random live choices; and what the monitor counts of them."""
    rng = np.random.default_rng(seed)

    def routes(rows: int) -> np.ndarray:
        return rng.random((rows, LAYOUT.num_layers, LAYOUT.num_experts)).argsort(-1)[..., : LAYOUT.top_k]

    traces = [
        RoutingTrace.build(routes(n), LAYOUT, rng.integers(0, 99, n), valid_T=rng.random(n) < 0.8) for n in lengths
    ]
    live_NLK = routes(sum(lengths))
    return traces, live_NLK, monitored(traces, live_NLK, forwards)


def monitored(traces: list[RoutingTrace], live_NLK: np.ndarray, forwards: int) -> ReplayCounts:
    tokens_N = np.concatenate([trace.tokens for trace in traces if trace.tokens is not None])
    bounds = np.cumsum([0, *(trace.num_tokens for trace in traces)])
    routes = align(traces, tokens_N[None], cu_seqlens=bounds, missing="live")
    monitor, used_N = OverlapMonitor(routes), torch.from_numpy(routes.mode_N == 2)
    for _ in range(forwards):
        for layer in range(LAYOUT.num_layers):
            monitor.observe(layer, torch.from_numpy(live_NLK[:, layer]), used_N)
    return monitor.send()().counts


BATCHES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=2, max_size=3)


@settings(max_examples=30, deadline=None)
@given(batches=BATCHES, seed=st.integers(0, 999), forwards=st.integers(1, 2))
def test_counts_of_parts_are_those_of_the_whole(batches: list[list[int]], seed: int, forwards: int) -> None:
    parts = [counts_of(lengths, seed + number, forwards) for number, lengths in enumerate(batches)]
    whole = monitored([t for traces, _, _ in parts for t in traces], np.concatenate([p[1] for p in parts]), forwards)
    pooled = parts[0][2]
    for _, _, counts in parts[1:]:
        pooled += counts
    assert pooled == replace(whole, forwards=forwards * len(parts))
    assert repr(pooled.stats()) == repr(replace(whole.stats(), forwards=forwards * len(parts)))  # NaN is NaN


def test_a_mean_of_means_would_be_another() -> None:
    (_, _, short), (_, _, long) = counts_of([3], 1, 1), counts_of([40], 2, 1)
    pooled = (short + long).stats().overlap
    assert pooled != pytest.approx((short.stats().overlap + long.stats().overlap) / 2, abs=1e-3)


@pytest.mark.parametrize("other", [{"top_k": 3}, {"hits_L": (1, 2)}])
def test_counts_of_other_models_do_not_add_up(other: dict) -> None:
    _, _, counts = counts_of([4], 0, 1)
    with pytest.raises(LayoutMismatchError, match="do not add up"):
        counts + replace(counts, **other)
