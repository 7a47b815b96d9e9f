"""Containers of version 1 are read as before: by the specification they were written by, and refused as it refuses."""

from __future__ import annotations

import copy
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from containers import Tensors, container
from traces import refused, sha256_of

from moetrace.errors import FormatError
from moetrace.format import load
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

TRACE = RoutingTrace.build(
    np.array([[[0, 7], [2, 1]], [[0, 0], [0, 0]], [[5, 6], [3, 4]]]),
    MoeLayout((1, 3), 8, 2),
    [11, 12, 13, 70_000],
    valid_T=np.array([True, False, True]),
    weight_spans=[WeightSpan(0, "a"), WeightSpan(2, "b")],
    fingerprint="f",
    engine="e",
)
CONTENT: dict[str, Any] = {
    "version": 1,
    "traces": [
        {
            "codec": "raw",
            "engine": "e",
            "fingerprint": "f",
            "layers": [1, 3],
            "num_experts": 8,
            "num_rows": 3,
            "num_tokens": 4,
            "order": "rank",
            "start": 0,
            "token_sha256": sha256_of([11, 12, 13, 70_000]),
            "top_k": 2,
            "weight_spans": [{"start": 0, "version": "a"}, {"start": 2, "version": "b"}],
        }
    ],
}
TENSORS: Tensors = {
    "0.experts": ("U8", [3, 2, 2], bytes([0, 7, 2, 1, 0, 0, 0, 0, 5, 6, 3, 4])),
    "0.tokens": ("U32", [4], struct.pack("<4I", 11, 12, 13, 70_000)),
    "0.valid": ("U8", [1], bytes([0b10100000])),
}


def test_a_container_written_by_hand_is_read() -> None:
    assert load(container(CONTENT, TENSORS)) == [TRACE]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"other": "{}"}])
def test_another_safetensors_file_is_refused_with_a_hint(metadata: dict[str, str] | None) -> None:
    data = safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, metadata=metadata)
    fix = "moetrace.dialects"
    with refused(FormatError, "not a moetrace container", expected="metadata key 'moetrace'", fix=fix):
        load(data)


@pytest.mark.parametrize("version", [0, 3, "1", None, 1.5, [1], True])
def test_an_unknown_version_is_refused(version: object) -> None:
    with refused(FormatError, "unknown version", expected="1 to 2", got=version, fix="Upgrade moetrace"):
        load(container(CONTENT | {"version": version}, TENSORS))


def test_an_unknown_version_is_refused_before_anything_else_is_read() -> None:
    with refused(FormatError, "unknown version", got="3"):
        load(container({"version": 3, "traces": "in another shape"}, {}))


@pytest.mark.parametrize("codec", ["bits", "", None, "RAW"])
def test_a_codec_that_version_1_does_not_have_is_refused(codec: object) -> None:
    with refused(FormatError, "trace 0: version 1 has one codec only", expected="'raw'", got=repr(codec)):
        load(container(changed(codec=codec), TENSORS))


@pytest.mark.parametrize("content", [[], {}, {"version": 1}, {"traces": []}, "not json", "null", "7"])
def test_a_content_that_is_not_ours_is_refused(content: Any) -> None:
    with refused(FormatError, "not a moetrace container"):
        load(container(content, TENSORS))


@pytest.mark.parametrize("traces", [{}, "x", None, 3])
def test_a_list_of_traces_that_is_none_is_refused(traces: object) -> None:
    with refused(FormatError, "header is broken", expected="a list of traces", got=type(traces).__name__):
        load(container({"version": 1, "traces": traces}, TENSORS))


def changed(**changes: Any) -> dict[str, Any]:
    """The content with some facts of its only trace changed; `...` removes one."""
    content = copy.deepcopy(CONTENT)
    header = content["traces"][0] | changes
    content["traces"][0] = {name: value for name, value in header.items() if value is not ...}
    return content


@pytest.mark.parametrize("name", sorted(CONTENT["traces"][0]))
def test_a_header_that_lacks_a_fact_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="trace 0"):
        load(container(changed(**{name: ...}), TENSORS))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [3, 1]},
        {"layers": [1]},
        {"layers": []},
        {"layers": 3},
        {"layers": "13"},
        {"layers": [1.5, 3]},
        {"layers": None},
        {"num_experts": 300},
        {"num_experts": 7},
        {"num_experts": 0},
        {"num_experts": "8"},
        {"num_experts": 8.0},
        {"top_k": 1},
        {"top_k": 2.0},
        {"num_rows": 2},
        {"num_rows": 4},
        {"num_rows": -1},
        {"num_rows": 9},
        {"num_rows": 2**70},
        {"num_rows": None},
        {"num_rows": 3.0},
        {"num_tokens": 5},
        {"num_tokens": 4.0},
        {"num_tokens": "4"},
        {"token_sha256": "0" * 64},
        {"token_sha256": None},
        {"start": 2},
        {"start": -1},
        {"start": "0"},
        {"start": 0.0},
        {"start": 0.5},
        {"order": "best"},
        {"order": ["rank"]},
        {"fingerprint": 5},
        {"fingerprint": None},
        {"engine": ["e"]},
        {"weight_spans": [{"start": 1, "version": "a"}]},
        {"weight_spans": [{"start": 0, "version": "a"}, {"start": 3, "version": "b"}]},
        {"weight_spans": [{"start": 0}]},
        {"weight_spans": [{"start": 0, "version": 7}]},
        {"weight_spans": [{"start": 0.0, "version": "a"}]},
        {"weight_spans": [0]},
        {"weight_spans": None},
    ],
    ids=repr,
)
def test_a_header_that_contradicts_its_tensors_or_types_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="trace 0"):
        load(container(changed(**changes), TENSORS))


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"0.experts": None}, id="no experts"),
        pytest.param({"0.valid": None}, id="no bitmap"),
        pytest.param({"0.experts": ("I8", [3, 2, 2], bytes(12))}, id="experts I8"),
        pytest.param({"0.experts": ("U16", [3, 2, 2], bytes(24))}, id="experts U16"),
        pytest.param({"0.experts": ("F32", [3, 2, 2], bytes(48))}, id="experts F32"),
        pytest.param({"0.experts": ("BF16", [3, 2, 2], bytes(24))}, id="experts BF16"),
        pytest.param({"0.experts": ("F8_E4M3", [3, 2, 2], bytes(12))}, id="experts F8"),
        pytest.param({"0.experts": ("U8", [2, 3, 2], TENSORS["0.experts"][2])}, id="experts layer-major"),
        pytest.param({"0.experts": ("U8", [12], TENSORS["0.experts"][2])}, id="experts flat"),
        pytest.param({"0.experts": ("U8", [3, 2, 2], bytes(12))}, id="experts zero-filled"),
        pytest.param(
            {"0.experts": ("U8", [3, 2, 2], bytes([0, 8, 2, 1, 0, 0, 0, 0, 5, 6, 3, 4]))}, id="experts out of range"
        ),
        pytest.param(
            {"0.experts": ("U8", [3, 2, 2], bytes([0, 7, 2, 1, 0, 1, 0, 0, 5, 6, 3, 4]))}, id="ids in a missing row"
        ),
        pytest.param({"0.valid": ("U8", [2], bytes([0b10100000, 0]))}, id="bitmap too long"),
        pytest.param({"0.valid": ("U8", [1, 1], bytes([0b10100000]))}, id="bitmap [1, 1]"),
        pytest.param({"0.valid": ("I8", [1], bytes([0b10100000]))}, id="bitmap I8"),
        pytest.param({"0.valid": ("U8", [1], bytes([0b11100000]))}, id="bitmap claims a missing row"),
        pytest.param({"0.valid": ("U8", [1], bytes([0b00000101]))}, id="bitmap in reverse bit order"),
        pytest.param({"0.tokens": ("U32", [3], TENSORS["0.tokens"][2][:12])}, id="tokens too short"),
        pytest.param({"0.tokens": ("U32", [2, 2], TENSORS["0.tokens"][2])}, id="tokens [2, 2]"),
        pytest.param({"0.tokens": ("U32", [4, 1], TENSORS["0.tokens"][2])}, id="tokens [4, 1]"),
        pytest.param({"0.tokens": ("F32", [4], struct.pack("<4f", 11, 12, 13, 70_000))}, id="tokens F32"),
        pytest.param({"0.tokens": ("U32", [4], struct.pack("<4I", 11, 12, 14, 70_000))}, id="other tokens"),
    ],
)
def test_tensors_that_contradict_the_header_are_refused(tensors: dict[str, Any]) -> None:
    merged = {name: entry for name, entry in (TENSORS | tensors).items() if entry is not None}
    with pytest.raises(FormatError):
        load(container(CONTENT, merged))


def test_a_broken_trace_is_named_by_its_place_in_the_batch() -> None:
    content = {"version": 1, "traces": [CONTENT["traces"][0]] * 2}
    tensors = TENSORS | {name.replace("0.", "1."): entry for name, entry in TENSORS.items()}
    assert load(container(content, tensors)) == [TRACE, TRACE]
    with refused(FormatError, "trace 1: tensor '1.valid' contradicts the header", expected="U8 [1]", got="U8 [2]"):
        load(container(content, tensors | {"1.valid": ("U8", [2], bytes(2))}))
    with refused(FormatError, "trace 1: row 0, layer 1 names one expert twice"):
        load(container(content, tensors | {"1.experts": ("U8", [3, 2, 2], bytes(12))}))
