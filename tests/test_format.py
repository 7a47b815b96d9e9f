"""The container gives back what it was given, has deterministic bytes, and refuses everything else by name."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import EDGE_EXPERTS, assert_contract, make_trace, refused, routing_traces, sha256_of

from moetrace.errors import FormatError
from moetrace.format import KEY, VERSION, load, load_file, save, save_file
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

examples = settings(max_examples=80, deadline=None)
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
TENSORS: dict[str, tuple[str, list[int], bytes]] = {
    "0.experts": ("U8", [3, 2, 2], bytes([0, 7, 2, 1, 0, 0, 0, 0, 5, 6, 3, 4])),
    "0.tokens": ("U32", [4], struct.pack("<4I", 11, 12, 13, 70_000)),
    "0.valid": ("U8", [1], bytes([0b10100000])),
}


def container(content: Any, tensors: dict[str, tuple[str, list[int], bytes]], key: str = KEY) -> bytes:
    """A safetensors file written by hand from its public specification; a str is used as content as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    header: dict[str, Any] = {"__metadata__": {key: text}}
    payload = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    header_bytes = json.dumps(header).encode()
    return struct.pack("<Q", len(header_bytes)) + header_bytes + payload


def read_by_hand(data: bytes) -> tuple[str, dict[str, tuple[str, list[int], bytes]]]:
    """Metadata text and tensors of a container, read without safetensors and without moetrace."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    text = header.pop("__metadata__")[KEY]
    payload = data[8 + length :]
    tensors = {
        name: (entry["dtype"], entry["shape"], payload[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    return text, tensors


# --- the specification ---


def test_a_container_written_by_hand_is_read() -> None:
    assert load(container(CONTENT, TENSORS)) == [TRACE]


def test_saved_bytes_are_those_of_the_specification() -> None:
    text, tensors = read_by_hand(save(TRACE))
    assert text == json.dumps(CONTENT, sort_keys=True, separators=(",", ":"))
    assert tensors == TENSORS


def test_uint16_ids_are_stored_little_endian_and_rows_in_bit_order() -> None:
    trace = make_trace(range(11), MoeLayout((0,), 512, 1), valid=[True] * 8 + [False, True])
    _, tensors = read_by_hand(save(trace))
    ids = [(511 + 7 * row) % 512 if row != 8 else 0 for row in range(10)]
    assert tensors["0.experts"] == ("U16", [10, 1, 1], struct.pack("<10H", *ids))
    assert tensors["0.valid"] == ("U8", [2], bytes([0b11111111, 0b01000000]))


def test_any_safetensors_reader_can_open_a_container() -> None:
    tensors = safetensors.numpy.load(save([TRACE, TRACE]))
    assert sorted(tensors) == ["0.experts", "0.tokens", "0.valid", "1.experts", "1.tokens", "1.valid"]
    np.testing.assert_array_equal(tensors["1.experts"], TRACE.experts_TLK)


def test_format_constants_are_pinned() -> None:
    assert (VERSION, KEY) == (1, "moetrace")


# --- round trip ---


@given(st.lists(routing_traces(max_rows=12), max_size=3))
@examples
def test_loading_what_was_saved_gives_equal_traces(traces: list[RoutingTrace]) -> None:
    loaded = load(save(traces))
    assert loaded == traces
    for trace, original in zip(loaded, traces, strict=True):
        assert_contract(trace)
        np.testing.assert_array_equal(trace.tokens, original.tokens)
    assert save(loaded) == save(traces)


@pytest.mark.parametrize("num_experts", EDGE_EXPERTS)
def test_the_highest_expert_survives_the_container(num_experts: int) -> None:
    trace = make_trace(range(4), MoeLayout((0,), num_experts, 2))
    assert trace.experts_TLK[0, 0, 0] == num_experts - 1
    assert load(save(trace)) == [trace]
    assert load(save(trace))[0].experts_TLK.tolist() == trace.experts_TLK.tolist()


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17])
def test_every_length_of_bitmap_survives(rows: int) -> None:
    valid = [row % 3 != 1 for row in range(rows)]
    trace = make_trace(range(rows), rows=rows, valid=valid)
    assert load(save(trace))[0].valid_T.tolist() == valid


def test_a_trace_that_knows_only_the_hash_survives() -> None:
    trace = replace(TRACE, tokens=None)
    (loaded,) = load(save(trace))
    assert loaded.tokens is None
    assert loaded == trace


def test_one_trace_and_a_batch_of_one_are_the_same_bytes() -> None:
    assert save(TRACE) == save([TRACE]) == save((TRACE,))
    assert load(save([])) == []


@pytest.mark.parametrize(
    "trace",
    [
        TRACE.slice(np.int64(1), np.int64(3)),  # type: ignore[arg-type]
        RoutingTrace.build(np.array([[[0, 1]]]), MoeLayout((0,), np.int64(8), np.int32(2)), [1]),  # type: ignore[arg-type]
        RoutingTrace.build(
            np.array([[[0]]] * 2),
            MoeLayout((0,), 8, 1),
            [1, 2],
            weight_spans=[WeightSpan(0, "a"), WeightSpan(np.int64(1), "b")],  # type: ignore[arg-type]
        ),
    ],
    ids=["start", "layout", "spans"],
)
def test_numbers_that_came_from_numpy_are_saved(trace: RoutingTrace) -> None:
    assert load(save(trace)) == [trace]


def test_equal_traces_give_equal_bytes_in_every_process() -> None:
    script = (
        "import numpy as np, hashlib, moetrace\n"
        "from moetrace import MoeLayout, RoutingTrace, WeightSpan\n"
        "layout = MoeLayout((1, 3), 8, 2)\n"
        "ids = np.array([[[0, 7], [2, 1]], [[9, 9], [9, 9]], [[5, 6], [3, 4]]], np.int32)\n"
        "trace = RoutingTrace.build(ids, layout, [11, 12, 13, 70_000], valid_T=[True, False, True],\n"
        "    weight_spans=[WeightSpan(0, 'a'), WeightSpan(2, 'b')], fingerprint='f', engine='e')\n"
        "print(hashlib.sha256(moetrace.save([trace] * 12)).hexdigest())\n"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert digests == [hashlib.sha256(save([TRACE] * 12)).hexdigest()] * 2


# --- files ---


def test_a_file_holds_the_container_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rollout.moetrace"
    save_file([TRACE, TRACE], path)
    assert path.read_bytes() == save([TRACE, TRACE])
    assert load_file(path) == load_file(str(path)) == [TRACE, TRACE]
    save_file(TRACE, str(path))
    assert load_file(path) == [TRACE]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rollout.moetrace"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    save_file(TRACE, tmp_path / "ours")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("rows", [3, 20_000], ids=["fails at close", "fails at write"])
def test_a_full_disk_leaves_no_partial_file_and_no_temporary_file(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "rollout.moetrace"
    path.write_bytes(b"the file of yesterday")
    script = (
        "import resource, sys, numpy as np, moetrace\n"
        f"ids = np.zeros(({rows}, 1, 1), int)\n"
        f"trace = moetrace.RoutingTrace.build(ids, moetrace.MoeLayout((0,), 8, 1), range({rows}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    moetrace.save_file(trace, sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rollout.moetrace"]
    assert path.read_bytes() == b"the file of yesterday"


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_file(TRACE, tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_file(TRACE, tmp_path / "rollout.moetrace")
    assert list(tmp_path.iterdir()) == []


# --- refusals ---


def test_a_container_truncated_at_any_byte_is_refused() -> None:
    data = save([TRACE, replace(TRACE, tokens=None)])
    for length in range(len(data)):
        with pytest.raises(FormatError):
            load(data[:length])


def test_trailing_bytes_are_refused() -> None:
    for extra in (b"\0", b"\0" * 8, save(TRACE)):
        with pytest.raises(FormatError):
            load(save(TRACE) + extra)


def test_a_flipped_bit_is_refused_or_gives_a_trace_that_keeps_the_contract() -> None:
    data = save(TRACE)
    refused_flips = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            traces = load(bytes(flipped))
        except FormatError:
            refused_flips += 1
            continue
        for trace in traces:
            assert_contract(trace)
    assert refused_flips > 4 * len(data)  # the header and the tokens are most of this container


def test_a_flipped_bit_of_a_token_is_always_refused() -> None:
    data = save(TRACE)
    at = data.index(struct.pack("<4I", 11, 12, 13, 70_000))
    for bit in range(8 * 16):
        flipped = bytearray(data)
        flipped[at + bit // 8] ^= 1 << bit % 8
        with refused(FormatError, "token_sha256 is not the hash"):
            load(bytes(flipped))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        load(garbage)
    with pytest.raises(FormatError):
        load(struct.pack("<Q", len(garbage)) + garbage)


def test_a_header_longer_than_the_bytes_is_refused_with_both_numbers() -> None:
    with refused(FormatError, "end inside their header", expected="at least 1008 bytes", got="10 bytes"):
        load(struct.pack("<Q", 1000) + b"{}")
    with refused(FormatError, "end inside their header", expected="at least 8 bytes", got="0 bytes"):
        load(b"")


@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_a_header_nested_without_end_is_refused(depth: int) -> None:
    nested = b"[" * depth
    with pytest.raises(FormatError):
        load(struct.pack("<Q", len(nested)) + nested)
    with pytest.raises(FormatError):
        load(container("[" * depth, TENSORS))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"other": "{}"}])
def test_another_safetensors_file_is_refused_with_a_hint(metadata: dict[str, str] | None) -> None:
    data = safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, metadata=metadata)
    fix = "moetrace.dialects"
    with refused(FormatError, "not a moetrace container", expected="metadata key 'moetrace'", fix=fix):
        load(data)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, [1]])
def test_an_unknown_version_is_refused(version: object) -> None:
    with refused(FormatError, "unknown version", expected="1", got=version, fix="Upgrade moetrace"):
        load(container(CONTENT | {"version": version}, TENSORS))


def test_an_unknown_version_is_refused_before_anything_else_is_read() -> None:
    with refused(FormatError, "unknown version", got="2"):
        load(container({"version": 2, "traces": "in another shape"}, {}))


@pytest.mark.parametrize("codec", ["bits", "", None, "RAW"])
def test_an_unknown_codec_is_refused(codec: object) -> None:
    with refused(FormatError, "trace 0 has an unknown codec", expected="'raw'", got=repr(codec)):
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
    with refused(FormatError, "trace 1 has a broken validity bitmap", expected="3 bits", got="(2,)"):
        load(container(content, tensors | {"1.valid": ("U8", [2], bytes(2))}))
    with refused(FormatError, "trace 1 contradicts itself"):
        load(container(content, tensors | {"1.experts": ("U8", [3, 2, 2], bytes(12))}))
