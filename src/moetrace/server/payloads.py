"""How routes leave the server: as ids, as a container, or as a reference to one. Runs in worker threads."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace import codecs
from moetrace.container import BytesSource, Container, TraceHeader
from moetrace.dialects import base64_pieces, describe, to_lightllm
from moetrace.format import save
from moetrace.server.archive import Archive
from moetrace.server.schemas import GenerateParameters
from moetrace.trace import RoutingTrace

TRACES = "/routing/traces"


@dataclass(frozen=True)
class Plain:
    """Long ASCII text, in pieces, without a character that JSON would escape: base64."""

    pieces: tuple[bytes, ...]

    @classmethod
    def base64(cls, data: np.ndarray | bytes) -> Plain:
        """The base64 of this."""
        return cls(tuple(base64_pieces(data)))


def routes_of(trace: RoutingTrace, parameters: GenerateParameters, start: int, archive: Archive) -> dict[str, Any]:
    """The rows from position `start` on, as they were asked for; for `to_json`."""
    trace = trace.slice(min(start, trace.stop), trace.stop)  # an aborted request may have fewer rows
    codec = parameters.routed_experts_codec
    if parameters.return_routed_experts == "reference":
        kept, header = archive.put(trace, codec or codecs.AUTO)
        reference = {
            "id": kept.digest,
            "path": f"{TRACES}/{kept.digest}",
            "num_bytes": kept.size,
            "codec": header.codec,
            "sha256": kept.digest,
            "expires_at": archive.expires_at(kept),
        }
        return _described(trace, header) | {"reference": reference}
    if codec is not None:
        data = save(trace, codec=codec)
        header = Container(BytesSource(data)).headers[0]
        return _described(trace, header) | {"codec": header.codec, "format": "moetrace", "data": Plain.base64(data)}
    layout, dtype = parameters.routed_experts_layout, parameters.routed_experts_dtype
    return to_lightllm(trace, layout=layout, dtype=dtype, encode=Plain.base64)


def to_json(content: Any) -> bytes:
    """JSON of content that may hold `Plain`, which is not searched for what to escape: that would take longest."""
    texts: list[Plain] = []
    mark = uuid.uuid4().hex  # nobody can have put it into the content

    def keep(value: Any) -> str:
        if not isinstance(value, Plain):
            raise TypeError(f"{type(value).__name__} is no JSON")
        texts.append(value)
        return mark

    first, *rest = json.dumps(content, allow_nan=False, default=keep).split(mark)
    parts = [first.encode()]
    for text, after in zip(texts, rest, strict=True):
        parts += [*text.pieces, after.encode()]
    return b"".join(parts)


def _described(trace: RoutingTrace, header: TraceHeader) -> dict[str, Any]:
    """What is said of a trace that travels as a container; a codec may keep less of its order than it had."""
    return {"shape": list(trace.experts_TLK.shape), "layout": "TLK", **describe(trace), "order": header.order}
