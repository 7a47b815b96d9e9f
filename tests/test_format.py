"""The container gives back what it was given, has deterministic bytes, and refuses everything else by name."""

from __future__ import annotations

import hashlib
import itertools
import math
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
from containers import KEY as SPECIFIED_KEY
from containers import canonical, read_by_hand, sealed
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import EDGE_EXPERTS, assert_contract, make_trace, refused, routing_traces, sha256_of

from moetrace import codecs
from moetrace.container import BytesSource, Container
from moetrace.container.envelope import envelope_parts
from moetrace.errors import InvalidTraceError
from moetrace.format import KEY, VERSION, load, load_file, open_file, save, save_file
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
HEADER: dict[str, Any] = {
    "codec": "raw",
    "engine": "e",
    "fingerprint": "f",
    "layers": [1, 3],
    "num_experts": 8,
    "num_rows": 3,
    "num_tokens": 4,
    "num_valid": 2,
    "order": "rank",
    "start": 0,
    "token_bits": 17,
    "token_sha256": sha256_of([11, 12, 13, 70_000]),
    "top_k": 2,
    "weight_spans": [{"start": 0, "version": "a"}, {"start": 2, "version": "b"}],
}
# 17 bits: a plane of low bytes, a plane of high bytes, and bit 16 of each token in a field of one bit.
TOKENS = bytes([11, 12, 13, 70_000 & 255, 0, 0, 0, 70_000 >> 8 & 255, 0b1000])
IDS = {
    "raw": ("U8", [2, 2, 2], bytes([0, 7, 2, 1, 5, 6, 3, 4])),
    # 3 bits: low 2 bits of ids 0, 2, 4, 6 in byte 0 and of 1, 3, 5, 7 in byte 1, in pairs; then one bit of each.
    "bits": ("U8", [3], bytes([0b11_01_10_00, 0b00_10_01_11, 0b10110010])),
    # C(8, 2) = 28 takes 5 bits: ranks 21, 2, 20, 9; their low 4 bits, then bit 4.
    "set": ("U8", [3], bytes([0x45, 0x92, 0b0101])),
}


def tensors(codec: str = "raw") -> dict[str, tuple[str, list[int], bytes]]:
    return {"0.experts": IDS[codec], "0.tokens": ("U8", [9], TOKENS), "0.valid": ("U8", [1], bytes([0b10100000]))}


# --- the specification ---


@pytest.mark.parametrize("codec", IDS)
def test_a_container_written_by_hand_is_read(codec: str) -> None:
    header = HEADER | {"codec": codec, "order": "set" if codec == "set" else "rank"}
    assert load(sealed([header], tensors(codec))) == [TRACE.as_set() if codec == "set" else TRACE]


@pytest.mark.parametrize("codec", IDS)
def test_saved_bytes_are_those_of_the_specification(codec: str) -> None:
    text, stored = read_by_hand(save(TRACE, codec=codec))
    assert stored == tensors(codec)
    header = HEADER | {"codec": codec, "order": "set" if codec == "set" else "rank"}
    header["sha256"] = hashlib.sha256(IDS[codec][2] + TOKENS + bytes([0b10100000])).hexdigest()
    content = {"version": 2, "traces": [header]}
    assert text == canonical(content | {"sha256": hashlib.sha256(canonical(content).encode()).hexdigest()})


def test_uint16_ids_are_stored_little_endian_and_rows_in_bit_order() -> None:
    trace = make_trace(range(11), MoeLayout((0,), 512, 1), valid=[True] * 8 + [False, True])
    _, stored = read_by_hand(save(trace, codec="raw"))
    ids = [(511 + 7 * row) % 512 for row in range(10) if row != 8]
    assert stored["0.experts"] == ("U16", [9, 1, 1], struct.pack("<9H", *ids))
    assert stored["0.valid"] == ("U8", [2], bytes([0b11111111, 0b01000000]))


def test_any_safetensors_reader_can_open_a_container() -> None:
    stored = safetensors.numpy.load(save([TRACE, TRACE], codec="raw"))
    assert sorted(stored) == ["0.experts", "0.tokens", "0.valid", "1.experts", "1.tokens", "1.valid"]
    np.testing.assert_array_equal(stored["1.experts"], TRACE.experts_TLK[TRACE.valid_T])


def test_format_constants_are_pinned() -> None:
    assert (VERSION, KEY, SPECIFIED_KEY) == (2, "moetrace", "moetrace")


# --- round trip ---


@given(st.lists(routing_traces(max_rows=12), max_size=3), st.sampled_from(["auto", "raw", "bits"]))
@examples
def test_loading_what_was_saved_gives_equal_traces(traces: list[RoutingTrace], codec: str) -> None:
    loaded = load(save(traces, codec=codec))
    assert loaded == traces
    for trace, original in zip(loaded, traces, strict=True):
        assert_contract(trace)
        np.testing.assert_array_equal(trace.tokens, original.tokens)
    assert save(loaded, codec=codec) == save(traces, codec=codec)


@given(st.lists(routing_traces(max_rows=12), max_size=3))
@examples
def test_the_codec_set_gives_back_the_sets(traces: list[RoutingTrace]) -> None:
    loaded = load(save(traces, codec="set"))
    assert loaded == [trace.as_set() for trace in traces]
    assert [trace.order for trace in loaded] == ["set"] * len(traces)
    assert save(loaded, codec="set") == save(traces, codec="set") == save(loaded, codec="auto")


@pytest.mark.parametrize("codec", [name for name in codecs.NAMES if name.endswith("zstd")])
def test_every_fact_survives_zstd(codec: str) -> None:
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    for trace in (TRACE, TRACE.without_tokens(), TRACE.slice(1, 2), make_trace(range(300), seed=3)):
        data = save([trace, trace], codec=codec)
        assert load(data) == [trace.as_set() if "set" in codec else trace] * 2
        assert save([trace, trace], codec=codec) == data


@pytest.mark.parametrize("num_experts", EDGE_EXPERTS)
def test_the_highest_expert_survives_the_container(num_experts: int) -> None:
    trace = make_trace(range(4), MoeLayout((0,), num_experts, 2))
    assert trace.experts_TLK[0, 0, 0] == num_experts - 1
    for codec in ("raw", "bits"):
        assert load(save(trace, codec=codec))[0].experts_TLK.tolist() == trace.experts_TLK.tolist()
    assert load(save(trace, codec="set")) == [trace.as_set()]


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17])
def test_every_length_of_bitmap_survives(rows: int) -> None:
    valid = [row % 3 != 1 for row in range(rows)]
    trace = make_trace(range(rows), rows=rows, valid=valid)
    assert load(save(trace))[0].valid_T.tolist() == valid


def test_a_trace_that_knows_only_the_hash_survives() -> None:
    trace = TRACE.without_tokens()
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


@pytest.mark.parametrize(("order", "codec"), [("rank", "bits"), ("set", "set")])
def test_auto_is_the_smallest_codec_that_loses_nothing(order: Any, codec: str) -> None:
    trace = make_trace(range(300), MoeLayout((0, 1, 2, 3), 128, 8))
    trace = trace.as_set() if order == "set" else trace
    sizes = {name: len(save(trace, codec=name)) for name in ("raw", "bits", "set")}
    lossless = [name for name in sizes if load(save(trace, codec=name)) == [trace]]
    assert min(lossless, key=sizes.__getitem__) == codec
    assert save(trace) == save(trace, codec=codec)


@pytest.mark.parametrize("num_experts", [256, 65_536])
def test_auto_leaves_ids_that_fill_their_bytes_alone(num_experts: int) -> None:
    trace = make_trace(range(30), MoeLayout((0,), num_experts, 2))
    assert save(trace) == save(trace, codec="raw")


def test_auto_with_zstd_takes_what_the_table_says() -> None:
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    trace = make_trace(range(300), MoeLayout((0, 1, 2, 3), 128, 8))
    assert save(trace, codec="auto+zstd") == save(trace, codec="raw+zstd")
    assert save(trace.as_set(), codec="auto+zstd") == save(trace, codec="set+zstd")
    many = make_trace(range(4), MoeLayout((0,), 2_000, 2))
    assert save(many, codec="auto+zstd") == save(many, codec="bits+zstd")
    assert save(many.as_set(), codec="auto") == save(many.as_set(), codec="bits")


def test_auto_keeps_the_order_of_arrival_even_of_a_set() -> None:
    trace = replace(make_trace(range(300), MoeLayout((0, 1, 2, 3), 128, 8)), order="set")
    assert save(trace) == save(trace, codec="bits") != save(trace.as_set())
    assert load(save(trace)) == [trace]


# --- one trace of many ---


def test_only_a_number_stands_for_a_trace_of_a_container() -> None:
    container = Container(BytesSource(save([TRACE, TRACE])))
    reads: list[Any] = [container.__getitem__, container.experts_tensor]
    for read in reads:
        with refused(InvalidTraceError, "the number of a trace is not a whole number", got="slice(0, 2, None)"):
            read(slice(0, 2))


@pytest.mark.parametrize("traces", [None, "routes.safetensors", [{"data": "AA=="}], [TRACE, None]], ids=repr)
def test_what_is_no_trace_is_not_saved(traces: Any) -> None:
    with refused(InvalidTraceError, "this is no trace", expected="a RoutingTrace", fix="moetrace.load_file reads"):
        save(traces)


def test_one_trace_of_a_batch_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = [make_trace(range(2000 + i), seed=i) for i in range(20)]
    path = tmp_path / "batch"
    save_file(traces, path)
    ranges: list[tuple[int, int]] = []
    pread = os.pread

    def counted(file: int, count: int, offset: int) -> bytes:
        ranges.append((offset, offset + count))
        return pread(file, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    with open_file(path) as container:
        assert len(container) == 20
        header_bytes = sum(stop - start for start, stop in ranges)
        ranges.clear()
        assert container[13] == traces[13]
        assert container[-1] == traces[-1]
        assert [header.num_rows for header in container.headers] == [len(trace) for trace in traces]
        assert list(container) == traces
        with pytest.raises(IndexError):
            container[20]
    assert header_bytes < path.stat().st_size / 4
    first = [stop - start for start, stop in ranges[:3]]
    assert sum(first) < path.stat().st_size / 15


def test_a_container_is_known_by_its_digest(tmp_path: Path) -> None:
    digests = set()
    for trace in (TRACE, replace(TRACE, engine="f"), TRACE.slice(0, 2), TRACE.as_set(), TRACE.without_tokens()):
        save_file(trace, tmp_path / "file")
        with open_file(tmp_path / "file") as container:
            digests.add(container.digest)
    assert len(digests) == 5


# --- several turns ---


@pytest.mark.parametrize("codec", ["auto", "raw", "bits", "set"])
@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_conversation_sent_by_deltas_comes_back_whole(codec: str, with_tokens: bool) -> None:
    tokens = list(range(500, 560))
    whole = make_trace(tokens, valid=[row % 7 != 3 for row in range(59)], versions=[(0, "a"), (25, "b")])
    joined = None
    for start, stop in itertools.pairwise([0, 10, 11, 40, 59]):
        delta = RoutingTrace.build(  # what a turn that ends at `stop` knows
            whole.experts_TLK[start:stop],
            whole.layout,
            tokens[: stop + 1],
            valid_T=whole.valid_T[start:stop],
            start=start,
            weight_spans=whole.slice(start, stop).weight_spans,
        )
        (received,) = load(save(delta if with_tokens else delta.without_tokens(), codec=codec))
        assert received.start == start
        received = received.with_tokens(tokens)
        joined = received if joined is None else joined.concat(received)
    assert joined == (whole.as_set() if codec == "set" else whole)


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


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["experts", "tokens", "valid", "10.experts", "2.experts", "Ω"]),
            st.sampled_from([np.uint8, np.uint16, np.uint32]),
            st.lists(st.integers(0, 4), min_size=1, max_size=3),
        ),
        max_size=6,
        unique_by=lambda item: item[0],
    ),
    st.text(max_size=40),
)
def test_the_envelope_is_what_the_safetensors_library_writes(tensors: list, text: str) -> None:
    arrays = {name: np.arange(math.prod(shape)).astype(dtype).reshape(shape) for name, dtype, shape in tensors}
    assert b"".join(part.data for part in envelope_parts(arrays, text)) == safetensors.numpy.save(
        arrays, metadata={"moetrace": text}
    )
