"""Ids that are converted where they are read are the ids that would have been converted at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_trace, routing_traces

from moetrace.dialects.lazy import LazyIds
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

LARGE = MoeLayout(tuple(range(12)), 128, 8)


def at_once(trace: RoutingTrace, layer_major: bool, dtype: str, missing: int) -> bytes:
    ids_TLK = trace.experts_TLK.astype(np.dtype(dtype).newbyteorder("<"))
    ids_TLK[~trace.valid_T] = missing
    return (ids_TLK.transpose(1, 0, 2) if layer_major else ids_TLK).tobytes()


@given(st.data(), st.booleans())
def test_any_piece_is_that_piece_of_the_whole(data: st.DataObject, layer_major: bool) -> None:
    trace = data.draw(routing_traces())
    narrow = ["uint8"] if trace.layout.num_experts <= 256 else []
    dtype, missing = data.draw(st.sampled_from(["int32", "int16", "uint16", *narrow])), 127
    ids = LazyIds(trace, layer_major=layer_major, dtype=dtype, missing=missing)
    whole = at_once(trace, layer_major, dtype, missing)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    rows, layers, top_k = trace.experts_TLK.shape
    assert ids.nbytes == len(whole)
    assert ids.shape == ((layers, rows, top_k) if layer_major else (rows, layers, top_k))
    assert ids.read(start, stop).tobytes() == whole[start:stop]


@pytest.mark.parametrize("layer_major", [False, True])
def test_a_long_sequence_in_blocks(layer_major: bool) -> None:
    trace = make_trace(range(5001), LARGE, valid=[t % 11 != 3 for t in range(5000)])
    ids = LazyIds(trace, layer_major=layer_major, dtype="int32", missing=-1)
    pieces = [ids.read(start, min(start + 99_999, ids.nbytes)).tobytes() for start in range(0, ids.nbytes, 99_999)]
    assert b"".join(pieces) == at_once(trace, layer_major, "int32", -1)


def test_nothing_is_copied_where_nothing_changes() -> None:
    trace = make_trace(range(51), LARGE)
    ids = LazyIds(trace, layer_major=False, dtype="uint8", missing=255)
    assert np.shares_memory(ids.read(0, ids.nbytes), trace.experts_TLK)
