"""A server under everything at once for as long as you like: no row wrong, no answer lost, no 5xx, nothing leaks.

    python scripts/soak.py --minutes 30 --out benchmarks/results/soak.json

Starts `moetrace serve` on a dye checkpoint (tests/dye.py: every token and every row is known in closed form) with
little room, and lets clients mix plain, streamed, forked, batched, stopped and scoring requests with disconnects,
half-sent and malformed requests, while others abort one or all, pause and resume, replace the weights by a second
version and back, and send more at once than is taken. Every answer is checked; so is the server's own count of them,
its memory and its file descriptors over time, and that SIGTERM loses nobody. Ctrl-C ends it early, with its result.
Exits 1 on any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from dye import Dye  # noqa: E402
from soak_requests import MAX_BODY_BYTES, WINDOW, Client, Closed, Ledger, SoakError  # noqa: E402
from soak_traffic import KINDS, Traffic, fill_tokenizer  # noqa: E402

import moetrace  # noqa: E402

MAX_REQUESTS = 64
SAMPLE_SECONDS = 2.0
WARM_UP = 0.2
"""Part of the run that is not looked at for leaks: caches fill, allocators settle."""
MAY_GROW = 1.03
"""Memory is flat if the median of the last third is at most this times that of the first, after the warm-up."""
MAY_OPEN = 5
"""So are file descriptors, if it is at most so many more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", choices=sorted(KINDS), default=[], help="kinds of requests to omit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = asyncio.run(soak(args, Path(folder)))
    print(json.dumps({key: value for key, value in record.items() if key != "series"}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["clean"] else 1


def write_versions(folder: Path) -> dict[str, Dye]:
    """Two checkpoints, `a` and `b`, that say the same tokens by other experts."""
    versions = {letter: Dye(vocab=260, window=WINDOW) for letter in "ab"}
    route = versions["a"].route
    versions["b"].route = lambda token, layer: route((token + 31) % 260, layer)  # type: ignore[method-assign]
    for letter, dye in versions.items():
        dye.model().save_pretrained(folder / letter)
        AutoTokenizer.from_pretrained(ROOT / "models/tiny-qwen3-moe").save_pretrained(folder / letter)
    return versions


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`moetrace serve` on version `a`, with so little room that requests wait, are preempted and refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    knobs = {
        "port": port,
        "weight-version": "a0",
        "served-model-name": "dye",
        "max-requests": MAX_REQUESTS,
        "max-body-bytes": MAX_BODY_BYTES,
        "kv-cache-tokens": 8 * WINDOW,
        "max-running-requests": 32,
        "archive-bytes": 2 << 20,
        "shutdown-seconds": 2,
    }
    flags = [text for name, value in knobs.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "moetrace", "serve", str(folder / "a"), "--enable-return-routed-experts", *flags]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit((folder / "server.log").read_text()[-3000:]) from None
                    time.sleep(0.1)
            yield url, server
        finally:
            server.kill()
            server.wait()


async def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole run; returns what to write down."""
    versions, ledger, stop = write_versions(folder), Ledger(), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    with serving(folder) as (url, server):
        client = Client(url, Closed(versions), ledger, args.seed)
        watched = Watched(server, url, ledger)
        await watched.sample()
        await fill_tokenizer(client)
        traffic = Traffic(client, folder, stop, [kind for kind in KINDS if kind not in args.without])
        began = time.monotonic()
        working = [asyncio.create_task(work) for work in traffic.tasks(args.clients)]
        watching = asyncio.create_task(watched.go_on(stop))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), args.minutes * 60)
        interrupted = stop.is_set()
        stop.set()
        for problem in await asyncio.gather(*working, watching, return_exceptions=True):
            if problem is not None:
                ledger.fault(f"the soak itself failed: {problem!r}")
        minutes = (time.monotonic() - began) / 60
        await client.http.aclose()
        await asyncio.sleep(2)
        await watched.sample()
        client.open()
        await at_rest(client)
        await ending(client, server)
        await client.http.aclose()
        log = (folder / "server.log").read_text(errors="replace")
    tracebacks = log.count("Traceback (most recent call last)")
    for text in log.split("Traceback (most recent call last)")[1:4]:
        ledger.fault(f"the log has a traceback: {text[:1500]}")
    leaks = watched.leaks()
    clean = (
        not ledger.num_faults and not ledger.lost and not tracebacks and all(leak["flat"] for leak in leaks.values())
    )
    return {
        "command": shlex.join(["python", "scripts/soak.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} shared CPUs of {cpu_name()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "moetrace": moetrace.__version__,
        },
        "clean": clean,
        "minutes": round(minutes, 2),
        "interrupted": interrupted,
        "requests": ledger.begun.total(),
        "lost_answers": ledger.lost,
        "faults": ledger.num_faults,
        "first_faults": ledger.faults,
        "tracebacks_in_the_log": tracebacks,
        "rows_checked": ledger.rows,
        "rows_missing_of_aborted_prompts": ledger.missing,
        "tokens_checked": ledger.tokens,
        "traces_checked": ledger.traces,
        "traces_of_two_weight_versions_or_more": ledger.changed,
        "outcomes": nested(ledger.ended),
        "answers": nested(ledger.answered),
        "leaks": leaks,
        "series": watched.thinned(120),
    }


class Watched:
    """Memory, file descriptors and threads of the server over time."""

    def __init__(self, server: subprocess.Popen[bytes], url: str, ledger: Ledger) -> None:
        self._process, self._server, self._url, self._ledger = psutil.Process(server.pid), server, url, ledger
        self._began = time.monotonic()
        self.samples: list[dict[str, float]] = []

    async def sample(self) -> None:
        """Look once."""
        with self._process.oneshot():
            sample = {
                "seconds": round(time.monotonic() - self._began, 1),
                "rss_mib": round(self._process.memory_info().rss / 2**20, 1),
                "descriptors": self._process.num_fds(),
                "threads": self._process.num_threads(),
                "cpu_seconds": round(sum(self._process.cpu_times()[:2]), 1),
            }
        self.samples.append(sample | {"requests": self._ledger.ended.total(), "rows": self._ledger.rows})

    async def go_on(self, stop: asyncio.Event) -> None:
        """Look every two seconds until the end, or the server's."""
        while not stop.is_set():
            if self._server.poll() is not None:
                stop.set()
                raise SoakError(f"the server ended with code {self._server.returncode}")
            await self.sample()
            if len(self.samples) % 15 == 0:
                print(json.dumps(self.samples[-1] | {"faults": self._ledger.num_faults}), flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), SAMPLE_SECONDS)

    def leaks(self) -> dict[str, Any]:
        """Whether memory and descriptors are flat after the warm-up, by the medians of the first and last third."""
        under_load = self.samples[1:-1]
        warm = under_load[int(len(under_load) * WARM_UP) :]
        third = max(len(warm) // 3, 1)
        found: dict[str, Any] = {}
        for name in ("rss_mib", "descriptors", "threads"):
            first, last = (statistics.median(s[name] for s in part) for part in (warm[:third], warm[-third:]))
            limit = first * MAY_GROW if name == "rss_mib" else first + MAY_OPEN
            found[name] = {"first_third": first, "last_third": last, "limit": round(limit, 1), "flat": last <= limit}
        before, after = self.samples[0]["descriptors"], self.samples[-1]["descriptors"]
        limit = before + MAY_OPEN
        found["descriptors_at_rest"] = {"before": before, "after": after, "limit": limit, "flat": after <= limit}
        return found

    def thinned(self, most: int) -> list[dict[str, float]]:
        """At most so many samples, evenly."""
        return self.samples[:: -(-len(self.samples) // most)]


async def at_rest(client: Client) -> None:
    """When nobody asks any more, nothing is under way, and the server's count of answers is ours."""
    ledger = client.ledger
    text = (await client.http.get("/metrics")).text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for name in ("moetrace_requests_under_way", "moetrace_sequences_under_way"):
        if found[name,]:
            ledger.fault(f"{name} is {found[name,]} at rest")
    left = sum(count for (_, outcome), count in ledger.ended.items() if outcome in ("left", "lost", "fault"))
    for path in ("/generate", "/generate_stream", "/sglang/generate", "/v1/completions"):
        own, its = ledger.answered[path, 200], found.get(("moetrace_requests_total", path, "200"), 0)
        if not own <= its <= own + left:
            ledger.fault(f"{path} answered {its} times with 200 by the server's count, {own} by ours and {left} left")
    for (name, *labels), value in found.items():
        if name == "moetrace_requests_total" and labels[1].startswith("5") and labels != ["/ready", "503"]:
            ledger.fault(f"{value} answers of {labels}")


async def ending(client: Client, server: subprocess.Popen[bytes]) -> None:
    """SIGTERM while requests run: each is answered, with its rows, and the process ends well."""
    client.aborted_all_at = float("inf")

    async def last() -> str:
        began, (prompt, inputs) = time.monotonic(), client.prompt()
        parameters = {"max_new_tokens": 300, "return_routed_experts": True}
        answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters}, (200,))
        client.check(prompt, parameters, answer, began)
        return "200"

    running = [asyncio.create_task(client.perform("at the end", last)) for _ in range(24)]
    await asyncio.sleep(0.5)
    server.send_signal(signal.SIGTERM)
    await asyncio.gather(*running)
    code = await asyncio.to_thread(server.wait, 30)
    if code != 0:
        client.ledger.fault(f"the server ended with code {code}")


def nested(counted: Any) -> dict[str, dict[str, int]]:
    """`{(a, b): n}` as `{a: {b: n}}`."""
    table: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted(counted.items(), key=str):
        table.setdefault(str(first), {})[str(second)] = count
    return table


def cpu_name() -> str:
    """The processor's name as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
