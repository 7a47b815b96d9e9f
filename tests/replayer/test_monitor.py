"""The statistics of a replay equal a slow count in Python sets, and the shift alarm knows a shift from noise."""

from __future__ import annotations

import logging
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    NAMES,
    ONE_OF_EACH,
    build,
    random_routes,
    random_tokens,
    router_spy,
    routers_of,
    trace_of,
    traces_of,
)

from moetrace import record, replay
from moetrace.errors import ReplayError, ShiftedRoutesError
from moetrace.layout import MoeLayout
from moetrace.replayer import ReplayStats, align
from moetrace.replayer import monitor as monitor_module
from moetrace.replayer.monitor import OverlapMonitor
from moetrace.trace import RoutingTrace


def recorded(model: Any, tokens: torch.Tensor, **where: Any) -> list[RoutingTrace]:
    with torch.no_grad(), record(model) as recording:
        model(tokens, **where)
    return recording.traces(tokens, **where)


def with_ids(trace: RoutingTrace, ids_TLK: np.ndarray, valid_T: np.ndarray | None = None) -> RoutingTrace:
    assert trace.tokens is not None
    return RoutingTrace.build(ids_TLK, trace.layout, trace.tokens, valid_T=valid_T, fingerprint=trace.fingerprint)


def shifted(trace: RoutingTrace, by: int) -> RoutingTrace:
    """Row t holds what row t - by should: +1 is late by one, -1 is early by one. No shape check can see it."""
    return with_ids(trace, np.roll(trace.experts_TLK, by, axis=0))


def with_noise(trace: RoutingTrace, share: float, seed: int = 0) -> RoutingTrace:
    """A share of the ids replaced by experts their route did not have."""
    generator = np.random.default_rng(seed)
    ids_TLK = trace.experts_TLK.astype(np.int64)
    for index in np.argwhere(generator.random(ids_TLK.shape) < share):
        row, layer, k = index
        others = [expert for expert in range(trace.layout.num_experts) if expert not in ids_TLK[row, layer]]
        ids_TLK[row, layer, k] = generator.choice(others)
    return with_ids(trace, ids_TLK)


def slow_counts(live_TLK: list[Any], given_TLK: list[Any], rows: list[int]) -> dict[str, Any]:
    """Overlap and mismatch of `rows`, by plain Python sets."""
    layers, top_k = len(given_TLK[0]), len(given_TLK[0][0])
    shared = [[len(set(live_TLK[n][layer]) & set(given_TLK[n][layer])) for layer in range(layers)] for n in rows]
    same = [[set(live_TLK[n][layer]) == set(given_TLK[n][layer]) for layer in range(layers)] for n in rows]
    return {
        "overlap": sum(map(sum, shared)) / (len(rows) * layers * top_k),
        "router_mismatch": sum(not equal for row in same for equal in row) / (len(rows) * layers),
        "token_mismatch": sum(not all(row) for row in same) / len(rows),
        "overlap_per_layer": tuple(sum(row[layer] for row in shared) / (len(rows) * top_k) for layer in range(layers)),
    }


def live_choices(model: Any, name: str, hidden: list[torch.Tensor]) -> list[Any]:
    """`[N][L][K]` what the routers choose for the given inputs, outside of any replay."""
    with torch.no_grad():
        ids = [router(x)[2] for router, x in zip(routers_of(model, name), hidden, strict=True)]
    return torch.stack(ids, dim=1).tolist()


def replayed_with_inputs(
    model: Any, name: str, traces: list[RoutingTrace], tokens: torch.Tensor, forwards: int = 1, **where: Any
) -> tuple[ReplayStats, list[Any]]:
    """Statistics of a replay, and the live choices for the very router inputs of its last forward."""
    hidden: list[torch.Tensor] = []
    handles = [
        router.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for router in routers_of(model, name)
    ]
    masks = {key: value for key, value in where.items() if key == "attention_mask"}
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore", **where) as session:
        for _ in range(forwards):
            model(tokens, **masks)
    for handle in handles:
        handle.remove()
    return session.stats(), live_choices(model, name, hidden[-len(routers_of(model, name)) :])


@pytest.mark.parametrize("forwards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_a_slow_count_in_sets(name: str, forwards: int) -> None:
    model, tokens = build(name), random_tokens(2, 12)
    noisy = [with_noise(trace, 0.3) for trace in recorded(model, tokens)]
    stats, live = replayed_with_inputs(model, name, noisy, tokens, forwards)
    given = np.concatenate([trace.experts_TLK for trace in noisy]).tolist()
    expected = slow_counts(live, given, list(range(24)))
    assert 0.3 < expected["overlap"] < 1
    for measure, value in expected.items():
        assert getattr(stats, measure) == pytest.approx(value, abs=1e-6), measure
    assert stats.forwards == forwards
    assert (stats.replayed_tokens, stats.live_tokens, stats.padding_tokens) == (24, 0, 0)
    assert stats.neighbour_rows == 22


def slow_gains(live: list[Any], given: list[Any], pairs: list[int]) -> dict[str, float]:
    """Gain in overlap from replaying row n - 1 ("earlier") or n + 1 ("later") at n; pair n is rows n - 1 and n."""
    layers, top_k = range(len(given[0])), len(given[0][0])

    def overlap(at: list[int], row_of: int) -> float:
        hits = [len(set(live[n][layer]) & set(given[n + row_of][layer])) for n in at for layer in layers]
        return sum(hits) / (len(hits) * top_k)

    firsts = [n - 1 for n in pairs]
    return {
        "earlier": overlap(pairs, -1) - overlap(pairs, 0),
        "later": overlap(firsts, 1) - overlap(firsts, 0),
    }


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_padding_and_rows_that_are_missing_count_nowhere(name: str) -> None:
    model, tokens = build(name), random_tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4] = mask[2, 9:] = 0
    valid = [np.ones(8, bool), np.ones(12, bool), np.ones(9, bool)]
    valid[1][[3, 4, 8]] = False
    traces = recorded(model, tokens, attention_mask=mask)
    noisy = [
        with_ids(trace, with_noise(trace, 0.3, seed).experts_TLK, rows)
        for seed, (trace, rows) in enumerate(zip(traces, valid, strict=True))
    ]
    stats, live = replayed_with_inputs(model, name, noisy, tokens, attention_mask=mask, missing="live")
    family = FAMILIES[name]
    given = np.zeros((36, len(family.layers), family.top_k), np.int64)
    replayed = np.zeros(36, bool)
    for start, trace in zip((4, 12, 24), noisy, strict=True):
        given[start : start + len(trace)] = trace.experts_TLK
        replayed[start : start + len(trace)] = trace.valid_T
    rows = [int(row) for row in np.flatnonzero(replayed)]
    for measure, value in slow_counts(live, given.tolist(), rows).items():
        assert getattr(stats, measure) == pytest.approx(value, abs=1e-6), measure
    assert (stats.replayed_tokens, stats.live_tokens, stats.padding_tokens) == (26, 3, 7)
    sequence = [0] * 12 + [1] * 12 + [2] * 12
    pairs = [n for n in rows if n - 1 in rows and sequence[n] == sequence[n - 1]]
    gains = slow_gains(live, given.tolist(), pairs)
    assert stats.neighbour_rows == len(pairs)
    assert stats.best_shift == max(gains, key=lambda shift: gains[shift])
    assert stats.shift_gain == pytest.approx(max(gains.values()), abs=1e-6)


def test_sequences_in_a_packed_batch_are_no_neighbours() -> None:
    model, lengths = build("mixtral"), (7, 1, 12)
    tokens = random_tokens(1, 20)
    boundaries = np.cumsum((0, *lengths))
    traces = [
        trace_of(model, random_routes(length, "mixtral", seed=length), tokens[0, start : start + length])
        for start, length in zip(boundaries, lengths, strict=False)
    ]
    stats, live = replayed_with_inputs(model, "mixtral", traces, tokens, cu_seqlens=boundaries)
    given = np.concatenate([trace.experts_TLK for trace in traces]).tolist()
    gains = slow_gains(live, given, [*range(1, 7), *range(9, 20)])
    assert stats.neighbour_rows == 6 + 0 + 11
    assert stats.shift_gain == pytest.approx(max(gains.values()), abs=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_statistics_compare_with_the_live_choice_not_with_what_was_used(name: str) -> None:
    model, tokens = build(name), random_tokens(1, 16)
    routes = random_routes(16, name)
    with torch.no_grad(), router_spy(model, name) as out:
        model(tokens)
    first_live = out.calls[0][-1][2].tolist()
    with (
        torch.no_grad(),
        replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore") as session,
    ):
        model(tokens)
    shared = sum(len(set(a) & set(b)) for a, b in zip(first_live, routes[:, 0].tolist(), strict=True))
    assert session.stats().overlap_per_layer[0] == pytest.approx(shared / routes[:, 0].size, abs=1e-6)
    assert session.stats().overlap < 0.6


def judged(
    model: Any, traces: list[RoutingTrace], tokens: torch.Tensor, on_shift: Any = "error", **where: Any
) -> ReplayStats:
    masks = {key: value for key, value in where.items() if key == "attention_mask"}
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift=on_shift, **where) as session:
        model(tokens, **masks)
    return session.stats()


SHIFTS = pytest.mark.parametrize(("by", "direction"), [(1, "later"), (-1, "earlier")])


@SHIFTS
@pytest.mark.parametrize("name", NAMES)
def test_routes_shifted_by_one_raise_the_alarm(name: str, by: int, direction: str) -> None:
    model, tokens = build(name), random_tokens(1, 64)
    traces = [shifted(trace, by) for trace in recorded(model, tokens)]
    with pytest.raises(ShiftedRoutesError, match=f"the row {direction} than each token's own fits better"):
        judged(model, traces, tokens)


@SHIFTS
def test_routes_shifted_by_one_raise_the_alarm_in_padded_batches_and_under_noise(by: int, direction: str) -> None:
    model, tokens = build("qwen3_moe"), random_tokens(4, 20)
    mask = torch.ones(4, 20, dtype=torch.int64)
    mask[1, 15:] = mask[2, :7] = 0
    traces = [with_noise(shifted(trace, by), 0.1) for trace in recorded(model, tokens, attention_mask=mask)]
    with pytest.raises(ShiftedRoutesError, match=direction):
        judged(model, traces, tokens, attention_mask=mask)


@SHIFTS
def test_an_alarm_can_be_a_warning_or_ignored(caplog: pytest.LogCaptureFixture, by: int, direction: str) -> None:
    model, tokens = build("mixtral"), random_tokens(1, 64)
    traces = [shifted(trace, by) for trace in recorded(model, tokens)]
    with caplog.at_level(logging.WARNING, logger="moetrace"):
        stats = judged(model, traces, tokens, on_shift="ignore")
        assert caplog.records == []
        judged(model, traces, tokens, on_shift="warn")
    assert stats.shifted
    assert stats.best_shift == direction
    (record_logged,) = caplog.records
    assert record_logged.levelno == logging.WARNING
    assert f"the row {direction} than each token's own fits better" in record_logged.getMessage()


def test_an_unknown_reaction_is_refused_before_the_model_is_touched() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 4)
    with pytest.raises(ReplayError, match="on_shift"):
        judged(model, recorded(model, tokens), tokens, on_shift="raise")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_right_routes_never_raise_the_alarm(name: str, seed: int) -> None:
    model, tokens = build(name, seed=seed), random_tokens(2, 48, seed=seed)
    traces = recorded(model, tokens)
    for given in (traces, [with_noise(trace, 0.1, seed) for trace in traces]):
        stats = judged(model, given, tokens)
        assert not stats.shifted
        assert stats.shift_gain < 0
        assert stats.neighbour_rows == 94


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_rollout_in_other_precision_never_raises_the_alarm(name: str) -> None:
    tokens = random_tokens(2, 48)
    traces = recorded(build(name, dtype=torch.bfloat16), tokens)
    stats = judged(build(name), traces, tokens)
    assert 0.8 < stats.overlap <= 1
    assert not stats.shifted


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_sequence_of_one_token_repeated_never_raises_the_alarm(name: str, noise: float) -> None:
    model, tokens = build(name), torch.full((1, 64), 7)
    judged(model, [with_noise(trace, noise) for trace in recorded(model, tokens)], tokens)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_routes_that_fit_nowhere_are_low_overlap_not_a_shift(name: str) -> None:
    model, tokens = build(name), random_tokens(1, 128)
    stats = judged(model, traces_of(model, random_routes(128, name), tokens), tokens)
    assert stats.overlap < 0.5
    assert not stats.shifted


@SHIFTS
def test_sequences_too_short_to_judge_never_raise_the_alarm(by: int, direction: str) -> None:
    model = build("mixtral")
    for length, is_judged in ((1, False), (2, False), (32, False), (33, True)):
        tokens = random_tokens(1, length)
        traces = [shifted(trace, by) for trace in recorded(model, tokens)]
        assert judged(model, traces, tokens, on_shift="ignore").shifted is is_judged
        if not is_judged:
            judged(model, traces, tokens)


def test_many_short_sequences_are_judged_together() -> None:
    model, tokens = build("mixtral"), random_tokens(16, 6)
    traces = [shifted(trace, 1) for trace in recorded(model, tokens)]
    with pytest.raises(ShiftedRoutesError):
        judged(model, traces, tokens)


@SHIFTS
@pytest.mark.parametrize("packed", [False, True])
def test_one_shifted_sequence_among_many_sound_ones_raises_the_alarm_and_is_named(
    by: int, direction: str, packed: bool
) -> None:
    model, tokens = build("mixtral"), random_tokens(8, 33)
    traces = recorded(model, tokens)
    traces[5] = shifted(traces[5], by)
    where: dict[str, Any] = {}
    if packed:
        tokens, where = tokens.reshape(1, -1), {"position_ids": torch.arange(33).repeat(8)[None]}
        traces = recorded(model, tokens, **where)
        traces[5] = shifted(traces[5], by)
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore", **where) as session:
        for _ in range(2):
            model(tokens, **where)
    stats = session.stats()
    assert stats.shift_gain < 0
    assert (stats.shifted, stats.shifted_sequences) == (True, 1)
    counts = session.counts()
    assert (counts + counts).stats().shifted_sequences == 2
    named = f"of sequence 5 look shifted .* the row {direction} .* on 32 rows; so look sequences \\[5\\]"
    with (
        pytest.raises(ShiftedRoutesError, match=named),
        torch.no_grad(),
        replay(model, traces, input_ids=tokens, **where),
    ):
        model(tokens, **where)


def test_what_a_failed_forward_left_does_not_make_the_next_one_whole() -> None:
    layout, tokens = MoeLayout((0, 1, 2), 8, 2), np.arange(4)
    given_TLK = np.tile(np.array([0, 1]), (4, 3, 1))
    monitor = OverlapMonitor(align([RoutingTrace.build(given_TLK, layout, tokens)], tokens[None]))
    for layer in (0, 1, 0, 2):  # the first forward fails behind layer 1, the second one passes it by
        monitor.observe(layer, torch.from_numpy(given_TLK[:, layer]), torch.ones(4, dtype=torch.bool))
    assert monitor.lacking == [1]
    assert monitor.forwards == 0


def test_gains_of_a_sequence_are_those_of_it_alone() -> None:
    model, tokens = build("qwen3_moe"), random_tokens(3, 40)
    traces = [shifted(trace, by) for trace, by in zip(recorded(model, tokens), (1, 0, -1), strict=True)]
    routes = align(traces, tokens)
    monitor = OverlapMonitor(routes)
    live_TLK = np.concatenate([trace.experts_TLK for trace in recorded(model, tokens)]).astype(np.int64)
    for layer in (1, 0):
        monitor.observe(layer, torch.from_numpy(live_TLK[:, layer]), torch.ones(120, dtype=torch.bool))
    given_TLK = np.concatenate([trace.experts_TLK for trace in traces]).tolist()
    gains = [slow_gains(live_TLK.tolist(), given_TLK, list(range(40 * n + 1, 40 * n + 40))) for n in range(3)]
    first, last = monitor.send()().shifted
    assert (first.sequence, first.best_shift, first.neighbour_rows) == (0, "later", 39)
    assert (last.sequence, last.best_shift, last.neighbour_rows) == (2, "earlier", 39)
    assert first.gain == pytest.approx(gains[0]["later"], abs=1e-9)
    assert last.gain == pytest.approx(gains[2]["earlier"], abs=1e-9)


@SHIFTS
def test_an_exception_in_the_body_is_not_hidden_by_the_alarm(by: int, direction: str) -> None:
    model, tokens = build("mixtral"), random_tokens(1, 64)
    traces = [shifted(trace, by) for trace in recorded(model, tokens)]
    sessions = []

    def fail() -> None:
        with replay(model, traces, input_ids=tokens) as session:
            sessions.append(session)
            model(tokens)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert sessions[0].stats().shifted


@pytest.mark.parametrize("name", NAMES)
def test_a_swapped_pair_of_layers_shows_as_low_overlap_there(name: str) -> None:
    model, tokens = build(name, num_hidden_layers=5), random_tokens(2, 40)
    traces = recorded(model, tokens)
    right = judged(model, traces, tokens)
    assert right.overlap_per_layer == (1.0,) * traces[0].layout.num_layers
    swapped = []
    for trace in traces:
        ids_TLK = trace.experts_TLK.copy()
        ids_TLK[:, [1, 2]] = ids_TLK[:, [2, 1]]
        swapped.append(with_ids(trace, ids_TLK))
    stats = judged(model, swapped, tokens)
    assert stats.overlap_per_layer[0] == 1.0
    assert max(stats.overlap_per_layer[1:3]) < 0.6
    assert stats.overlap < 0.9
    assert stats.token_mismatch > 0.9


def test_nothing_compared_is_not_a_perfect_mismatch() -> None:
    """As in `RoutingComparison`: a share of nothing is not a number."""
    model, tokens = build("mixtral"), random_tokens(1, 8)
    trace = trace_of(model, random_routes(8, "mixtral"), tokens[0], valid_T=np.zeros(8, bool))
    stats = judged(model, [trace], tokens, missing="live")
    assert (stats.replayed_tokens, stats.live_tokens) == (0, 8)
    assert np.isnan([stats.overlap, stats.router_mismatch, stats.token_mismatch]).all()
    assert not stats.shifted


def test_statistics_are_those_of_the_moment_they_were_asked() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 8)
    traces = recorded(model, tokens)
    with torch.no_grad(), replay(model, traces, input_ids=tokens) as session:
        model(tokens)
        once = session.stats()
        kept = astuple(once)
        model(tokens)
        twice = session.stats()
    assert astuple(once) == kept
    assert (once.forwards, twice.forwards) == (1, 2)
    assert astuple(once)[1:] == astuple(twice)[1:]


def monitored(order: list[int], forwards: int = 1) -> ReplayStats:
    """A monitor that saw random live choices, the layers of each forward in some order."""
    rng = np.random.default_rng(0)
    layout = MoeLayout((0, 1, 2), 8, 2)
    live_TLK = rng.random((40, 3, 8)).argsort(-1)[..., :2]
    given_TLK = live_TLK.copy()
    for layer in range(3):  # each in another token
        given_TLK[36 + layer, layer] = (live_TLK[36 + layer, layer] + 1) % 8
    tokens = np.arange(40)
    monitor = OverlapMonitor(align([RoutingTrace.build(given_TLK, layout, tokens)], tokens[None]))
    for _ in range(forwards):
        for layer in order:
            monitor.observe(layer, torch.from_numpy(live_TLK[:, layer]), torch.ones(40, dtype=torch.bool))
    return monitor.send()().counts.stats()


@pytest.mark.parametrize("forwards", [1, 3])
def test_the_order_in_which_a_models_routers_run_does_not_matter(forwards: int) -> None:
    """JetMoE's attention router comes after the MLP's among its modules and runs before it."""
    expected = monitored([0, 1, 2], forwards)
    assert expected.forwards == forwards
    assert expected.token_mismatch == 3 / 40
    assert monitored([1, 2], forwards).forwards == 0  # a part of a model is no forward
    assert astuple(monitored([1, 0, 2], forwards)) == astuple(expected)
    assert astuple(monitored([2, 1, 0], forwards)) == astuple(expected)


def test_counting_a_few_layers_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = monitored([0, 1, 2])
    for pairs in (1, 2 * 40 * 2 * 2):
        monkeypatch.setattr(monitor_module, "_MAX_PAIRS", pairs)
        assert astuple(monitored([0, 1, 2])) == astuple(expected)


@pytest.mark.parametrize("failed", [[0], [0, 1], [2, 1]])
def test_a_forward_that_fails_half_way_and_is_tried_again_is_counted_once(failed: list[int]) -> None:
    expected = monitored([0, 1, 2])
    assert astuple(monitored([*failed, 0, 1, 2] if failed[0] == 0 else [*failed, 2, 1, 0])) == astuple(expected)
    assert astuple(monitored([0, 1, 2, *failed])) == astuple(expected)


def test_statistics_of_a_replay_do_not_know_of_forwards_that_failed() -> None:
    model, tokens = build("mixtral"), random_tokens(1, 40)
    traces = [shifted(trace, 1) for trace in recorded(model, tokens)]
    expected, failures = judged(model, traces, tokens, on_shift="ignore"), [MemoryError, MemoryError]

    def fail(*_: Any) -> None:
        if failures:
            raise failures.pop()

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore") as session:
        for _ in range(2):
            with pytest.raises(MemoryError):
                model(tokens)
        model(tokens)
    handle.remove()
    assert astuple(session.stats()) == astuple(expected)
