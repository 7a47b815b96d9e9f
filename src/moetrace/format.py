"""Traces as bytes: a safetensors container, version 1, that holds one trace or a batch.

Layout of a container: string metadata has the single key "moetrace", whose value is canonical JSON (sorted keys, no
spaces) with `version` and one header for each trace. Trace i has the tensors `i.experts` (`[T, L, K]`, uint8 or
uint16), `i.valid` (`[ceil(T / 8)]` uint8, bit 7 of byte 0 is row 0) and, where the ids are known, `i.tokens` (uint32).
Equal traces give equal bytes; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from moetrace.errors import FormatError, MoetraceError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

VERSION = 1
KEY = "moetrace"
_HEADER_FIELDS = ("num_tokens", "token_sha256", "start", "order", "fingerprint", "engine")


def save(traces: RoutingTrace | Sequence[RoutingTrace]) -> bytes:
    """One trace, or a batch of them, as container bytes."""
    batch = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    tensors: dict[str, np.ndarray] = {}
    headers = []
    for i, trace in enumerate(batch):
        header = {name: getattr(trace, name) for name in _HEADER_FIELDS}
        header |= asdict(trace.layout) | {"codec": "raw", "weight_spans": [asdict(span) for span in trace.weight_spans]}
        headers.append(header | {"num_rows": trace.num_rows})
        tensors[f"{i}.experts"] = trace.experts_TLK
        tensors[f"{i}.valid"] = np.packbits(trace.valid_T)
        if trace.tokens is not None:
            tensors[f"{i}.tokens"] = trace.tokens.astype(np.uint32)
    header_json = json.dumps({"version": VERSION, "traces": headers}, sort_keys=True, separators=(",", ":"))
    return safetensors.numpy.save(tensors, metadata={KEY: header_json})


def load(data: bytes) -> list[RoutingTrace]:
    """The traces of container bytes, validated.

    Raises:
        FormatError: the bytes are truncated, of an unknown version or codec, or contradict themselves.
    """
    headers = _read_headers(data)
    try:
        tensors = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the bytes are not a whole safetensors file ({error})") from error
    traces = []
    for i, header in enumerate(headers):
        try:
            traces.append(_read_trace(i, header, tensors))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"trace {i} has a broken header or lacks a tensor ({error!r})") from error
        except FormatError:
            raise
        except MoetraceError as error:
            raise FormatError(f"trace {i} contradicts itself ({error})") from error
    return traces


def save_file(traces: RoutingTrace | Sequence[RoutingTrace], path: str | os.PathLike[str]) -> None:
    """Write a container file; it appears whole or not at all."""
    path = Path(path)
    data = save(traces)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_file(path: str | os.PathLike[str]) -> list[RoutingTrace]:
    """The traces of a container file; see `load`."""
    return load(Path(path).read_bytes())


def _read_headers(data: bytes) -> list[dict]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise FormatError(
            "the bytes end inside their header", expected=f"at least {8 + length} bytes", got=f"{len(data)} bytes"
        )
    try:
        header = json.loads(data[8 : 8 + length])["__metadata__"][KEY]
        content = json.loads(header)
        version, headers = content["version"], content["traces"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            "the bytes are not a moetrace container",
            expected=f"a safetensors file with the metadata key {KEY!r}",
            got=repr(error),
            fix="Engines' own payloads are read by moetrace.dialects.",
        ) from error
    if version != VERSION:
        raise FormatError(
            "the container has an unknown version", expected=VERSION, got=version, fix="Upgrade moetrace to read it."
        )
    if not isinstance(headers, list):
        raise FormatError("the container's header is broken", expected="a list of traces", got=type(headers).__name__)
    return headers


def _read_trace(i: int, header: dict, tensors: dict[str, np.ndarray]) -> RoutingTrace:
    if header["codec"] != "raw":
        raise FormatError(f"trace {i} has an unknown codec", expected="'raw'", got=repr(header["codec"]))
    num_rows = header["num_rows"]
    packed = tensors[f"{i}.valid"]
    if packed.dtype != np.uint8 or packed.shape != ((num_rows + 7) // 8,):
        raise FormatError(f"trace {i} has a broken validity bitmap", expected=f"{num_rows} bits", got=packed.shape)
    tokens = tensors.get(f"{i}.tokens")
    if tokens is not None and (tokens.dtype != np.uint32 or tokens.ndim != 1):
        raise FormatError(f"trace {i} has broken tokens", expected="uint32 [num_tokens]", got=f"{tokens.dtype}")
    return RoutingTrace(
        experts_TLK=tensors[f"{i}.experts"],
        valid_T=np.unpackbits(packed, count=num_rows).astype(bool),
        layout=MoeLayout(tuple(header["layers"]), header["num_experts"], header["top_k"]),
        tokens=None if tokens is None else tokens.astype(np.int64),
        weight_spans=tuple(WeightSpan(span["start"], span["version"]) for span in header["weight_spans"]),
        **{name: header[name] for name in _HEADER_FIELDS},
    )
