"""Expert ids stay logical when transformers' parallel plans wrap or shard routers and experts: two ranks, gloo, CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_worker import load, observe
from ranks import run_two_ranks

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return observe(load("none"))


@pytest.mark.parametrize("plan", ["tp", "ep"])
def test_ids_are_logical_and_replay_reaches_all_shards(plan: str, alone: dict, tmp_path: Path) -> None:
    run_two_ranks(WORKER, plan, tmp_path)
    assert (alone["plain"] - alone["replayed"]).abs().max() > 1, "reversed routes must show"
    for rank in range(2):
        seen = torch.load(tmp_path / f"{plan}-{rank}.pt")
        assert torch.equal(seen["ids_LNK"], alone["ids_LNK"])
        torch.testing.assert_close(seen["plain"], alone["plain"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen["replayed"], alone["replayed"], rtol=1e-3, atol=1e-3)
