"""Traces to test with: a builder with closed-form ids, a hypothesis strategy, and the contract as plain loops.

Axes: T rows, L MoE layers, K experts per token. Nothing here calls a check of the package to decide what is right.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import strategies as st

from moetrace.errors import MoetraceError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

EDGE_EXPERTS = (127, 128, 255, 256, 257, 512)
"""Numbers of experts around the limits of int8 and uint8."""


def sha256_of(tokens: Sequence[int] | np.ndarray) -> str:
    """The token hash as its specification says it: SHA-256 over little-endian uint32."""
    return hashlib.sha256(struct.pack(f"<{len(tokens)}I", *(int(token) for token in tokens))).hexdigest()


def dyed_ids(rows: int, layout: MoeLayout, seed: int = 0) -> np.ndarray:
    """`[T, L, K]` ids in closed form: row, layer and rank each show; the highest expert occurs."""
    t, layer, k = np.ix_(range(rows), range(layout.num_layers), range(layout.top_k))
    return (layout.num_experts - 1 + seed + 7 * t + 3 * layer + k) % layout.num_experts


def make_trace(
    tokens: Sequence[int],
    layout: MoeLayout | None = None,
    *,
    start: int = 0,
    rows: int | None = None,
    valid: Sequence[bool] | None = None,
    versions: Sequence[tuple[int, str]] = (),
    fingerprint: str = "",
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `tokens` with the ids of `dyed_ids`; by default all rows but that of the last token."""
    layout = layout or MoeLayout((1, 2, 5), 16, 2)
    rows = len(tokens) - 1 - start if rows is None else rows
    return RoutingTrace.build(
        dyed_ids(start + rows, layout, seed)[start:],
        layout,
        list(tokens),
        valid_T=None if valid is None else np.array(valid, bool),
        start=start,
        weight_spans=[WeightSpan(at, version) for at, version in versions],
        fingerprint=fingerprint,
    )


@st.composite
def layouts(draw: st.DrawFn) -> MoeLayout:
    num_experts = draw(st.sampled_from(EDGE_EXPERTS) | st.integers(1, 600))
    layers = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    return MoeLayout(tuple(sorted(layers)), num_experts, draw(st.integers(1, min(num_experts, 4))))


def random_ids(rng: np.random.Generator, rows: int, layout: MoeLayout) -> np.ndarray:
    """`[T, L, K]` int64, K distinct ids each, in random order."""
    scores = rng.random((rows, layout.num_layers, layout.num_experts))
    return np.argsort(scores, axis=-1)[..., : layout.top_k]


@st.composite
def routing_traces(
    draw: st.DrawFn, layout: MoeLayout | None = None, max_rows: int = 20, min_rows: int = 0, spans: bool = True
) -> RoutingTrace:
    """Any legal trace: any start, holes, weight spans, 0 to 2 tokens without a row."""
    layout = layout or draw(layouts())
    rows, start, extra = draw(st.integers(min_rows, max_rows)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = start + rows + extra
    later = sorted(draw(st.sets(st.integers(1, rows - 1), max_size=3))) if rows > 1 else []
    versions = [WeightSpan(at, f"v{number}") for number, at in enumerate([0, *later])]
    return RoutingTrace.build(
        random_ids(rng, rows, layout),
        layout,
        draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count)),
        valid_T=np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool),
        start=start,
        weight_spans=versions if spans and draw(st.booleans()) else (),
        order=draw(st.sampled_from(["rank", "set"])),
        fingerprint=draw(st.sampled_from(["", "f00d"])),
        engine=draw(st.sampled_from(["", "vllm 0.26.0", "Ω\n\"'"])),
    )


def assert_contract(trace: RoutingTrace) -> None:
    """Everything a trace promises, read off its attributes one id at a time."""
    layout, rows = trace.layout, len(trace.valid_T)
    assert list(layout.layers) == sorted(layout.layers)
    assert all(type(layer) is int and layer >= 0 for layer in layout.layers)
    assert type(layout.num_experts) is int
    assert type(layout.top_k) is int
    assert 1 <= layout.top_k <= layout.num_experts <= 65536
    assert trace.experts_TLK.shape == (rows, len(layout.layers), layout.top_k)
    assert trace.experts_TLK.dtype == (np.uint8 if layout.num_experts <= 256 else np.uint16)
    assert trace.valid_T.shape == (rows,)
    assert trace.valid_T.dtype == np.bool_
    for row, valid in zip(trace.experts_TLK.tolist(), trace.valid_T.tolist(), strict=True):
        for route in row:
            assert all(0 <= expert < layout.num_experts for expert in route)
            assert len(set(route)) == layout.top_k if valid else route == [0] * layout.top_k
    assert type(trace.start) is int
    assert type(trace.num_tokens) is int
    assert 0 <= trace.start <= trace.start + rows <= trace.num_tokens
    if trace.tokens is not None:
        assert trace.tokens.dtype == np.int64
        assert trace.tokens.shape == (trace.num_tokens,)
        assert trace.token_sha256 == sha256_of(trace.tokens)
    for array in (trace.experts_TLK, trace.valid_T, trace.tokens):
        assert array is None or not array.flags.writeable
        assert array is None or array.flags.c_contiguous
    starts = [span.start for span in trace.weight_spans]
    assert all(type(at) is int for at in starts)
    assert starts == sorted(set(starts))
    assert not starts or (starts[0] == 0 and starts[-1] < max(rows, 1))
    assert all(type(text) is str for text in (trace.fingerprint, trace.engine, trace.token_sha256))
    assert all(type(span.version) is str for span in trace.weight_spans)
    assert trace.order in ("rank", "set")


@contextmanager
def refused(
    kind: type[MoetraceError], what: str, *, expected: object = None, got: object = None, fix: str | None = None
) -> Iterator[None]:
    """The block raises exactly `kind`, and its message has these parts, each as the part it should be."""
    with pytest.raises(MoetraceError) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    assert what in error.what
    for part, value in ((error.expected, expected), (error.got, got), (error.fix, fix)):
        if value is not None:
            assert str(value) in str(part)
            assert str(value) in str(error)
