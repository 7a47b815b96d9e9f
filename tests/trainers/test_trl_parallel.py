"""What TRL's log says of replay is of all processes: two gloo ranks, of which one has other routes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asking import DYE
from ranks import run_two_ranks

WORKER = Path(__file__).with_name("trl_worker.py")


def test_each_rank_logs_the_shares_of_both(tmp_path: Path) -> None:
    run_two_ranks(WORKER, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    fitting, others = (rank["rows"] for rank in ranks)
    assert fitting != others  # a mean of the ranks' shares would be another number
    tokens = others / (fitting + others)
    routers = tokens / len(DYE.layers)
    right = {"r3/overlap": 1 - routers, "r3/router_mismatch": routers, "r3/token_mismatch": tokens}
    for rank in ranks:
        assert {name: rank["logged"][name] for name in right} == pytest.approx(right, rel=1e-6)
