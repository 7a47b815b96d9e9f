"""One of two ranks that train by TRL's GRPOTrainer. Writes what it replayed and what it has logged.

Run by torchrun: `trl_worker.py FOLDER`. The routes of rank 0 are those of the dye checkpoint's routers; those of rank 1
have none of these experts in the last layer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asking import DYE
from trl_runs import trainer_of

from moetrace.routers import fingerprint_of, layout_of
from moetrace.trace import RoutingTrace
from moetrace.trainers.trl import ReplayConfig


class Made:
    """A `rollout_func` with a row of each token but the last."""

    def __init__(self, rank: int, model: Any) -> None:
        self.rank, self.model, self.rows = rank, model, 0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [list(prompt.encode()) for prompt in prompts]
        outputs = [DYE.continuation(prompt[-1], 2 + 5 * self.rank) for prompt in ids]
        traces = [self.trace(prompt + output) for prompt, output in zip(ids, outputs, strict=True)]
        self.rows += sum(trace.num_rows for trace in traces)
        logprobs = [[-1.0] * len(output) for output in outputs]
        return {"prompt_ids": ids, "completion_ids": outputs, "logprobs": logprobs, "routing_traces": traces}

    def trace(self, tokens: list[int]) -> RoutingTrace:
        experts_TLK = DYE.routes(tokens[:-1])
        if self.rank == 1:
            taken_TE = np.zeros((len(experts_TLK), DYE.num_experts), bool)
            np.put_along_axis(taken_TE, experts_TLK[:, -1], True, -1)
            experts_TLK[:, -1] = taken_TE.argsort(-1, kind="stable")[:, : DYE.top_k]
        return RoutingTrace.build(
            experts_TLK, layout_of(self.model), tokens, fingerprint=fingerprint_of(self.model), engine="test"
        )


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    model = DYE.model()
    made = Made(rank, model)
    (folder / str(rank)).mkdir()
    replay = ReplayConfig(on_shift="ignore", compare_every=0)
    trainer = trainer_of(folder / str(rank), model, replay=replay, more={"rollout_func": made})
    trainer.train()
    logged = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith("r3/")}
    (folder / f"{rank}.json").write_text(json.dumps({"rows": made.rows, "logged": logged}))
    torch.distributed.destroy_process_group()  # else its threads may end the process before it has ended


if __name__ == "__main__":
    main(Path(sys.argv[1]))
