"""What the server adds: throughput and latency under load, and what a very long sequence costs everybody else.

    python benchmarks/server.py load --out benchmarks/results/server-load.json
    python benchmarks/server.py long --out benchmarks/results/server-long.json

`load` starts `moetrace serve` on the tiny model and sends it 1, 2, 4, ... 512 requests at a time from this process,
half of them streams, without routes and with, in alternating rounds. `long` starts `benchmarks/clockwork.py`, a server
whose engine emits tokens by the clock, keeps 16 streams open, and lets sequences of 32k tokens end among them, in every
form that routes can have, in turn. Times are milliseconds; percentiles are over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import transformers
from common import cpu_name, keep
from tqdm import tqdm

import moetrace

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]

ROUTES: dict[str, Figures] = {
    "without": {},
    "int32": {"return_routed_experts": True},
    "uint8": {"return_routed_experts": True, "routed_experts_dtype": "uint8", "routed_experts_layout": "TLK"},
}
for _codec in ("raw", "bits", "set"):
    ROUTES[_codec] = {"return_routed_experts": True, "routed_experts_codec": _codec}
ROUTES["reference"] = {"return_routed_experts": "reference", "routed_experts_codec": "raw"}
"""Forms of routes, as parameters of a request: none, as documented, the narrowest without a codec, codecs, and a
reference, whose bytes are then fetched."""
LOAD_FORMS = ("without", "int32", "bits")
LONG_TOKENS = 32_768
STREAMS = 16
SETTLE = 0.5
"""Seconds of undisturbed streams before each long sequence, to compare with."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["load", "long"])
    parser.add_argument("--rounds", type=int, help="default: 3 of `load`, 15 of `long`")
    parser.add_argument("--clients", type=int, nargs="+", default=[2**i for i in range(10)], help="of `load`")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request of `load`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = load(args) if args.part == "load" else asyncio.run(long(args.rounds or 15))
    facts = {
        "hardware": f"{os.cpu_count()} shared CPUs of {cpu_name()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "moetrace": moetrace.__version__,
        },
        "results": results,
    }
    print(json.dumps(results, indent=1))
    keep(args.out, **facts)
    return 0


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server process for the length of the context; its URL once it answers."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                        break
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-3000:])
                time.sleep(0.1)
            yield url, psutil.Process(server.pid)
        finally:
            server.terminate()
            server.wait(timeout=60)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Load


def load(args: argparse.Namespace) -> Figures:
    """Every number of clients, with every form of routes, in alternating rounds."""
    prompts, port = (ROOT / "examples/prompts.txt").read_text().splitlines(), free_port()
    command = ["-m", "moetrace", "serve", str(ROOT / "models/tiny-qwen3-moe"), "--port", str(port)]
    results: Figures = {}
    with running([*command, "--enable-return-routed-experts"], port) as (url, server):
        asyncio.run(round_of(url, prompts, 16, args.tokens, ROUTES["int32"]))  # warm-up
        for clients in tqdm(args.clients, desc="clients"):
            rounds: dict[str, list[Figures]] = {name: [] for name in LOAD_FORMS}
            for _ in range(args.rounds or 3):
                for name in LOAD_FORMS:
                    parameters = ROUTES[name]
                    before = (sum(server.cpu_times()[:2]), time.process_time())
                    figures = asyncio.run(round_of(url, prompts, clients, args.tokens, parameters))
                    figures["server_cpu"] = (sum(server.cpu_times()[:2]) - before[0]) / figures["seconds"]
                    figures["client_cpu"] = (time.process_time() - before[1]) / figures["seconds"]
                    rounds[name].append(figures)
            results[str(clients)] = {name: of_rounds(figures) for name, figures in rounds.items()}
            for name in LOAD_FORMS[1:]:
                ratios = [
                    w["tokens"] / w["seconds"] / (o["tokens"] / o["seconds"])
                    for w, o in zip(rounds[name], rounds["without"], strict=True)
                ]
                results[str(clients)][name]["throughput_ratio"] = round(statistics.median(ratios), 3)
    return results


async def round_of(url: str, prompts: list[str], clients: int, tokens: int, parameters: Figures) -> Figures:
    """`clients` at a time, each several requests, every second one a stream."""
    each = max(2, 16 // clients)
    figures: Figures = {"first": [], "between": [], "whole": [], "errors": 0, "lost": 0, "tokens": 0, "bytes": 0}
    options = {"max_new_tokens": tokens, "ignore_eos": True, **parameters}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(number: int) -> None:
            for i in range(each):
                body = {"inputs": prompts[(number * each + i) % len(prompts)], "parameters": options}
                try:
                    await (stream if (number + i) % 2 else whole)(client, body, figures)
                except (httpx.HTTPError, OSError) as error:
                    figures["lost"] += 1
                    tqdm.write(f"lost: {error!r}")

        began = time.perf_counter()
        await asyncio.gather(*map(one, range(clients)))
    return figures | {"seconds": time.perf_counter() - began, "requests": clients * each}


async def whole(client: httpx.AsyncClient, body: Figures, figures: Figures) -> None:
    """A request, and whether it brought what was asked for."""
    began = time.perf_counter()
    response = await client.post("/generate", json=body)
    figures["whole"].append(time.perf_counter() - began)
    figures["bytes"] += len(response.content)
    note(response.status_code, response.json(), body, figures)


async def stream(client: httpx.AsyncClient, body: Figures, figures: Figures) -> None:
    """A stream: to its first token, and between tokens."""
    last, first, rest = time.perf_counter(), True, b""
    async with client.stream("POST", "/generate_stream", json=body) as response:
        async for data in response.aiter_bytes():
            now = time.perf_counter()
            figures["first" if first else "between"].append(now - last)
            last, first = now, False
            figures["bytes"] += len(data)
            rest = data if data.startswith(b"data:") else rest + data  # a long event comes in pieces
    event = json.loads(rest.rstrip(b"\n").rpartition(b"\n")[2].removeprefix(b"data:"))
    note(response.status_code, event, body, figures)


def note(status: int, answer: Figures, body: Figures, figures: Figures) -> None:
    """Count tokens, or an error: another status, other tokens than asked for, or rows that are missing."""
    parameters = body["parameters"]
    right = status == 200 and len(answer["output_token_ids"]) == parameters["max_new_tokens"]
    if right and parameters.get("return_routed_experts"):
        rows = len(answer["prompt_token_ids"]) + parameters["max_new_tokens"] - 1
        right = answer["routed_experts"]["num_valid"] == rows
    figures["tokens" if right else "errors"] += parameters["max_new_tokens"] if right else 1


def of_rounds(rounds: list[Figures]) -> Figures:
    """Medians over rounds of what is per second, percentiles over all of what is per request or token."""

    def rate(name: str) -> float:
        return round(statistics.median(figures[name] / figures["seconds"] for figures in rounds), 1)

    return {
        "requests_per_s": rate("requests"),
        "tokens_per_s": rate("tokens"),
        "mb_per_s": round(rate("bytes") / 1e6, 2),
        "first_token_ms": percentiles([x for figures in rounds for x in figures["first"]]),
        "between_tokens_ms": percentiles([x for figures in rounds for x in figures["between"]]),
        "request_ms": percentiles([x for figures in rounds for x in figures["whole"]]),
        "requests": sum(figures["requests"] for figures in rounds),
        "errors": sum(figures["errors"] for figures in rounds),
        "lost": sum(figures["lost"] for figures in rounds),
        "server_cpus": round(statistics.median(figures["server_cpu"] for figures in rounds), 2),
        "client_cpus": round(statistics.median(figures["client_cpu"] for figures in rounds), 2),
    }


# A long sequence among others


async def long(rounds: int) -> Figures:
    """Sequences of 32k tokens end among streams, in each form in turn; "without" is a long sequence without routes."""
    port = free_port()
    trials: dict[str, list[Figures]] = {name: [] for name in ROUTES}
    with running([str(ROOT / "benchmarks/clockwork.py"), "--port", str(port)], port) as (url, _):
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            streams = [asyncio.create_task(keep_reading(client)) for _ in range(STREAMS)]
            await asyncio.sleep(1)
            for number in tqdm(range(rounds + 1), desc="rounds"):
                for name, parameters in ROUTES.items():
                    trial = await trial_of(client, port, parameters)
                    if number:  # the first is a warm-up
                        trials[name].append(trial)
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    report: Figures = {"tokens": LONG_TOKENS, "shape": "48 x 8 of 128", "streams": STREAMS, "tick_ms": 10}
    for name, of_form in trials.items():
        facts = {"body_mb": round(statistics.median(trial["bytes"] for trial in of_form) / 1e6, 2)}
        for key in ("trace_ms", "first_byte_ms", "last_byte_ms", "client_ms"):
            values = [trial[key] for trial in of_form if key in trial]
            facts |= {key: percentiles(values, 1) if values else None}
        for key in ("before", "submitting", "finishing"):
            gaps = [gap for trial in of_form for gap in trial[key]["gaps"]]
            late = max(trial[key]["late"] for trial in of_form)
            facts[key] = {"between_tokens_ms": percentiles(gaps), "event_loop_late_ms": round(1e3 * late, 1)}
        report[name] = facts
    return report


async def keep_reading(client: httpx.AsyncClient) -> None:
    """One stream after another, for ever."""
    body = {"inputs": [1], "parameters": {"max_new_tokens": 300}}
    while True:
        async with client.stream("POST", "/generate_stream", json=body) as response:
            async for _ in response.aiter_raw():
                pass


async def trial_of(client: httpx.AsyncClient, port: int, parameters: Figures) -> Figures:
    """One long sequence, and how the streams did before it, while it was submitted, and while it ended."""
    await client.post("/watched")
    await asyncio.sleep(SETTLE)
    began, answered, num_bytes = await asyncio.to_thread(ask_long, port, parameters)
    await asyncio.sleep(0.1)
    seen = (await client.post("/watched")).json()
    ready, built = seen["finished"][-1] if seen["finished"] else (seen["sent"][-1] - 0.01, None)
    figures: Figures = {"bytes": num_bytes}
    if built is not None:
        figures["trace_ms"], figures["first_byte_ms"] = built - ready, seen["sent"][0] - ready
        figures["last_byte_ms"], figures["client_ms"] = seen["sent"][-1] - ready, answered - ready
    windows = {"before": (began - SETTLE, began), "submitting": (began, ready), "finishing": (ready, answered + 0.03)}
    for name, (first, last) in windows.items():
        figures[name] = {
            "gaps": gaps_within(seen["events"], first, last),
            "late": max((late for at, late in seen["late"] if first <= at <= last + 0.002), default=0.0),
        }
    return figures


def ask_long(port: int, parameters: Figures) -> tuple[float, float, int]:
    """Ask for one new token after a long prompt, in a thread: when, when the last byte was here, and how many."""
    inputs = [i % 100_000 for i in range(LONG_TOKENS)]
    body = json.dumps({"inputs": inputs, "parameters": {"max_new_tokens": 1, **parameters}})
    connection, buffer, num_bytes = http.client.HTTPConnection("127.0.0.1", port), bytearray(1 << 20), 0
    began = time.perf_counter()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while count := response.readinto(buffer):
        num_bytes += count
    assert response.status == 200, bytes(buffer[:500])
    if parameters.get("return_routed_experts") == "reference":  # a small answer; then the bytes
        reference = json.loads(buffer[:num_bytes])["routed_experts"]["reference"]
        connection.request("GET", reference["path"])
        response, num_bytes = connection.getresponse(), 0
        while count := response.readinto(buffer):
            num_bytes += count
        assert num_bytes == reference["num_bytes"]
    answered = time.perf_counter()
    connection.close()
    return began, answered, num_bytes


def gaps_within(events: Sequence[tuple[int, float]], first: float, last: float) -> list[float]:
    """Seconds between two events of a stream, where the second one was sent in a window of time."""
    before: dict[int, float] = {}
    gaps = []
    for number, at in events:
        if number in before and first <= at <= last:
            gaps.append(at - before[number])
        before[number] = at
    return gaps


def percentiles(seconds: Sequence[float], digits: int = 2) -> dict[str, float] | None:
    """p50, p95, p99 and the most, in milliseconds."""
    if not seconds:
        return None
    ranks = np.percentile(seconds, [50, 95, 99, 100]) * 1e3
    return dict(zip(("p50", "p95", "p99", "max"), (round(float(rank), digits) for rank in ranks), strict=True))


if __name__ == "__main__":
    sys.exit(main())
