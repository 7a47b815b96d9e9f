"""Feed the reader of containers what nobody would write, guided by coverage (atheris, libFuzzer).

    pip install atheris && python scripts/fuzz.py --runs 1000000 --out fuzz.json

Inputs begin as small containers of every codec and mutate from there: bytes as libFuzzer likes, or a fact, a tensor's
entry or its bytes, with checksums made right again, so that what lies behind a checksum is reached too. For every input
the reader must raise `FormatError`, or give traces that keep their contract and come back from another encoding, within
its limit of memory. Anything else ends the run with the offending input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(include=["moetrace"]):
    from moetrace import codecs
    from moetrace.errors import FormatError
    from moetrace.format import load, save
    from moetrace.layout import MoeLayout
    from moetrace.trace import RoutingTrace, WeightSpan

MAX_BYTES = 1 << 22
SHAPES = [((1, 3), 8, 2), ((0,), 128, 8), ((2,), 512, 10), ((0, 1), 5, 5), ((7,), 300, 1)]


def seeds() -> list[bytes]:
    """Small containers of every codec and of several shapes, whole and with holes, spans and no tokens."""
    found = []
    for layers, num_experts, top_k in SHAPES:
        layout = MoeLayout(layers, num_experts, top_k)
        t, layer, k = np.ix_(range(4), range(len(layers)), range(top_k))
        whole = RoutingTrace.build((num_experts - 1 - t - layer - k) % num_experts, layout, [3, 1, 70_000, 5, 9])
        holes = RoutingTrace.build(
            (t + layer + k) % num_experts,
            layout,
            range(6),
            valid_T=np.array([True, False, True, True]),
            start=1,
            weight_spans=[WeightSpan(0, "a"), WeightSpan(2, "b")],
            fingerprint="f",
        )
        found += [save([whole, holes.without_tokens()], codec=codec) for codec in codecs.NAMES]
    return found


def parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, our metadata in it, and payload; a `ValueError` of some kind where that cannot be had."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    header = json.loads(data[8 : 8 + length])
    try:
        content = json.loads(header["__metadata__"]["moetrace"])
        return header, content | {"traces": [dict(trace) for trace in content["traces"]]}, data[8 + length :]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not one of ours") from error


def joined(header: dict[str, Any], content: dict[str, Any], payload: bytes) -> bytes:
    """The container of these parts, with right checksums as far as they can be computed."""
    for i, trace in enumerate(content["traces"]):
        names = [f"{i}.{name}" for name in ("experts", "tokens", "valid") if f"{i}.{name}" in header]
        try:
            parts = [payload[slice(*header[name]["data_offsets"])] for name in names]
        except (KeyError, TypeError):
            continue
        trace["sha256"] = hashlib.sha256(b"".join(parts)).hexdigest()
    content = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    header = header | {"__metadata__": {"moetrace": json.dumps(content)}}
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + payload


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's mutation of some bytes, or one of a fact, a tensor's entry or its bytes with checksums made right."""
    chance = random.Random(seed)
    try:
        if chance.random() < 0.2:
            raise ValueError("mutate the bytes as they are")
        header, content, payload = parsed(data)
        for _ in range(chance.randint(1, 3)):
            kind = chance.random()
            if kind < 0.4:
                change_value(chance.choice(content["traces"]), chance)
            elif kind < 0.6:
                change_value(chance.choice([entry for name, entry in header.items() if name != "__metadata__"]), chance)
            elif kind < 0.95:
                payload = atheris.Mutate(payload, len(payload))[: len(payload)].ljust(len(payload), b"\0")
            else:
                payload = payload[: chance.randint(0, len(payload))] + payload[chance.randint(0, len(payload)) :]
        return joined(header, content, payload)[:max_size]
    except (ValueError, IndexError, TypeError, AttributeError):
        return atheris.Mutate(data, max_size)


def change_value(facts: dict[str, Any], chance: random.Random) -> None:
    """One value of an object: another number near or far, another text, another type, or none."""
    name = chance.choice(sorted(facts))
    value = facts[name]
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        value = [*value[:at], *([] if chance.random() < 0.2 else [other_value(value[at], chance)]), *value[at + 1 :]]
        facts[name] = value
    elif chance.random() < 0.03:
        del facts[name]
    else:
        facts[name] = other_value(value, chance)


def other_value(value: Any, chance: random.Random) -> Any:
    if chance.random() < 0.1:
        return chance.choice(
            [None, True, -1, 0.5, "", [], {}, 1 << 62, "x" * 64, [1 << 40], {"start": 0, "version": "a"}]
        )
    if isinstance(value, int):
        return chance.choice(
            [value + 1, value - 1, value * 2, value // 2, chance.randrange(1 << chance.randint(1, 40))]
        )
    if isinstance(value, str):
        return chance.choice([*codecs.NAMES, "rank", "set", "U8", "U16", "U32", "F32", value[:-1], value + "0"])
    return value


class Fuzzer:
    """Runs inputs and counts what became of them."""

    def __init__(self, runs: int, out: Path | None) -> None:
        self._runs, self._out, self._began = runs, out, time.monotonic()
        self._done = 0
        self._counts: Counter[str] = Counter()

    def one(self, data: bytes) -> None:
        """What libFuzzer calls."""
        try:
            traces = load(data, max_bytes=MAX_BYTES)
        except FormatError as error:
            self._counts[" ".join(w for w in error.what.split() if w.isalpha())[:50]] += 1
        else:
            self._counts["(read)"] += 1
            for trace in traces:
                assert load(save(trace, codec="bits")) == [trace]
                assert all(
                    len(set(ids)) == len(ids) for row in trace.experts_TLK[trace.valid_T].tolist() for ids in row
                )
                assert not trace.experts_TLK[~trace.valid_T].any()
        self._done += 1
        if self._done == self._runs or self._done % 100_000 == 0:
            self.report()

    def report(self) -> None:
        seconds = time.monotonic() - self._began
        report = {
            "inputs": self._done,
            "seconds": round(seconds),
            "failures": 0,
            "outcomes": dict(self._counts.most_common()),
        }
        report |= {"command": " ".join(["python", *sys.argv]), "python": platform.python_version()}
        report |= {"date": time.strftime("%Y-%m-%d")}
        text = json.dumps(report, indent=1)
        print(text, file=sys.stderr)
        if self._out:
            self._out.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(seeds()):
            (Path(corpus) / str(i)).write_bytes(data)
        options = [f"-runs={args.runs}", f"-seed={args.seed}", "-max_len=4096", "-rss_limit_mb=1500", "-verbosity=0"]
        options.append(f"-artifact_prefix={tempfile.gettempdir()}/moetrace-fuzz-")  # an input that fails is kept there
        atheris.Setup([sys.argv[0], *options, corpus], Fuzzer(args.runs, args.out).one, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
