"""The embedded engine under transformers' tensor- and expert-parallel plans: two ranks, gloo, CPU; where there are two
GPUs, once more with NCCL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dye import Dye
from ranks import run_two_ranks

WORKER = Path(__file__).with_name("engine_worker.py")


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("plan", ["tp", "ep"])
@pytest.mark.parametrize("devices", ["", pytest.param("0,1", marks=needs_two_gpus)], ids=["gloo", "nccl"])
def test_rank_0_records_the_logical_ids_of_every_row(plan: str, devices: str, tmp_path: Path) -> None:
    dye = Dye()
    dye.config.num_key_value_heads = 2
    dye.model().save_pretrained(tmp_path / "dye")
    run_two_ranks(WORKER, tmp_path / "dye", plan, tmp_path / "out.json", devices=devices)
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
