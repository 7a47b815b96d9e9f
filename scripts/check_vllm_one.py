"""One trial of `check_vllm.py` in a process of its own: start vLLM, run the suite, write what it came to.

python scripts/check_vllm_one.py TRIAL --checkpoints DIR --out DIR --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
from check_vllm_trials import TRIALS, Trial

from moetrace.conformance.suite.adapters.opening import open_subject
from moetrace.conformance.suite.asking import Subject
from moetrace.conformance.suite.cases import CASES, Case
from moetrace.conformance.suite.report import Report
from moetrace.conformance.suite.run import load_forms, run_suite
from moetrace.errors import CheckError, LackingError

_COUNTER = re.compile(r"^vllm:(num_preemptions|prefix_cache_hits|prefix_cache_queries)_total\S* (\S+)$", re.MULTILINE)
_ERROR = re.compile(r"^.*\w(?:Error|Exception)(?:: .*)?$", re.MULTILINE)
_EXAMPLES = 5
"""Findings of one check and one bug that are kept; the rest are counted."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=[trial.slug for trial in TRIALS])
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, and of the result")
    parser.add_argument("--seconds", type=float, required=True, help="until then it is over")
    args = parser.parse_args()
    [trial] = [trial for trial in TRIALS if trial.slug == args.trial]
    result = asyncio.run(Run(trial, args.checkpoints, args.out, time.monotonic() + args.seconds).result())
    (args.out / f"{trial.slug}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


class Run:
    """One trial.

    Args:
        trial: which.
        checkpoints: folder of the checkpoints, by their slugs.
        logs: folder for logs and for the report as text.
        until: when it must be over, by the monotonic clock; checks that find no time are skipped.
    """

    def __init__(self, trial: Trial, checkpoints: Path, logs: Path, until: float) -> None:
        self.trial, self.logs, self.until = trial, logs, until
        self.folder = checkpoints / slug(trial.checkpoint)
        newer = checkpoints / slug(trial.newer) if trial.newer else None
        self.form, self.newer = load_forms(self.folder, newer)
        self.counters: dict[str, float] = {}

    async def result(self) -> dict[str, Any]:
        """What it came to, as JSON has it."""
        began = time.monotonic()
        facts: dict[str, Any] = {
            "trial": self.trial.name,
            "checkpoint": self.form.words,
            "form": self.trial.form,
            "endpoint": self.trial.endpoint or None,
            "arguments": self.trial.arguments,
        }
        try:
            async with contextlib.AsyncExitStack() as stack:
                subject = await (self._served(stack) if self.trial.form == "HTTP" else self._started(stack))
                facts["start_seconds"] = round(time.monotonic() - began, 1)
                report = await self._suite(subject)
        except CheckError as error:
            return facts | {"verdict": "not tested", "error": str(error)}
        (self.logs / f"{self.trial.slug}.txt").write_text(report.text() + "\n")
        facts |= {"seconds": round(time.monotonic() - began, 1), "counters": self.counters}
        return facts | told(report)

    async def _suite(self, subject: Subject) -> Report:
        def progress(check: str) -> None:
            print(f"{self.until - time.monotonic():6.1f} s left: {check}", flush=True)

        cases = [Case(case.name, self._in_time(case.run)) for case in CASES]
        return await run_suite(subject, self.form, self.trial.plan, newer=self.newer, cases=cases, progress=progress)

    def _in_time(self, run: Any) -> Any:
        """A check that is skipped, or cut, when the time is up."""

        @functools.wraps(run)
        async def guarded(session: Any) -> None:
            try:
                async with asyncio.timeout(self.until - time.monotonic()):
                    await run(session)
            except TimeoutError as error:
                raise LackingError(f"no time was left, after {session.tally.sequences} answers") from error

        return guarded

    async def _served(self, stack: contextlib.AsyncExitStack) -> Subject:
        """`vllm serve`, and a subject that asks it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.logs / f"{self.trial.slug}.server.log"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
        command += flags(self.trial.arguments)
        with log.open("w") as file:
            print(*command, file=file, flush=True)
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        stack.callback(end, server)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}"))
        while not await answers(client):
            if server.poll() is not None:
                raise CheckError(f"vllm serve ended with {server.returncode}", got=last_error(log))
            if time.monotonic() > self.until:
                raise CheckError("vllm serve was not ready in time", got=last_error(log))
            await asyncio.sleep(0.5)
        watch = asyncio.ensure_future(self._watch(client))
        stack.callback(watch.cancel)
        subject = await open_subject(str(client.base_url), self.form, "vllm")
        stack.push_async_callback(subject.close)
        if self.trial.endpoint:
            subject.endpoint = self.trial.endpoint  # type: ignore[attr-defined]
        return subject

    async def _started(self, stack: contextlib.AsyncExitStack) -> Subject:
        """vLLM in this process."""
        try:
            from check_vllm_engine import VLLMEngine

            subject = VLLMEngine(str(self.folder), self.form, self.trial.arguments)
        except Exception as error:
            raise CheckError("vLLM did not start", got=repr(error)) from error
        stack.push_async_callback(subject.close)
        watch = asyncio.ensure_future(self._watch(None))
        stack.callback(watch.cancel)
        return subject

    async def _watch(self, client: httpx.AsyncClient | None) -> None:
        """Keep the engine's last counters: an engine that ended has none."""
        while True:
            try:
                text = (await client.get("/metrics")).text if client else _own_metrics()
            except httpx.HTTPError:
                text = ""
            self.counters |= {name: float(value) for name, value in _COUNTER.findall(text)}
            await asyncio.sleep(1)


def _own_metrics() -> str:
    from prometheus_client import generate_latest

    return generate_latest().decode()


def slug(checkpoint: str) -> str:
    """Name of its folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in checkpoint)


def flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as `vllm serve` takes them."""
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


async def answers(client: httpx.AsyncClient) -> bool:
    """Whether the server is ready."""
    try:
        return (await client.get("/health")).is_success
    except httpx.HTTPError:
        return False


def end(server: subprocess.Popen[Any]) -> None:
    """End the server. What it leaves behind is in our process group, which `check_vllm.py` ends."""
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def last_error(log: Path) -> str:
    """What a log says of the failure: its first error, which is the cause, and the last."""
    lines = [line.strip()[-400:] for line in _ERROR.findall(log.read_text(errors="replace"))]
    return " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or "no error in its log"


def told(report: Report) -> dict[str, Any]:
    """A report as JSON, with some findings of each kind and the number of all."""
    facts = json.loads(report.json())
    for check in facts["checks"]:
        check.pop("why")
        kept, counts = [], defaultdict[str, int](int)
        for finding in check["findings"]:
            counts[finding["bug"]] += 1
            if counts[finding["bug"]] <= _EXAMPLES:
                kept.append(finding)
        check |= {"findings": kept, "bugs": counts, "seconds": round(check["seconds"], 2)}
    return facts | {"words": report.verdict}


if __name__ == "__main__":
    sys.exit(main())
