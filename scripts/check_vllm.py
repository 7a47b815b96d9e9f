"""Judge the vLLM that is installed here with the conformance suite, on a GPU: the table of docs/conformance.md.

    python scripts/check_vllm.py --out benchmarks/results/vllm-conformance.json --logs vllm-logs

Writes dye checkpoints of several architectures and starts vLLM on each with CUDA graphs, prefix caching and chunked
prefill, with much cache and with so little that it must preempt; over HTTP (`vllm serve`), and in process. Several
engines share the one GPU at a time. An engine that does not start is reported with its error. check_vllm_trials.py
has the list. Exits 1 if an engine was convicted, 2 if nothing could be tested.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from check_vllm_one import last_error, slug
from check_vllm_trials import CHECKPOINTS, TRIALS, Trial

ROOT = Path(__file__).resolve().parent.parent
_LEAST_SECONDS = 60
"""With less left, no engine is started."""
_ALL = 3
"""More checks than that are counted, not named."""
_GRACE = 20
"""Seconds that a trial has to end its engine and to write its result."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, as JSON")
    parser.add_argument("--logs", type=Path, required=True, help="folder for logs and reports, a few files a trial")
    parser.add_argument("--checkpoints", type=Path, help="folder for dye checkpoints, 3 GB; default: in --logs")
    parser.add_argument("--deadline", type=float, default=1800, help="seconds until all is over (%(default)g)")
    parser.add_argument("--jobs", type=int, default=6, help="engines at a time (%(default)s)")
    parser.add_argument("--only", default="", help="trials whose name matches this regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the trials, and end")
    args = parser.parse_args()
    trials = [trial for trial in TRIALS if re.search(args.only, trial.name)]
    if args.list:
        print(*(trial.name for trial in trials), sep="\n")
        return 0
    until = time.monotonic() + args.deadline
    checkpoints = args.checkpoints or args.logs / "checkpoints"
    args.logs.mkdir(parents=True, exist_ok=True)
    writers = write_checkpoints(
        {name for trial in trials for name in (trial.checkpoint, trial.newer) if name}, checkpoints
    )
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(run, trial, writers, checkpoints, args.logs, until) for trial in trials]
        for future in running:
            results.append(future.result())
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record(results), indent=1) + "\n")  # as it grows: a kill leaves something
    print(table(results))
    verdicts = {result["verdict"] for result in results}
    return 1 if "convicted" in verdicts else 0 if "sound" in verdicts else 2


def write_checkpoints(names: Iterable[str], folder: Path) -> dict[str, Future[None]]:
    """Begin to write checkpoints, in processes of their own."""
    pool = ProcessPoolExecutor(4, mp_context=get_context("spawn"))
    writers = {name: pool.submit(write_checkpoint, name, folder / slug(name)) for name in CHECKPOINTS if name in names}
    pool.shutdown(wait=False)
    return writers


def write_checkpoint(name: str, folder: Path) -> None:
    """Write one, unless it is there."""
    from moetrace.conformance.dye.checkpoint import write_dye

    if not (folder / "dye.json").is_file():  # it is written last
        write_dye(folder, *CHECKPOINTS[name])


def run(trial: Trial, writers: dict[str, Future[None]], checkpoints: Path, logs: Path, until: float) -> dict[str, Any]:
    """Run one trial in a process of its own, and end that process and what it started."""
    failed = {"trial": trial.name, "form": trial.form, "arguments": trial.arguments, "verdict": "not tested"}
    try:
        for name in filter(None, (trial.checkpoint, trial.newer)):
            writers[name].result()
    except Exception as error:
        return failed | {"error": f"the checkpoint could not be written: {error}"}
    seconds = until - time.monotonic() - _GRACE
    if seconds < _LEAST_SECONDS:
        return failed | {"error": "no time was left"}
    log, result = logs / f"{trial.slug}.log", logs / f"{trial.slug}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts/check_vllm_one.py"), trial.slug]
    command += ["--checkpoints", str(checkpoints), "--out", str(logs), "--seconds", f"{seconds:.0f}"]
    own_caches = {"VLLM_CACHE_ROOT": str(logs / "caches" / trial.slug)}  # engines that start at once would share them
    print(f"{until - time.monotonic():5.0f} s left, starting: {trial.name}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | own_caches
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, until - time.monotonic() - 3))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not result.is_file():
        return failed | {"error": f"the trial ended with {process.returncode}: {last_error(log)}"}
    facts = json.loads(result.read_text())
    print(f"{until - time.monotonic():5.0f} s left, {facts['verdict']}: {trial.name}", flush=True)
    return facts


def record(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results, and where they come from."""
    return {
        "command": shlex.join(["python", "scripts/check_vllm.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers", "moetrace")},
        "trials": results,
    }


def hardware() -> str:
    """Names of the GPUs."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return ", ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")).strip(
            ", "
        )
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def version(package: str) -> str:
    """Its installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return __import__(package).__version__ if package == "moetrace" else "not installed"


def table(results: list[dict[str, Any]]) -> str:
    """The table of docs/conformance.md."""
    lines = ["| checkpoint, form, cache | rows | preemptions | verdict |", "|---|---|---|---|"]
    for result in results:
        bugs: dict[str, dict[str, int]] = {}
        for check in result.get("checks", []):
            for bug, count in check["bugs"].items():
                bugs.setdefault(bug, {})[check["name"]] = count
        told = [
            f"{sum(of.values())} {bug} ({', '.join(of) if len(of) <= _ALL else f'{len(of)} checks'})"
            for bug, of in bugs.items()
        ]
        words = result.get("error") or "; ".join(told)
        preempted = result.get("counters", {}).get("num_preemptions")
        counts = f"{result.get('rows', 0):,} | {'' if preempted is None else f'{preempted:,.0f}'}"
        lines.append(f"| {result['trial']} | {counts} | {result['verdict']}{': ' if words else ''}{words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
