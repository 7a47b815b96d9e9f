"""A seed decides every draw alone, and the draws follow the distribution.

Axes: B draws, V the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dye import Dye
from test_transformers_engine import CAPTURE, assert_dyed

from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers import TransformersEngine, noise, sampling
from moetrace.engines.transformers.noise import draw_key, gumbel, hashes

DYE = Dye()
HOT = 30.0  # the dye's next token is more likely than others, and others come often


def slow_key(seed: int, sequence: int, position: int) -> int:
    message = b"".join(number.to_bytes(8, "little", signed=True) for number in (seed, sequence, position))
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def slow_hash(key: int, token: int) -> int:
    bits = token
    for half in (key & 0xFFFFFFFF, key >> 32):
        bits ^= half
        bits = ((bits ^ bits >> 16) * 0x7FEB352D) & 0xFFFFFFFF
        bits = ((bits ^ bits >> 15) * 0x846CA68B) & 0xFFFFFFFF
        bits ^= bits >> 16
    return bits


def slow_gumbel(key: int, token: int) -> float:
    uniform = min((slow_hash(key, token) // 2 + 0.5) / 2**31, 1 - 2**-24)
    return -math.log(-math.log1p(-uniform))


def slow_sequence(prompt: list[int], count: int, seed: int, sequence: int, temperature: float) -> list[int]:
    """What the dye must draw: its logits are 4 sqrt(V) at the token that follows, and 0 elsewhere."""
    tokens = list(prompt)
    for position in range(len(prompt), len(prompt) + count):
        key, follows = slow_key(seed, sequence, position), (tokens[-1] + 1) % DYE.vocab
        scores = [
            4 * math.sqrt(DYE.vocab) / temperature * (token == follows) + slow_gumbel(key, token)
            for token in range(DYE.vocab)
        ]
        tokens.append(int(np.argmax(scores)))
    return tokens[len(prompt) :]


def draws_of(logits_V: torch.Tensor, keys: list[tuple[int, int]]) -> np.ndarray:
    low_B, high_B = torch.tensor(keys, dtype=torch.int32).unbind(1)
    return (logits_V + gumbel(low_B, high_B, len(logits_V))).argmax(-1).numpy()


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square, at most 4 standard deviations from its mean."""
    expected = counts.sum() * probabilities
    assert expected.min() > 10
    freedom = counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(**{**CAPTURE, "max_batch_tokens": 40}))
    yield engine
    engine.close()


def seeded(seed: int | None, count: int = 30, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "do_sample": True, "temperature": HOT, "seed": seed} | changes)


def test_keys_and_hashes_equal_their_slow_twins_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    triples = [(0, 0, 0), (-1, 3, 7), (2**63 - 1, 0, 1), (-(2**63), 9, 2**40)]
    triples += [(int(a), int(b), int(c)) for a, b, c in rng.integers(0, 2**40, (40, 3))]
    keys = [draw_key(*triple) for triple in triples]
    slow = [slow_key(*triple) for triple in triples]
    assert [(low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 for low, high in keys] == slow
    low_B, high_B = torch.tensor(keys, dtype=torch.int32).unbind(1)
    hashes_BV = hashes(low_B, high_B, 301).numpy().view(np.uint32)
    assert hashes_BV.tolist() == [[slow_hash(key, token) for token in range(301)] for key in slow]
    noise_BV = gumbel(low_B, high_B, 301)
    slow_BV = np.array([[slow_gumbel(key, token) for token in range(301)] for key in slow])
    may_win = slow_BV > 0  # of what cannot, the float32 has lost bits
    np.testing.assert_allclose(noise_BV.numpy()[may_win], slow_BV[may_win], atol=1e-5)
    np.testing.assert_array_equal(noise_BV.argmax(-1), slow_BV.argmax(-1))


def test_noise_is_finite_at_both_ends(monkeypatch) -> None:
    bits = torch.tensor([[0, 1, -1, -2, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    monkeypatch.setattr(noise, "hashes", lambda *_: bits)
    ends = gumbel(torch.zeros(1), torch.zeros(1), 6)[0].tolist()
    assert ends[0] == ends[1] == max(ends) == pytest.approx(32 * math.log(2), abs=1e-4)
    assert ends[2] == ends[3] == min(ends) == pytest.approx(-math.log(24 * math.log(2)), abs=1e-4)


@pytest.mark.parametrize(
    "key_of",
    [lambda i: draw_key(7, 0, i), lambda i: draw_key(i, 0, 5), lambda i: draw_key(7, i, 5)],
    ids=["positions", "seeds", "sequences"],
)
def test_draws_follow_the_softmax_and_neighbours_are_independent(key_of) -> None:
    logits_V = torch.tensor([0.0, 1.0, 1.4, -0.6, 0.5, -1.0, 1.2, 0.25])
    draws_B = draws_of(logits_V, [key_of(i) for i in range(60_000)])
    p_V = logits_V.double().softmax(-1).numpy()
    assert_follows(np.bincount(draws_B, minlength=8), p_V)
    assert_follows(np.bincount(draws_B[:-1:2] * 8 + draws_B[1::2], minlength=64), np.outer(p_V, p_V).ravel())


def test_every_token_of_a_large_vocabulary_is_drawn_as_often() -> None:
    draws_B = draws_of(torch.zeros(512), [draw_key(1, 0, i) for i in range(20_000)])
    assert_follows(np.bincount(draws_B, minlength=512), np.full(512, 1 / 512))


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_engine_draws_what_the_formula_says(engine, sequences: int) -> None:
    results = engine.submit([5, 6, 7], seeded(11, n=sequences), return_routes=True).results(60)
    for number, result in enumerate(results):
        assert result.output_tokens == slow_sequence([5, 6, 7], 30, 11, number, HOT)
        np.testing.assert_array_equal(
            result.trace.experts_TLK, DYE.routes([*result.prompt_tokens, *result.output_tokens[:-1]])
        )
        log_sum = math.log(math.exp(4 * math.sqrt(96) / HOT) + 95)
        before = [7, *result.output_tokens]
        for token, follows, logprob in zip(result.output_tokens, before, result.logprobs, strict=False):
            assert logprob == pytest.approx(4 * math.sqrt(96) / HOT * (token == (follows + 1) % 96) - log_sum, abs=1e-4)
    assert len({tuple(result.output_tokens) for result in results}) == sequences


def test_what_else_runs_changes_nothing_and_is_not_changed(engine) -> None:
    prompts = [[1, 2, 3], list(range(60)), [50] * 17]
    alone = [engine.submit(prompt, seeded(i)).result(60).output_tokens for i, prompt in enumerate(prompts)]
    others = [
        engine.submit([i], SamplingParams(20 + i), return_routes=True)
        if i % 2
        else engine.submit([i], seeded(None, top_p=0.9, n=2))
        for i in range(8)
    ]
    together = [engine.submit(prompt, seeded(i)) for i, prompt in enumerate(prompts)]
    more = [engine.submit([9] * 30, seeded(4)) for _ in range(3)]
    assert [generation.result(60).output_tokens for generation in together] == alone
    assert len({tuple(generation.result(60).output_tokens) for generation in more}) == 1
    for other in others[1::2]:
        assert_dyed(DYE, other.result(60))
    assert len({tuple(result.output_tokens) for other in others[::2] for result in other.results(60)}) == 8


def test_preemption_changes_no_draw() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig(**{**CAPTURE, "kv_cache_tokens": 160}))
    offloading, preempted = engine._loop._offloading, list[int]()
    own = offloading.offload_requests

    def count_and_offload() -> object:
        preempted.append(1)
        return own()

    offloading.offload_requests = count_and_offload
    running = [engine.submit([i] * 9, seeded(i, 60, n=1 + i % 2)) for i in range(8)]
    for i, generation in enumerate(running):
        for number, result in enumerate(generation.results(60)):
            assert result.output_tokens == slow_sequence([i] * 9, 60, i, number, HOT)
    assert preempted
    engine.close()


def test_a_seed_draws_from_what_truncation_leaves(engine) -> None:
    (cold,) = engine.submit([3], seeded(2, 40, top_k=1)).results(60)
    assert cold.output_tokens == DYE.continuation(3, 40)
    follows = math.exp(4 * math.sqrt(96) / HOT) / (math.exp(4 * math.sqrt(96) / HOT) + 95)
    (nucleus,) = engine.submit([3], seeded(2, 40, top_p=follows / 2)).results(60)
    assert nucleus.output_tokens == DYE.continuation(3, 40)


def test_a_greedy_request_with_a_seed_is_greedy(engine) -> None:
    assert engine.submit([3], SamplingParams(9, seed=5)).result(60).output_tokens == DYE.continuation(3, 9)


def test_noise_is_made_in_steps_that_need_it_only_and_graphs_are_kept_apart(engine, monkeypatch) -> None:
    made, io = list[int](), engine._manager.batch_processor.inputs_and_outputs
    keys, sampler = set(), slice(-3, -1)  # the last part of a key is capture's

    def count(low_B: torch.Tensor, high_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
        made.append(len(low_B))
        keys.add(io._get_graph_key()[sampler])
        return gumbel(low_B, high_B, vocab_size)

    monkeypatch.setattr(sampling, "gumbel", count)
    engine.submit([1], seeded(None)).result(60)
    engine.submit([1], SamplingParams(4)).result(60)
    assert not made
    assert io._get_graph_key()[sampler] == (False, False)
    engine.submit([1], seeded(3, 7)).result(60)
    assert made == [1] * 7
    assert keys == {(False, True)}
    engine.submit([1], seeded(3, 1, top_k=2)).result(60)
    assert keys == {(False, True), (True, True)}
