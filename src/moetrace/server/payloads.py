"""How routes leave the server: as ids, as a container, or as a reference to one. Runs in worker threads."""

from __future__ import annotations

from typing import Any

from moetrace import codecs
from moetrace.container import TraceHeader, write_parts
from moetrace.dialects import describe, lightllm_parts
from moetrace.server.archive import Archive
from moetrace.server.bodies import Base64, Joined
from moetrace.server.schemas import GenerateParameters
from moetrace.trace import RoutingTrace

TRACES = "/routing/traces"


def routes_of(trace: RoutingTrace, parameters: GenerateParameters, start: int, archive: Archive) -> dict[str, Any]:
    """The rows from position `start` on, as they were asked for; for `encode_json`."""
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
        (header,), parts = write_parts([trace], codec)
        data = Base64(Joined(*parts))
        return _described(trace, header) | {"codec": header.codec, "format": "moetrace", "data": data}
    layout, dtype = parameters.routed_experts_layout, parameters.routed_experts_dtype
    facts, ids = lightllm_parts(trace, layout=layout, dtype=dtype)
    return facts | {"data": Base64(ids)}


def _described(trace: RoutingTrace, header: TraceHeader) -> dict[str, Any]:
    """What is said of a trace that travels as a container; a codec may keep less of its order than it had."""
    return {"shape": list(trace.experts_TLK.shape), "layout": "TLK", **describe(trace), "order": header.order}
