"""Replay under data, tensor and expert parallelism: two ranks train as one process does on the same routes.

One start of two ranks does everything (`training_worker.py`); where there are two GPUs, once more with NCCL.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from ranks import run_two_ranks
from training_worker import CASES, NAME, Case, load, load_lora, microbatches, train

WORKER = Path(__file__).with_name("training_worker.py")
CPU = torch.device("cpu")
GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
EACH = pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name, case in CASES.items() for how in case.checkpoints]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(NAME).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["", pytest.param("0,1", marks=GPUS)], ids=["gloo", "nccl"])
def folder(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saw, a file for each case and rank."""
    out = tmp_path_factory.mktemp("seen")
    run_two_ranks(WORKER, checkpoint, out, devices=request.param)
    return out


@cache
def alone(checkpoint: Path, lora: bool, rank: int) -> dict[str, Any]:
    """One process with a rank's microbatches, without checkpointing."""
    return train((load_lora if lora else load)(checkpoint, "none", CPU), microbatches(rank), CPU, in_turn=False)


def ranks_of(case: Case) -> list[int]:
    """The batches, by the ranks that have them."""
    return [0] if case.shared else [0, 1]


def seen_by(folder: Path, name: str, how: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{how}-{rank}.pt", weights_only=False) for rank in range(2)]


@EACH
def test_the_given_routes_are_used_on_every_rank(folder: Path, name: str, how: str) -> None:
    for rank, seen in enumerate(seen_by(folder, name, how)):
        for ids_LNK, batch in zip(seen["ids"], microbatches(0 if CASES[name].shared else rank), strict=True):
            assert ids_LNK.permute(1, 0, 2).tolist() == batch.routes.tolist()
        assert not seen["left"], "the taps left something behind"
        passes = 1 if how == "none" else 2
        assert seen["calls"] == len(seen["ids"]) * 3 * passes, "layers were not recomputed as they should"


@EACH
def test_logits_and_gradients_are_those_of_one_process(checkpoint: Path, folder: Path, name: str, how: str) -> None:
    """Ranks with batches of their own average their gradients."""
    case = CASES[name]
    singles = [alone(checkpoint, case.lora, rank) for rank in ranks_of(case)]
    for rank, seen in enumerate(seen_by(folder, name, how)):
        for got, expected in zip(seen["logits"], singles[rank % len(singles)]["logits"], strict=True):
            assert (got - expected).abs().max() <= case.tolerance * expected.abs().max()
        assert seen["gradients"].keys() == singles[0]["gradients"].keys()
        for parameter, got in seen["gradients"].items():
            parts = [single["gradients"][parameter] for single in singles]
            if parts[0] is None:
                assert got is None
                continue
            expected = torch.stack(parts).mean(0)
            assert (got - expected).abs().max() <= case.tolerance * expected.abs().max(), parameter


@EACH
def test_statistics_of_ranks_are_pooled_exactly(checkpoint: Path, folder: Path, name: str, how: str) -> None:
    """Equal to those of one process with the batches of both; ranks have different numbers of tokens."""
    ranks = seen_by(folder, name, how)
    for number in range(2):
        counts = [seen["counts"][number] for seen in ranks]
        pooled = [seen["pooled"][number] for seen in ranks]
        assert pooled[0] == pooled[1] == (counts[0] + counts[1]).stats()
        if CASES[name].tolerance < 1e-3:  # live choices in bfloat16 are others
            parts = [alone(checkpoint, CASES[name].lora, 0 if CASES[name].shared else rank) for rank in range(2)]
            assert counts == [part["counts"][number] for part in parts]


def test_what_cannot_be_replayed_is_refused_by_name(folder: Path) -> None:
    for rank in range(2):
        said = torch.load(folder / f"refusals-{rank}.pt", weights_only=False)
        for attempt in ("fsdp1, record", "fsdp1, replay", "fsdp1 inside, record"):
            assert "UnsupportedRouterError: a model under FSDP1" in said[attempt]
            assert "fully_shard" in said[attempt]
        assert "saw another batch than the one that was aligned" in said["token shard"]


def test_other_routes_give_other_gradients(checkpoint: Path) -> None:
    """The tolerances above can tell."""
    model, (batch, _) = load(checkpoint, "none", CPU), microbatches(0)
    expected = train(model, [batch], CPU, in_turn=False)["gradients"]
    model.zero_grad()
    other = train(model, [replace(batch, seed=batch.seed + 100)], CPU, in_turn=False)["gradients"]
    for parameter, gradient in expected.items():
        assert (other[parameter] - gradient).abs().max() > 0.2 * gradient.abs().max(), parameter
