"""Expert ids stay logical when transformers' parallel plans wrap or shard routers and experts: two ranks, gloo, CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_worker import load, observe

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return observe(load("none"))


@pytest.mark.parametrize("plan", ["tp", "ep"])
def test_ids_are_logical_and_replay_reaches_all_shards(plan: str, alone: dict, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(WORKER), plan, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (alone["plain"] - alone["replayed"]).abs().max() > 1, "reversed routes must show"
    for rank in range(2):
        seen = torch.load(tmp_path / f"{plan}-{rank}.pt")
        assert torch.equal(seen["ids_LNK"], alone["ids_LNK"])
        torch.testing.assert_close(seen["plain"], alone["plain"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen["replayed"], alone["replayed"], rtol=1e-3, atol=1e-3)
