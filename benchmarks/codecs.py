"""What routes cost on the wire and on the way there: our codecs beside what engines and trainers send today.

    python benchmarks/codecs.py [--tokens 4096] [--rounds 15] [--out benchmarks/results/codecs.json]

Uniform random routes of five shapes, and routes that the tiny checkpoint chose for its own samples. Sizes are bytes a
token; speeds are GB/s of the ids as one or two bytes each, in CPU seconds of one thread, medians over rounds. Entropy,
the limit for any codec: of uniform routes exactly; of the tiny model's, per layer, of each rank by itself (for codecs
that keep order) and of each expert being chosen or not (for sets), which leaves out what hangs together.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from math import comb, log2, perm
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from common import cpu_name, keep
from tqdm import tqdm

import moetrace
from moetrace import MoeLayout, RoutingTrace, codecs

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"48x8/128": (48, 8, 128), "58x8/256": (58, 8, 256), "61x8/384": (61, 8, 384), "24x4/32": (24, 4, 32)}
SHAPES |= {"48x10/512": (48, 10, 512)}
FINISHED_TOKENS = 32_768


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="rows of uniform routes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    for name, (layers, top_k, num_experts) in SHAPES.items():
        layout = MoeLayout(tuple(range(layers)), num_experts, top_k)
        limits = {
            "rank": layers * log2(perm(num_experts, top_k)) / 8,
            "set": layers * log2(comb(num_experts, top_k)) / 8,
        }
        results[name] = measure(uniform_routes(args.tokens, layout), layout, limits, args.rounds, name)
    ids_TLK, layout = routes_of_the_tiny_model()
    results["tiny model, 4x4/32"] = measure(ids_TLK, layout, entropy(ids_TLK, layout), args.rounds, "tiny model")
    facts = {
        "hardware": f"1 thread of {cpu_name()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "moetrace": moetrace.__version__},
        "tokens": {"uniform": args.tokens, "tiny model": len(ids_TLK)},
        "rounds": args.rounds,
        "results": results,
        "finish_to_bytes": finish_to_bytes(args.rounds),
    }
    for name, result in results.items():
        print(f"\n{name}: entropy {result['entropy']}")
        for codec, row in result["codecs"].items():
            speeds = f"{row['encode_gbps']:6.2f} {row['decode_gbps']:6.2f} GB/s"
            print(f"  {codec:18} {row['bytes_per_token']:9.1f} B {speeds}")
    print(json.dumps(facts["finish_to_bytes"], indent=1))
    keep(args.out, **facts)
    return 0


def uniform_routes(tokens: int, layout: MoeLayout) -> np.ndarray:
    """`[T, L, K]` of distinct ids in random order, each set as likely as any other."""
    rng = np.random.default_rng(0)
    parts = [
        np.argsort(rng.random((64, layout.num_layers, layout.num_experts)), axis=-1) for _ in range(-(-tokens // 64))
    ]
    return np.concatenate([part[..., : layout.top_k] for part in parts])[:tokens].astype(layout.dtype)


def routes_of_the_tiny_model() -> tuple[np.ndarray, MoeLayout]:
    """`[T, L, K]` ids of the tiny checkpoint on text it sampled itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = ROOT / "models/tiny-qwen3-moe"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows: list[np.ndarray] = []
    with torch.no_grad():
        for prompt in (ROOT / "examples/prompts.txt").read_text().splitlines()[:64]:
            tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=128, do_sample=True)
            with moetrace.record(model) as recording:
                model(input_ids=tokens)
            rows += [trace.experts_TLK for trace in recording.traces(tokens)]
        layout = moetrace.layout_of(model)
    return np.concatenate(rows), layout


def entropy(ids_TLK: np.ndarray, layout: MoeLayout) -> dict[str, float]:
    """Bytes a token, per layer: of each rank by itself, and of each expert being chosen or not."""
    rank_bits = set_bits = 0.0
    for layer in range(layout.num_layers):
        for k in range(layout.top_k):
            p = np.bincount(ids_TLK[:, layer, k], minlength=layout.num_experts) / len(ids_TLK)
            rank_bits -= float((p[p > 0] * np.log2(p[p > 0])).sum())
        chosen = np.bincount(ids_TLK[:, layer].reshape(-1), minlength=layout.num_experts) / len(ids_TLK)
        for p in (chosen, 1 - chosen):
            set_bits -= float((p[p > 0] * np.log2(p[p > 0])).sum())
    return {"rank": rank_bits / 8, "set": set_bits / 8}


def measure(ids_TLK: np.ndarray, layout: MoeLayout, limits: dict[str, float], rounds: int, name: str) -> dict[str, Any]:
    """Size and speed of every way to send these ids."""
    rows: dict[str, dict[str, float]] = {}
    for way, (encode, decode) in tqdm({**ours(layout, len(ids_TLK)), **others(layout)}.items(), desc=name, leave=False):
        data = encode(ids_TLK)
        decoded = decode(data)
        expected = np.sort(ids_TLK, axis=-1) if way.startswith("set") else ids_TLK
        assert np.array_equal(decoded.reshape(ids_TLK.shape), expected), way
        rows[way] = {
            "bytes_per_token": round(len(data) / len(ids_TLK), 2),
            "encode_gbps": round(ids_TLK.nbytes / median_seconds(partial(encode, ids_TLK), rounds) / 1e9, 3),
            "decode_gbps": round(ids_TLK.nbytes / median_seconds(partial(decode, data), rounds) / 1e9, 3),
        }
    return {"entropy": {kind: round(value, 2) for kind, value in limits.items()}, "codecs": rows}


Way = tuple[Callable[[np.ndarray], Any], Callable[[Any], np.ndarray]]


def ours(layout: MoeLayout, rows: int) -> dict[str, Way]:
    """Our codecs, without a container around them."""

    def way(name: str) -> Way:
        return lambda ids: codecs.encode(name, ids, layout), lambda data: codecs.decode(name, data, rows, layout)

    return {name: way(name) for name in codecs.usable(layout)}


def others(layout: MoeLayout) -> dict[str, Way]:
    """What the field sends. Decoded ids are narrowed to one or two bytes, as a trace holds them."""
    dtype = layout.dtype

    def npy(ids: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, ids)
        return base64.b64encode(buffer.getvalue())

    return {
        "int32 base64": (
            lambda ids: base64.b64encode(ids.astype(np.int32).tobytes()),
            lambda data: np.frombuffer(base64.b64decode(data), np.int32).astype(dtype),
        ),
        ".npy base64": (npy, lambda data: np.load(io.BytesIO(base64.b64decode(data)))),
        "msgpack": (
            lambda ids: msgpack.packb({"data": ids.tobytes(), "shape": ids.shape, "dtype": str(ids.dtype)}),
            lambda data: np.frombuffer(msgpack.unpackb(data)["data"], dtype).copy(),
        ),
        "JSON integers": (
            lambda ids: json.dumps(ids.tolist(), separators=(",", ":")).encode(),
            lambda data: np.array(json.loads(data), dtype),
        ),
    }


def finish_to_bytes(rounds: int) -> dict[str, Any]:
    """A finished sequence of 32k tokens, 48x8/128, as a container and back: everything, with checks and checksums."""
    layout = MoeLayout(tuple(range(48)), 128, 8)
    ids_TLK = np.tile(uniform_routes(1024, layout), (FINISHED_TOKENS // 1024, 1, 1))
    trace = RoutingTrace.build(ids_TLK, layout, np.arange(FINISHED_TOKENS + 1) % 151_936)
    report: dict[str, Any] = {"tokens": FINISHED_TOKENS, "raw_bytes": ids_TLK.nbytes}
    for codec in ("raw", "bits", "set"):
        data = moetrace.save(trace, codec=codec)
        report[codec] = {
            "bytes_per_token": round(len(data) / FINISHED_TOKENS, 2),
            "save_ms": round(1e3 * median_seconds(partial(moetrace.save, trace, codec=codec), rounds), 2),
            "load_ms": round(1e3 * median_seconds(partial(moetrace.load, data), rounds), 2),
        }
    return report


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of this thread, which other processes on the machine do not add to."""
    work()
    seconds = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
