"""Write traces as a container of version 2. The rules are in docs/format.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from moetrace import codecs
from moetrace.codecs.packing import pack
from moetrace.container.envelope import envelope_parts
from moetrace.container.header import TraceHeader
from moetrace.trace import RoutingTrace

VERSION = 2


def write(traces: Sequence[RoutingTrace], codec: str) -> bytes:
    """A container of these traces; a codec that keeps no ranks stores every trace as a set.

    Raises:
        FormatError: the codec is unknown or cannot hold a trace's layout.
        MissingExtraError: it needs zstd, which is not installed.
    """
    return b"".join(part.data for part in write_parts(traces, codec)[1])


def write_parts(traces: Sequence[RoutingTrace], codec: str) -> tuple[list[TraceHeader], list[np.ndarray]]:
    """`write` for who sends it on: its headers, and its bytes as uint8 arrays, those of codec `raw` not copied."""
    tensors: dict[str, np.ndarray] = {}
    headers = []
    for i, trace in enumerate(traces):
        header, arrays = _encode(trace, codec)
        headers.append(header)
        tensors |= {f"{i}.{name}": array for name, array in arrays.items()}
    told = [header.to_json() for header in headers]
    content = {"version": VERSION, "traces": told, "sha256": header_sha256(VERSION, told)}
    return headers, envelope_parts(tensors, _canonical_json(content))


def payload_sha256(arrays: Iterable[np.ndarray]) -> str:
    """The checksum of one trace's tensors, in the order experts, tokens, valid."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def header_sha256(version: int, traces: list) -> str:
    """The checksum of all headers: SHA-256 of their canonical JSON (keys sorted, no spaces, ASCII)."""
    return hashlib.sha256(_canonical_json({"version": version, "traces": traces}).encode()).hexdigest()


def _encode(trace: RoutingTrace, codec: str) -> tuple[TraceHeader, dict[str, np.ndarray]]:
    layout = trace.layout
    name = codecs.resolve(codec, trace.experts_TLK, layout, trace.order)
    base, _ = codecs.find(name)
    experts_VLK = trace.experts_TLK if trace.num_valid == len(trace) else trace.experts_TLK[trace.valid_T]
    experts = codecs.encode(name, experts_VLK, layout)
    arrays = {"experts": experts.view(layout.dtype).reshape(experts_VLK.shape) if name == "raw" else experts}
    token_bits = None
    if trace.tokens is not None:
        token_bits = int(trace.tokens.max(initial=0)).bit_length()
        arrays["tokens"] = pack(trace.tokens, token_bits)
    arrays["valid"] = np.packbits(trace.valid_T)
    header = TraceHeader(
        layout=layout,
        num_rows=trace.num_rows,
        num_tokens=trace.num_tokens,
        token_sha256=trace.token_sha256,
        start=trace.start,
        order="set" if base.order == "set" else trace.order,
        weight_spans=trace.weight_spans,
        fingerprint=trace.fingerprint,
        engine=trace.engine,
        codec=name,
        num_valid=trace.num_valid,
        token_bits=token_bits,
        sha256=payload_sha256(arrays.values()),
    )
    return header, arrays


def _canonical_json(content: object) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
