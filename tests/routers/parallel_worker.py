"""One rank of `test_parallel.py`: load the tiny model under a parallel plan, record, replay, save what was seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moetrace

TINY = "models/tiny-qwen3-moe"


def load(plan: str) -> Any:
    """The tiny model in float32: "none", under the tensor-parallel plan or under the expert-parallel plan."""
    extra: dict[str, Any] = {}
    if plan == "tp":
        extra["distributed_config"] = DistributedConfig(tp_size=2, tp_plan="auto")
    elif plan == "ep":
        by_size = "ep_size" in DistributedConfig.__dataclass_fields__
        sizes: dict[str, Any] = {"ep_size": 2} if by_size else {"enable_expert_parallel": True}
        extra["distributed_config"] = DistributedConfig(tp_size=2, tp_plan="auto", **sizes)
    return AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", experts_implementation="grouped_mm", **extra
    ).eval()


def observe(model: Any) -> dict[str, torch.Tensor]:
    """Recorded ids, plain logits, and logits under routes that were reversed in expert numbers."""
    ids_BS = torch.tensor([list(b"And God said, Let there be light"), list(b"In the beginning was the Word, a")])
    with torch.no_grad():
        with moetrace.record(model) as recording:
            plain = model(input_ids=ids_BS, use_cache=False).logits
        altered = [
            moetrace.RoutingTrace.build(31 - trace.experts_TLK.astype(int), trace.layout, ids.numpy())
            for trace, ids in zip(recording.traces(ids_BS), ids_BS, strict=True)
        ]
        with moetrace.replay(model, altered, input_ids=ids_BS, on_shift="ignore"):
            replayed = model(input_ids=ids_BS, use_cache=False).logits
    return {"ids_LNK": recording.experts_LNK, "plain": plain, "replayed": replayed}


if __name__ == "__main__":
    plan, out = sys.argv[1], Path(sys.argv[2])
    seen = observe(load(plan))
    torch.save(seen, out / f"{plan}-{dist.get_rank()}.pt")
    dist.destroy_process_group()
