"""Every codec equals its slow twin, comes back, has the size it says, and refuses bytes of another size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import EDGE_EXPERTS, random_ids, refused

from moetrace import codecs
from moetrace.codecs import base, slow
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout

PLAIN = ("raw", "bits", "set")
SHAPES = [MoeLayout((0, 1, 2, 3), 128, 8), MoeLayout((0, 1, 2), 32, 4), MoeLayout((0, 1, 2), 512, 10)]
SHAPES += [MoeLayout((0, 3), experts, 2) for experts in EDGE_EXPERTS]
SHAPES += [MoeLayout((0,), 1, 1), MoeLayout((0, 1), 2, 2), MoeLayout((7,), 1024, 1024), MoeLayout((7,), 1024, 30)]


def ids_of(layout: MoeLayout, rows: int) -> np.ndarray:
    return random_ids(np.random.default_rng(rows), rows, layout).astype(layout.dtype)


@pytest.mark.parametrize("layout", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_a_codec_equals_its_slow_twin_and_comes_back(name: str, layout: MoeLayout) -> None:
    codec, _ = codecs.find(name)
    for rows in (0, 1, 2, 7, 30):
        experts_VLK = ids_of(layout, rows)
        data = codecs.encode(name, experts_VLK, layout)
        routes = experts_VLK.reshape(-1, layout.top_k).tolist()
        assert data.tobytes() == slow.encode(name, routes, layout)
        assert len(data) == codec.size(len(routes), layout)
        decoded = codecs.decode(name, data, rows, layout)
        assert decoded.dtype == layout.dtype
        np.testing.assert_array_equal(decoded, np.sort(experts_VLK, -1) if name == "set" else experts_VLK)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rows", [31, 32, 33, 64, 65, 100])
def test_blocks_begin_and_end_where_the_format_says(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK_IDS", 256)  # 32 routes of 8
    monkeypatch.setattr(slow, "BLOCK_IDS", 256)
    layout = MoeLayout((2,), 100, 8)
    experts_VLK = ids_of(layout, rows)
    data = codecs.encode(name, experts_VLK, layout)
    assert data.tobytes() == slow.encode(name, experts_VLK[:, 0].tolist(), layout)
    np.testing.assert_array_equal(
        codecs.decode(name, data, rows, layout), np.sort(experts_VLK, -1) if name == "set" else experts_VLK
    )


def test_the_block_size_is_pinned() -> None:
    assert base.BLOCK_IDS == 131_072


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_shape_comes_back(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 1024))
    layout = MoeLayout((0, 1), num_experts, data.draw(st.integers(1, min(num_experts, 40))))
    experts_VLK = ids_of(layout, data.draw(st.integers(0, 9)))
    for name in PLAIN:
        decoded = codecs.decode(name, codecs.encode(name, experts_VLK, layout), len(experts_VLK), layout)
        np.testing.assert_array_equal(decoded, np.sort(experts_VLK, -1) if name == "set" else experts_VLK)


@pytest.mark.parametrize("name", PLAIN)
def test_bytes_of_another_length_are_refused(name: str) -> None:
    layout = MoeLayout((0, 1), 100, 4)
    data = codecs.encode(name, ids_of(layout, 5), layout)
    for wrong in (data[:-1], np.append(data, np.uint8(0)), data[:0]):
        with refused(FormatError, f"codec {name!r} have a wrong length", expected=len(data), got=len(wrong)):
            codecs.decode(name, wrong, 5, layout)


@pytest.mark.parametrize("name", ["", "RAW", "zstd", "set+gzip", "auto", None, 3])
def test_an_unknown_codec_is_refused(name: str) -> None:
    with refused(FormatError, "the codec is unknown", expected="raw, bits, set, raw+zstd", got=repr(name)):
        codecs.find(name)


def test_who_asks_for_an_unknown_codec_is_told_of_auto_too() -> None:
    with refused(FormatError, "the codec is unknown", expected="one of auto, auto+zstd, raw, bits", got="'gzip'"):
        codecs.resolve("gzip", ids_of(SHAPES[0], 2), SHAPES[0], "rank")


def test_sets_of_more_experts_than_the_tables_go_are_refused() -> None:
    layout = MoeLayout((0,), 1025, 2)
    with refused(FormatError, "'set' does not go so far", expected="1024", got="1025", fix="'bits'"):
        codecs.encode("set", ids_of(layout, 2), layout)
    assert "set" not in codecs.usable(layout)
    assert "set" in codecs.usable(MoeLayout((0,), 1024, 2))


@pytest.mark.parametrize(("name", "bytes_per_token"), [("raw", 384), ("bits", 336), ("set", 246)])
def test_sizes_of_qwen3_30b_a3b(name: str, bytes_per_token: int) -> None:
    layout = MoeLayout(tuple(range(48)), 128, 8)
    codec, _ = codecs.find(name)
    assert codec.size(4096 * 48, layout) == 4096 * bytes_per_token
