"""What trainers' own code made of our payloads, and of an engine's rows: see `upstream.py`, and for the origins
`upstream.json`. Where a trainer is installed, its code runs again.

Axes: n tokens of a sequence, D decoder layers, K experts per token.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import upstream
from documented import DOCUMENTED, trace_of
from upstream import PROMPTS, SEQUENCES, TOKENS, TRACES, WIDTHS, engine_rows, padded

from moetrace.trainers import contracts

KEPT: dict[str, dict[str, Any]] = json.loads(upstream.PATH.read_text())
PACKAGES = {
    "verl": ["verl", "tensordict", "megatron.core"],
    "slime": ["slime", "megatron.core"],
    "miles": ["miles"],
    "nemo_rl": ["nemo_rl"],
    "automodel": ["nemo_automodel"],
    "skyrl": ["skyrl"],
    "prime_rl": ["prime_rl"],
    "maxtext": ["tunix"],
}
LAYOUT = SEQUENCES[0].layout
CAPTURED = [len(ids) - 1 for ids in TOKENS]


def ids(seen: Any, dtype: str) -> np.ndarray:
    return np.array(seen, dtype)


@pytest.mark.parametrize("name", upstream.SEEN)
def test_a_trainer_that_is_installed_does_what_was_kept(name: str) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    seen = json.loads(json.dumps(upstream.SEEN[name]()))
    assert {"origin": KEPT[name]["origin"]} | seen == KEPT[name]


def test_every_contract_was_seen_by_its_trainer() -> None:
    assert list(KEPT) == list(upstream.SEEN) == list(contracts.CONTRACTS)
    assert all(" 0." in entry["origin"] or ", commit " in entry["origin"] for entry in KEPT.values())


def test_verl_makes_of_an_engine_what_we_write_but_for_its_zeros_at_the_end() -> None:
    for seen, trace, tokens in zip(KEPT["verl"]["as_dict"], TRACES, TOKENS, strict=True):
        ours = contracts.to_verl(trace, tokens, 6)
        np.testing.assert_array_equal(ids(seen, "int16")[:-1], ours[:-1])
        assert not np.any(seen[-1])
        assert contracts.from_verl(ids(seen, "int16"), tokens, LAYOUT, 6, captured=len(tokens) - 1) == trace


def test_verl_takes_our_batch_apart_as_we_put_it_together() -> None:
    seen = KEPT["verl"]
    for case, jagged, aligned, replayed, first in zip(
        SEQUENCES, seen["jagged"], seen["aligned"], seen["replayed"], (1, sum(WIDTHS) + 2), strict=True
    ):
        np.testing.assert_array_equal(jagged, DOCUMENTED["verl"].rows(case, first_row=first))
        np.testing.assert_array_equal(aligned[:-1], engine_rows(case, "int16"))  # of rows without the last
        assert replayed == [True] * (case.num_tokens - 1) + [False]
    load = np.zeros((6, 12), int)
    for case, prompt in zip(SEQUENCES, PROMPTS, strict=True):
        for row in case.all_ids()[prompt:]:
            for layer, route in enumerate(row):
                for expert in route:
                    load[layer, expert] += 1
    assert seen["load"] == load.tolist()


def test_slime_makes_of_sglang_what_we_write_and_takes_it() -> None:
    for seen, trace, tokens in zip(KEPT["slime"]["produced"], TRACES, TOKENS, strict=True):
        np.testing.assert_array_equal(ids(seen, "int32"), contracts.to_slime(trace, tokens, 6), strict=True)
        assert contracts.from_slime(ids(seen, "int32"), tokens, LAYOUT, 6) == trace
    prepared, start = KEPT["slime"]["prepared"], 0
    for case in SEQUENCES:
        np.testing.assert_array_equal(prepared[start : start + case.num_tokens - 1], engine_rows(case, "int32"))
        assert all(len(set(route)) == 3 for route in prepared[start + case.num_tokens - 1])  # its own filler
        start += case.num_tokens
    assert start == len(prepared)


def test_miles_carries_what_we_write_and_sends_marked_tokens_to_the_first_experts() -> None:
    missing, seen = trace_of(SEQUENCES[0], (1,)), KEPT["miles"]
    ours = contracts.to_miles(missing, TOKENS[0], 6, missing="dummy")
    np.testing.assert_array_equal(ids(seen["decoded"], "int32"), ours, strict=True)
    assert contracts.from_miles(ids(seen["decoded"], "int32"), TOKENS[0], LAYOUT, 6) == missing
    routes = [SEQUENCES[0].route(position, 4) for position in range(5)]
    assert seen["used_in_layer_4"] == [routes[0], [0, 1, 2], *routes[2:]]


def test_nemo_rl_makes_of_vllm_exactly_what_we_write() -> None:
    seen = KEPT["nemo_rl"]
    input_ids, mask = padded(left=False)
    batch = contracts.to_nemo_rl_batch(TRACES, input_ids, 6, attention_mask=mask)
    aligned = ids(seen["aligned"], "int8")[:, : batch.shape[1]]
    np.testing.assert_array_equal(aligned, batch, strict=True)
    again = contracts.from_nemo_rl_batch(aligned, input_ids, LAYOUT, 6, attention_mask=mask, captured=CAPTURED)
    assert again == list(TRACES)
    np.testing.assert_array_equal(ids(seen["wire"], "int8"), batch[0], strict=True)
    assert seen["layers"] == {"2": 1, "3": 2, "5": 4}  # Megatron counts layers from 1


def test_nemo_rl_marks_rows_that_vllm_did_not_return_as_we_do() -> None:
    case = SEQUENCES[0]
    seen = ids(KEPT["nemo_rl"]["aligned_of_3_rows"], "int8")[: case.num_tokens]
    ours = contracts.to_nemo_rl(trace_of(case, (3, 4)), case.tokens, 6, missing="live")
    np.testing.assert_array_equal(seen, ours, strict=True)
    assert contracts.from_nemo_rl(seen, case.tokens, LAYOUT, 6, captured=5) == trace_of(case, (3, 4))


def test_nemo_rl_chooses_the_types_that_we_do() -> None:
    kept = {int(count): dtype for count, dtype in KEPT["nemo_rl"]["dtypes"].items()}
    assert kept == {count: f"torch.{DOCUMENTED['nemo_rl'].dtype(count)}" for count in kept}


def test_automodel_replays_what_we_write_and_records_what_we_read() -> None:
    input_ids, mask = padded(left=False)
    ours = contracts.to_automodel(TRACES, input_ids, attention_mask=mask)
    assert KEPT["automodel"]["used"] == [gate.tolist() for gate in ours]
    collected = [ids(gate, "int64") for gate in KEPT["automodel"]["collected"]]
    again = contracts.from_automodel(collected, input_ids, LAYOUT, captured=CAPTURED, attention_mask=mask)
    assert again == list(TRACES)


def test_skyrl_makes_of_our_sequences_exactly_our_batch_and_mask() -> None:
    seen = KEPT["skyrl"]
    input_ids, mask = padded(left=True)
    assert (seen["sequences"], seen["attention_mask"]) == (input_ids.tolist(), mask.tolist())
    batch, padding = contracts.to_skyrl_batch(TRACES, input_ids, 6, attention_mask=mask)
    assert seen["dtype"] == f"torch.{batch.dtype}"
    np.testing.assert_array_equal(seen["router_padding_mask"], padding)
    kept = ids(seen["rollout_expert_indices"], "uint8")
    np.testing.assert_array_equal(kept, batch, strict=True)
    again = contracts.from_skyrl_batch(kept, ids(padding, "bool"), input_ids, LAYOUT, 6, attention_mask=mask)
    assert again == list(TRACES)


def test_prime_rl_carries_packs_cuts_and_pads_what_we_write() -> None:
    seen = KEPT["prime_rl"]
    ours = {
        len(tokens): np.frombuffer(contracts.to_prime_rl(trace, tokens, 6)["data"], np.uint8).reshape(-1, 6, 3)
        for trace, tokens in zip(TRACES, TOKENS, strict=True)
    }
    assert seen["input_ids"] == TOKENS[0] + TOKENS[1] + [1] * (16 - len(TOKENS[0]) - len(TOKENS[1]))
    np.testing.assert_array_equal(seen["packed"][:12], np.concatenate([ours[len(tokens)] for tokens in TOKENS]))
    assert not np.any(seen["packed"][12:])  # its own padding: expert 0, K times
    np.testing.assert_array_equal(seen["cut_to_4"], ours[len(TOKENS[0])][:4])


def test_tunix_makes_of_our_sequences_exactly_our_batch() -> None:
    input_ids, mask = upstream.prompts_left_responses_right()
    batch = contracts.to_maxtext_batch(TRACES, input_ids, 6, attention_mask=mask)
    seen = KEPT["maxtext"]
    assert seen["dtype"] == str(batch.dtype)
    np.testing.assert_array_equal(ids(seen["aligned"], "int16"), batch, strict=True)
    again = contracts.from_maxtext_batch(ids(seen["aligned"], "int16"), input_ids, LAYOUT, 6, attention_mask=mask)
    assert again == list(TRACES)


def test_tunix_shifts_an_engines_rows_which_is_why_we_write_the_last_one() -> None:
    shifted = ids(KEPT["maxtext"]["aligned_without_last_rows"], "int16")
    for row, (case, prompt) in enumerate(zip(SEQUENCES, PROMPTS, strict=True)):
        first = WIDTHS[0] - prompt
        np.testing.assert_array_equal(shifted[row, first + 1 : first + case.num_tokens], engine_rows(case, "int16"))
