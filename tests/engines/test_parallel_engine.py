"""The embedded engine under transformers' tensor- and expert-parallel plans: two ranks, gloo, CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dye import Dye
from ranks import run_two_ranks

WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize("plan", ["tp", "ep"])
def test_rank_0_records_the_logical_ids_of_every_row(plan: str, tmp_path: Path) -> None:
    dye = Dye()
    dye.config.num_key_value_heads = 2
    dye.model().save_pretrained(tmp_path / "dye")
    run_two_ranks(WORKER, tmp_path / "dye", plan, tmp_path / "out.json")
    seen = json.loads((tmp_path / "out.json").read_text())
    assert [result["reason"] for result in seen["results"]] == ["length"] * 14 + ["abort"]
    for result in seen["results"]:
        assert result["valid"]
        np.testing.assert_array_equal(result["experts"], dye.routes(result["tokens"][:-1]))
    assert len(seen["refused"]) == 3
    assert all("parallel" in refusal for refusal in seen["refused"])
    mine, others = (json.loads((tmp_path / f"out.{rank}.samples").read_text()) for rank in range(2))
    assert mine == others, "the ranks went on with different tokens"
    assert sum(map(len, mine)) > 120
