"""Runs as processes of their own on one device: one that fails or hangs does not take the others along."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from settings import VARIANTS, Settings

_GRACE_S = 40.0
"""How long after its time a run may take to finish its step."""
_WARM_SHARE = 0.3
"""Of the whole time, at most, for the warm starts."""


def experiment(
    settings: Settings,
    seeds: Sequence[int],
    variants: Sequence[str],
    began: float,
    minutes: float,
    at_once: int,
    out: Path,
) -> dict[str, Any]:
    """Warm starts, then every seed under every variant; `out` is written again every few seconds."""
    stop = began + 60 * minutes
    folder = Path(tempfile.mkdtemp(prefix="moetrace-evidence-"))
    record = facts() | {"settings": asdict(settings), "seeds": list(seeds), "variants": list(variants)}
    try:
        warm = {seed: folder / f"warm-{seed}" for seed in seeds}
        until = time.time() + _WARM_SHARE * (stop - time.time())
        in_turn([(_warm, (settings, seed, until, path)) for seed, path in warm.items()], at_once, until, lambda: None)
        record["warm_starts"] = {seed: _read(path.with_suffix(".json")) for seed, path in warm.items()}
        ready = [seed for seed in seeds if warm[seed].with_suffix(".pt").exists()]
        places = {(seed, variant): folder / f"{variant}-{seed}.json" for seed in ready for variant in variants}
        waves = -(-len(places) // at_once)

        def merge() -> None:
            runs = [_read(path) or {"seed": s, "variant": v, "error": "no result"} for (s, v), path in places.items()]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record | {"runs": runs}) + "\n")

        pending = list(places.items())
        for wave in range(waves):
            some, pending = pending[:at_once], pending[at_once:]
            until = time.time() + (stop - time.time()) / (waves - wave)
            tasks = [(_run, (settings, v, s, until, warm[s], path)) for (s, v), path in some]
            in_turn(tasks, at_once, until, merge)
        merge()
        return json.loads(out.read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_turn(tasks: list[tuple[Callable, tuple]], at_once: int, until: float, meanwhile: Callable[[], None]) -> None:
    """Each task in a process, `at_once` of them together; those that outlast `until` by far are ended."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(tasks), []
    while waiting or running:
        while waiting and len(running) < at_once:
            function, arguments = waiting.pop(0)
            running.append(context.Process(target=function, args=arguments, daemon=True))
            running[-1].start()
        if time.time() > until + _GRACE_S:
            for process in running:
                process.kill()
        for process in running:
            process.join(timeout=5.0 / len(running))
        running = [process for process in running if process.is_alive()]
        meanwhile()


def _prepare(device: str) -> None:
    import logging

    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.init()


def _warm(settings: Settings, seed: int, until: float, path: Path) -> None:
    from warm_start import warm_start

    _prepare(settings.device)
    facts = warm_start(settings, seed, until, path.with_suffix(".pt"))
    path.with_suffix(".json").write_text(json.dumps(facts))


def _run(settings: Settings, variant: str, seed: int, until: float, warm: Path, out: Path) -> None:
    from grpo import run

    _prepare(settings.device)
    run(settings, variant, seed, until, warm.with_suffix(".pt"), out)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def facts() -> dict[str, Any]:
    """Command, machine, versions and date, as every result has them."""
    return {
        "command": shlex.join(["python", "benchmarks/evidence", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def summary(record: dict[str, Any]) -> str:
    """A table for the terminal: each variant's means over its seeds, of the first and the last ten steps."""
    names = ("reward", "router_mismatch", "token_mismatch", "kl", "kl_R3", "extreme", "extreme_R3", "grad_norm_max")
    lines = [f"{'variant':8} {'runs':>4} {'steps':>5} {'when':5} " + " ".join(f"{name:>15}" for name in names)]
    for variant in VARIANTS:
        runs = [run["steps"] for run in record["runs"] if run["variant"] == variant and run.get("steps")]
        for when, part in (("first", slice(0, 10)), ("last", slice(-10, None))):
            if runs:
                means = [np.mean([np.mean(steps[name][part]) for steps in runs]) for name in names]
                fewest = min(len(steps["reward"]) for steps in runs)
                row = " ".join(f"{mean:15.6f}" for mean in means)
                lines.append(f"{variant:8} {len(runs):4} {fewest:5} {when:5} {row}")
    failed = [f"{run['variant']} seed {run['seed']}: {run['error']}" for run in record["runs"] if run.get("error")]
    return "\n".join(lines + failed)
