"""Kill writers of a log at random moments (kill -9) and count what was lost of what they had finished: must be nothing.

    python scripts/crash_log.py --kills 1000

Each round forks a writer that appends traces and tells through a pipe of each one it has finished. Some random time
after it has finished a few (or none), it is killed. Then the log must hold every finished trace, equal to what was
appended, and nothing that was not appended. All rounds write to one directory. Prints JSON; exits 1 if a trace is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moetrace.layout import MoeLayout
from moetrace.stores import LogWriter, TraceLog
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout(tuple(range(12)), 64, 4)


def trace_of(kill: int, number: int) -> RoutingTrace:
    """Trace `number` of round `kill`, in closed form; sizes differ."""
    rows = (1 + 37 * number % 400) * (60 if number % 4 == 3 else 1)  # a large one is more often hit amid its write
    t, layer, k = np.ix_(range(rows), range(12), range(4))
    return RoutingTrace.build((kill + 3 * t + 5 * layer + k) % 64, LAYOUT, np.arange(rows + 1) + number)


def write_until_killed(path: Path, kill: int, durable: bool, told: int) -> None:
    """Append for ever; write the number of each finished trace to the file descriptor `told`."""
    with LogWriter(path, shard_bytes=200_000, durable=durable) as log:
        for number in range(1 << 30):
            log.append(trace_of(kill, number), f"{kill}-{number}")
            os.write(told, number.to_bytes(4, "little"))


def finished_of_one_kill(path: Path, kill: int, durable: bool, chance: random.Random) -> int:
    """How many traces a writer finished before it was killed."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        try:
            write_until_killed(path, kill, durable, told)
        finally:
            os._exit(1)
    os.close(told)
    with os.fdopen(heard, "rb") as pipe:
        awaited = len(pipe.read(4 * chance.randrange(5)))
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return (awaited + len(pipe.read())) // 4


def lost(path: Path, finished: dict[int, int]) -> Iterator[str]:
    """What is wrong with the log after all kills."""
    log = TraceLog(path)
    found = {record.name: i for i, record in enumerate(log.records)}
    if len(found) != len(log):
        yield "a trace is there twice"
    for kill, count in finished.items():
        yield from (f"{kill}-{number}" for number in range(count) if f"{kill}-{number}" not in found)
    for name, i in found.items():
        kill, number = map(int, name.split("-"))
        if log[i] != trace_of(kill, number) or number > finished[kill]:  # one may be whole and not yet told of
            yield f"{name} is not what was appended"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--durable", action="store_true", help="with fsync, which is slower: fewer traces a round")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        finished = {kill: finished_of_one_kill(path, kill, args.durable, chance) for kill in range(args.kills)}
        shards = list(path.glob("*.shard"))
        torn = sum(shard.stat().st_size > indexed_bytes(shard) for shard in shards)
        wrong = list(lost(path, finished))
        report = {"kills": args.kills, "shards": len(shards), "shards_with_bytes_beyond_their_index": torn}
        report |= {"finished": sum(finished.values()), "found": len(TraceLog(path)), "wrong": wrong}
    print(json.dumps(report, indent=1))
    return 1 if wrong else 0


def indexed_bytes(shard: Path) -> int:
    """Where the last record in a shard's index ends."""
    try:
        lines = shard.with_suffix(".index").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        return 0
    facts = json.loads(whole[-1].partition(b" ")[2])
    return facts["offset"] + len(whole[-1]) + facts["bytes"]


if __name__ == "__main__":
    sys.exit(main())
