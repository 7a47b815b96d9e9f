"""`moetrace inspect`, `convert`, `verify`, `diff` and `export`.

A command computes one JSON object, its report, and prints it as it is (`--json`) or as text. Exit codes are those of
diff(1): 0 all is well, 1 something differs or is damaged, 2 the command could not be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from moetrace import codecs
from moetrace.commands.inputs import INPUTS, open_input
from moetrace.comparison import first_difference_of
from moetrace.container import MAX_BYTES
from moetrace.errors import FormatError, MoetraceError, StoreError
from moetrace.format import open_file, save_file

T = TypeVar("T")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the file commands to the `moetrace` command."""

    def add(name: str, run: Any, summary: str, *inputs: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=summary, description=f"{summary}. An input is {INPUTS}.")
        for text in inputs:
            parser.add_argument(text, help="where it is written" if text == "output" else "what to read")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="memory a trace may take (%(default)s)")
        parser.set_defaults(run=run)
        return parser

    add("inspect", _inspect, "say what an input holds, and its size under every codec", "input")
    convert = add("convert", _convert, "write an input as one container of the newest version", "input", "output")
    convert.add_argument(
        "--codec", choices=codecs.CHOICES, default=codecs.AUTO, help="codec of the output (%(default)s)"
    )
    add("verify", _verify, "read every trace of an input and say which are damaged", "input")
    diff = add("diff", _diff, "say where two inputs first differ", "a", "b")
    diff.add_argument("--sets", action="store_true", help="compare which experts were chosen, not their ranks")
    add("export", _export, "write an input as a Parquet table, one row a sequence", "input", "output")


def _inspect(args: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    facts: dict[str, Counter[str]] = {
        name: Counter() for name in ("layout", "order", "engine", "fingerprint", "weights")
    }
    with open_input(args.input, args.max_bytes) as items:
        for item in _progress(items, "inspecting"):
            trace = item.read()
            counts.update(sequences=1, rows=len(trace), missing=len(trace) - trace.num_valid, tokens=trace.num_tokens)
            layout = trace.layout
            shape = f"{layout.num_layers} layers x {layout.top_k} of {layout.num_experts}"
            facts["layout"][shape] += 1
            for name in ("order", "engine", "fingerprint"):
                facts[name][getattr(trace, name)] += 1
            facts["weights"].update(span.version for span in trace.weight_spans)
            experts_VLK = trace.experts_TLK[trace.valid_T]
            for codec in codecs.usable(layout):
                sizes[codec] += len(codecs.encode(codec, experts_VLK, layout))
    report: dict[str, Any] = {"input": args.input, **_container_facts(args.input), **counts}
    report |= {name: dict(values) for name, values in facts.items()} | {"bytes_of_ids": dict(sizes)}
    captured = max(counts["rows"] - counts["missing"], 1)
    lines = [f"{name:12} {_shown(report[name])}" for name in report if name != "bytes_of_ids"]
    lines += ["", "codec            bytes   a row"]
    lines += [f"{codec:10} {size:11,} {size / captured:7.1f}" for codec, size in sizes.items()]
    return _print(args, report, lines)


def _convert(args: argparse.Namespace) -> int:
    with open_input(args.input, args.max_bytes) as items:
        traces = [item.read() for item in _progress(items, "reading")]
    save_file(traces, args.output, codec=args.codec)
    size = Path(args.output).stat().st_size
    report = {"output": args.output, "sequences": len(traces), "bytes": size}
    return _print(args, report, [f"{len(traces)} sequences in {size:,} bytes: {args.output}"])


def _verify(args: argparse.Namespace) -> int:
    damaged: list[dict[str, str]] = []
    count = 0
    try:
        with open_input(args.input, args.max_bytes) as items:
            count = len(items)
            for item in _progress(items, "verifying"):
                try:
                    item.read()
                except (FormatError, StoreError) as error:
                    damaged.append({"sequence": item.name, "error": str(error)})
    except FormatError as error:
        damaged.append({"sequence": "all", "error": str(error)})
    report = {"input": args.input, "sequences": count, "damaged": damaged}
    lines = [f"{one['sequence']}: {one['error']}" for one in damaged]
    lines.append(f"{max(count - len(damaged), 0)} of {count} sequences are as they were written")
    return _print(args, report, lines, code=1 if damaged else 0)


def _diff(args: argparse.Namespace) -> int:
    with open_input(args.a, args.max_bytes) as items_a, open_input(args.b, args.max_bytes) as items_b:
        pairs = list(zip_longest(items_a, items_b))
        for sequence, (a, b) in enumerate(_progress(pairs, "comparing")):
            if a is None or b is None:
                found: dict[str, Any] = {"fact": "number of sequences", "a": len(items_a), "b": len(items_b)}
            else:
                difference = first_difference_of(a.read(), b.read(), as_sets=args.sets)
                if difference is None:
                    continue
                found = {name: value for name, value in asdict(difference).items() if value is not None}
            where = "".join(f", {name} {found[name]}" for name in ("position", "layer") if name in found)
            text = f"sequence {sequence}{where}: {found['fact']} {found['a']} against {found['b']}"
            return _print(args, {"equal": False, "sequence": sequence} | found, [text], code=1)
    return _print(args, {"equal": True, "sequences": len(pairs)}, [f"all {len(pairs)} sequences are equal"])


def _export(args: argparse.Namespace) -> int:
    from moetrace.tables import export_parquet

    with open_input(args.input, args.max_bytes) as items:
        count = export_parquet(((item.name, item.read()) for item in _progress(items, "exporting")), args.output)
    return _print(args, {"output": args.output, "sequences": count}, [f"{count} sequences: {args.output}"])


def _container_facts(text: str) -> dict[str, Any]:
    """Version, size and digest, where the input is a container file."""
    if not Path(text).is_file():
        return {}
    try:
        with open_file(text) as container:
            codec = dict(Counter(header.codec for header in container.headers))
            size = Path(text).stat().st_size
            return {"version": container.version, "bytes": size, "digest": container.digest, "codec": codec}
    except MoetraceError:  # a Parquet file
        return {}


def _print(args: argparse.Namespace, report: dict[str, Any], lines: Iterable[str], code: int = 0) -> int:
    print(json.dumps(report, default=str) if args.json else "\n".join(lines))
    return code


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key or '(none)'}: {count:,}" for key, count in value.items()) or "(none)"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _progress(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a progress bar where somebody can see it and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return iter(items)
    return iter(tqdm(items, desc=what, unit="sequence", leave=False, disable=None, file=sys.stderr))
