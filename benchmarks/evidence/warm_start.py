"""A short supervised start from random weights, so that there is something to reinforce. One for each seed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from model import build, expected_exact_match, forward, logprobs
from settings import Settings
from task import Batch, answer, make_prompts

_SUPERVISED, _HELD_OUT = 1, 2


def held_out(settings: Settings) -> Batch:
    """256 prompts with their right answers, the same for all seeds."""
    prompts = make_prompts(256, settings.shortest, settings.longest, _HELD_OUT)
    return Batch.of(prompts, [answer(prompt) for prompt in prompts])


def warm_start(settings: Settings, seed: int, until: float, path: Path) -> dict[str, Any]:
    """Train on right answers until samples are right often enough, or until the time; save the weights to `path`."""
    torch.manual_seed(seed)
    began = time.time()
    model, judged = build(settings.shape, settings.device, for_rollout=False), held_out(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_lr, betas=(0.9, 0.95), weight_decay=0.01)
    match, step = 0.0, 0
    while time.time() < until:
        prompts = make_prompts(settings.warm_batch, settings.shortest, settings.longest, _SUPERVISED, seed, step)
        batch = Batch.of(prompts, [answer(prompt) for prompt in prompts])
        answer_BS = batch.answer_BS.to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_lr * min(1.0, (step + 1) / 50)
        output = forward(model, batch, output_router_logits=True)
        loss = -(logprobs(output.logits, batch) * answer_BS).sum() / answer_BS.sum()
        (loss + settings.warm_balance * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            match = expected_exact_match(model, judged)
            if match >= settings.warm_target:
                break
    if not math.isfinite(match):
        raise RuntimeError(f"the warm start of seed {seed} diverged")
    torch.save(model.state_dict(), path)
    return {"steps": step, "expected_exact_match": round(match, 4), "seconds": round(time.time() - began, 1)}
