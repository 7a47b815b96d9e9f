"""Whatever arrives, a reader gives the traces that were written, or a `FormatError`, and takes no more than its limit.

Containers here are forged with right checksums where a checksum alone would stop them.
"""

from __future__ import annotations

import json
import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from containers import container, read_by_hand, sealed
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace, refused

from moetrace import codecs
from moetrace.errors import FormatError, MoetraceError
from moetrace.format import load, save
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

WORKSPACE = 8 << 20
"""What a reader of usual shapes holds beside what it decodes."""
CODECS = ("raw", "bits", "set")
TRACE = make_trace(range(100, 111), MoeLayout((1, 3), 40, 3), valid=[True] * 6 + [False] + [True] * 3, fingerprint="f")


def forged(stored: str = "bits", **changes: Any) -> bytes:
    """The container of `TRACE`, with some facts of its header changed (`...` removes one) and checksums made right."""
    text, tensors = read_by_hand(save(TRACE, codec=stored))
    header = {name: value for name, value in json.loads(text)["traces"][0].items() if name != "sha256"} | changes
    return sealed([{name: value for name, value in header.items() if value is not ...}], tensors)


def forged_tensor(codec: str, name: str, change: Callable[[tuple[str, list[int], bytes]], Any]) -> bytes:
    """The container of `TRACE`, with one tensor changed and checksums made right."""
    text, tensors = read_by_hand(save(TRACE, codec=codec))
    header = {name: value for name, value in json.loads(text)["traces"][0].items() if name != "sha256"}
    return sealed([header], tensors | {name: change(tensors[name])})


def test_the_forger_can_also_tell_the_truth() -> None:
    for codec in CODECS:
        assert load(forged(codec)) == load(save(TRACE, codec=codec))
        assert load(forged_tensor(codec, "0.experts", lambda tensor: tensor)) == load(save(TRACE, codec=codec))


# --- accidents ---


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_truncated_at_every_byte(codec: str) -> None:
    if codec.endswith("zstd") and not codecs.zstd.available():
        pytest.skip("zstd is not installed")
    data = save([TRACE, TRACE.without_tokens()], codec=codec)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            load(data[:length])


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_is_noticed(codec: str) -> None:
    data = save(TRACE, codec=codec)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            load(flipped)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_is_noticed(data: st.DataObject) -> None:
    """Several bytes overwritten, cut out or put in: refused, or it was no damage."""
    whole = save(TRACE, codec=data.draw(st.sampled_from(CODECS)))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        assert load(bytes(damaged)) == load(whole)
    except FormatError:
        assert bytes(damaged) != whole


def test_trailing_bytes() -> None:
    for extra in (b"\0", b" " * 8, save(TRACE)):
        with refused(FormatError, "end elsewhere than their header says"):
            load(save(TRACE) + extra)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage(garbage: bytes) -> None:
    for data in (garbage, struct.pack("<Q", len(garbage)) + garbage):
        with pytest.raises(FormatError):
            load(data)


# --- lies ---


def test_a_header_longer_than_the_bytes() -> None:
    with refused(FormatError, "end inside their header", expected="at least 1008 bytes", got="10 bytes"):
        load(struct.pack("<Q", 1000) + b"{}")
    with refused(FormatError, "end inside their header", expected="at least 8 bytes", got="0 bytes"):
        load(b"")
    with refused(FormatError, "end inside their header", got="10 bytes"):
        load(struct.pack("<Q", 2**64 - 1) + b"{}")


@pytest.mark.parametrize("text", [b'{"number": 0, "id": "0"}\n', b'{\n  "architectures": []\n}'])
def test_text_is_no_container_that_was_cut(text: bytes) -> None:
    with refused(FormatError, "not a moetrace container", expected="a safetensors file, with '{' at byte 8"):
        load(text)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe{}", b'{"a":"\x80"}', "{}".encode("utf-16"), b'{"a": 1, "a": 2}', b"{" * 50_000]
)
def test_a_header_that_is_not_utf8_or_not_json(text: bytes) -> None:
    with refused(FormatError, "not a moetrace container", expected="JSON in UTF-8"):
        load(struct.pack("<Q", len(text)) + text)


def test_a_metadata_text_that_repeats_a_key() -> None:
    text, tensors = read_by_hand(save(TRACE))
    with refused(FormatError, "not a moetrace container", got="repeated"):
        load(container(text[:-1] + ',"version":2}', tensors))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"codec": "gzip"}, "trace 0: the codec is unknown"),
        ({"codec": "auto"}, "trace 0: the codec is unknown"),
        ({"codec": None}, "trace 0: the codec is unknown"),
        ({"codec": "set"}, "keeps no ranks"),
        ({"codec": "raw"}, "'0.experts' contradicts the header"),
        ({"codec": ["bits"]}, "trace 0"),
        ({"num_rows": 17}, "'0.valid' contradicts"),
        ({"num_rows": -1}, "num_rows is out of range"),
        ({"num_rows": 2**60}, "num_rows is out of range"),
        ({"num_rows": 2**39}, "'0.valid' contradicts"),
        ({"num_rows": 10.0}, "num_rows is not a whole number"),
        ({"num_rows": True}, "num_rows is not a whole number"),
        ({"num_valid": 8}, "'0.experts' contradicts"),
        ({"num_valid": 11}, "num_valid is out of range"),
        ({"num_valid": None}, "num_valid is not a whole number"),
        ({"num_tokens": 2**39}, "'0.tokens' contradicts"),
        ({"num_tokens": 10}, "'0.tokens' contradicts|more rows|hash"),
        ({"token_bits": 33}, "token_bits is out of range"),
        ({"token_bits": 6}, "'0.tokens' contradicts"),
        ({"token_bits": None}, "belong to no trace"),
        ({"token_sha256": "0" * 64}, "not the hash of the tokens"),
        ({"token_sha256": None}, "token_sha256 is not text"),
        ({"num_experts": 2**30}, "do not fit together"),
        ({"num_experts": 33}, "out of range"),
        ({"num_experts": 65}, "'0.experts' contradicts"),
        ({"top_k": 0}, "do not fit together"),
        ({"top_k": 4}, "'0.experts' contradicts"),
        ({"layers": [3, 1]}, "at least one, ascending"),
        ({"layers": list(range(10**5))}, "'0.experts' contradicts"),
        ({"layers": {"1": 1, "3": 3}}, "not a whole number"),
        ({"start": 2}, "more rows than tokens"),
        ({"start": -1}, "more rows than tokens"),
        ({"order": "best"}, "order is unknown"),
        ({"weight_spans": [{"start": 1, "version": "a"}]}, "begin at row 0"),
        ({"weight_spans": [{"start": 0}]}, "trace 0"),
        ({"weight_spans": 7}, "trace 0"),
        ({"fingerprint": 5}, "fingerprint is not text"),
        ({"surplus": 1}, "keys are not those"),
        ({"engine": ...}, "keys are not those"),
        ({"num_valid": ...}, "keys are not those"),
        ({"sha256": "0" * 64}, "arrays are not those that were written"),
        ({"sha256": 5}, "sha256 is not text"),
    ],
    ids=repr,
)
def test_a_lying_header(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        load(forged(**changes))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("0.experts", lambda tensor: ("U8", [len(tensor[2]) - 1], tensor[2][:-1]), "'0.experts' contradicts"),
        (
            "0.experts",
            lambda tensor: ("U16", [len(tensor[2]) // 2], tensor[2]),
            "'0.experts' (contradicts|is not where)",
        ),
        ("0.experts", lambda tensor: ("I8", tensor[1], tensor[2]), "'0.experts' has a broken entry"),
        ("0.experts", lambda tensor: (["U8"], tensor[1], tensor[2]), "'0.experts' has a broken entry"),
        ("0.experts", lambda tensor: ("U8", [-1, -54], tensor[2]), "'0.experts' has a broken entry"),
        ("0.experts", lambda tensor: ("U8", [2**62, 4], tensor[2]), "'0.experts' is not where"),
        ("0.experts", lambda tensor: ("U8", "many", tensor[2]), "'0.experts' has a broken entry"),
        ("0.experts", lambda tensor: ("U8", [True], tensor[2][:1]), "'0.experts' has a broken entry"),
        ("0.valid", lambda tensor: ("U8", [2], bytes([0b11111100, 0b11000000])), "another number of rows"),
        ("0.valid", lambda tensor: ("U8", [2], bytes([0b11111101, 0b11000001])), "goes on after the last row"),
        ("0.tokens", lambda tensor: ("U8", tensor[1], tensor[2][:-1] + b"\0"), "not the hash of the tokens"),
        ("1.experts", None, "belong to no trace"),
    ],
)
def test_a_lying_tensor(name: str, change: Any, what: str) -> None:
    if change is None:
        text, tensors = read_by_hand(save(TRACE))
        data = container(text, tensors | {name: ("U8", [0], b"")})
    else:
        data = forged_tensor("bits", name, change)
    with pytest.raises(FormatError, match=what):
        load(data)


def test_overlapping_tensors() -> None:
    text, tensors = read_by_hand(save(TRACE))
    data = container(text, tensors)
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    for name, offsets in (("0.tokens", header["0.experts"]["data_offsets"]), ("0.valid", [0, 2]), ("0.valid", [2, 0])):
        changed = json.dumps(header | {name: header[name] | {"data_offsets": offsets}}).encode()
        with pytest.raises(FormatError, match=r"is not where it must be|end elsewhere"):
            load(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


def test_two_tensors_in_one_place() -> None:
    """Their bytes are the same, so that every checksum fits; only the hole between the others shows."""
    data = save([TRACE, TRACE])
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["0.tokens"] = header["1.tokens"]
    changed = json.dumps(header).encode()
    with refused(FormatError, "is not where it must be"):
        load(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


@pytest.mark.parametrize(
    ("codec", "ids"), [("raw", [39, 39, 1]), ("bits", [39, 39, 1]), ("raw", [0, 40, 1]), ("bits", [63, 40, 1])]
)
def test_duplicate_or_out_of_range_ids(codec: str, ids: list[int]) -> None:
    layout = TRACE.layout
    experts_TLK = TRACE.experts_TLK[TRACE.valid_T].copy()
    experts_TLK[4, 1] = ids
    encoded = codecs.encode(codec, experts_TLK, layout).tobytes()
    with pytest.raises(
        FormatError, match=r"trace 0: (row 4, layer 3 names one expert twice|an expert id is out of range)"
    ):
        load(forged_tensor(codec, "0.experts", lambda tensor: (tensor[0], tensor[1], encoded)))


def test_ranks_of_no_set() -> None:
    with pytest.raises(FormatError, match="trace 0: a rank belongs to no set"):
        load(forged_tensor("set", "0.experts", lambda tensor: (*tensor[:2], b"\xff" * len(tensor[2]))))


# --- bombs ---


def peak_of(data: bytes, **knobs: Any) -> tuple[int, list[RoutingTrace] | MoetraceError]:
    """Most bytes allocated while loading, and what came of it."""
    result: list[RoutingTrace] | MoetraceError
    tracemalloc.start()
    try:
        result = load(data, **knobs)
    except MoetraceError as error:
        result = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


def bomb(rows: int, layers: int, num_experts: int) -> bytes:
    """A few bytes that decode to many: one set of all experts takes no bits at all."""
    layout = MoeLayout(tuple(range(layers)), num_experts, num_experts)
    header = json.loads(read_by_hand(save(make_trace(range(2), layout), codec="set"))[0])["traces"][0]
    header |= {"num_rows": rows, "num_valid": rows, "token_bits": None, "num_tokens": rows}
    del header["sha256"]
    bitmap = np.packbits(np.ones(rows, bool)).tobytes()
    return sealed([header], {"0.experts": ("U8", [0], b""), "0.valid": ("U8", [len(bitmap)], bitmap)})


def test_a_bomb_of_sets_that_take_no_bits() -> None:
    data = bomb(rows=10_000, layers=100, num_experts=1024)  # 2 GB
    assert len(data) < 3_000
    peak, error = peak_of(data, max_bytes=1 << 20)
    assert isinstance(error, FormatError)
    assert "larger than the limit" in error.what
    assert "max_bytes" in str(error.fix)
    assert peak < 1 << 20
    assert len(load(bomb(rows=100, layers=2, num_experts=64))) == 1


@pytest.mark.parametrize("window_log", [10, 27])
@pytest.mark.parametrize("base", CODECS)
def test_a_decompression_bomb(base: str, window_log: int) -> None:
    """256 MiB of zeros, with a window that may be opened for so little, and with one that may not."""
    zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    frame = zstd.compress(bytes(1 << 28), options={zstd.CompressionParameter.window_log: window_log})
    data = forged_tensor(f"{base}+zstd", "0.experts", lambda tensor: ("U8", [len(frame)], frame))
    peak, error = peak_of(data)
    assert isinstance(error, FormatError)
    assert "zstd frame" in error.what
    assert peak < WORKSPACE


@pytest.mark.parametrize(
    "change", [lambda f: f + f, lambda f: f[:-1], lambda f: f + b"\0", lambda f: b"", lambda f: b"x" * 30]
)
def test_what_is_not_one_whole_zstd_frame(change: Any) -> None:
    if not codecs.zstd.available():
        pytest.skip("zstd is not installed")
    with pytest.raises(FormatError, match=r"trace 0: the (zstd frame|bytes are not a zstd frame)"):
        load(forged_tensor("bits+zstd", "0.experts", lambda t: ("U8", [len(change(t[2]))], change(t[2]))))


@pytest.mark.parametrize("filler", ["[]", "{}", '"ab"', "0", '{"a":0}', "[[]]", "1.5"])
def test_a_header_bomb(filler: str) -> None:
    """Parsed JSON is many times its text; the limit counts that too."""
    limit = 1 << 24
    text = json.dumps({"version": 2, "sha256": "", "traces": [...]}, default=lambda _: "FILL")
    text = text.replace('"FILL"', ",".join([filler] * ((limit // 32 - 200) // (2 * len(filler)))))
    peak, error = peak_of(container(text, {}), max_bytes=limit)
    assert isinstance(error, FormatError)
    assert peak < limit
    with refused(FormatError, "header alone is too large", expected="at most 32768 bytes for max_bytes=1048576"):
        load(container(text, {}), max_bytes=1 << 20)


@pytest.mark.parametrize("codec", codecs.NAMES)
@pytest.mark.parametrize("valid", [None, [row % 2 == 0 for row in range(40_000)]], ids=["whole", "holes"])
def test_a_reader_holds_no_more_than_it_declares(codec: str, valid: list[bool] | None) -> None:
    if codec.endswith("zstd") and not codecs.zstd.available():
        pytest.skip("zstd is not installed")
    trace = make_trace(range(40_000), MoeLayout(tuple(range(12)), 128, 8), rows=40_000, valid=valid)
    data = save(trace, codec=codec)
    load(data)  # tables are made once
    enough = next(
        limit
        for limit in range(1 << 20, 1 << 26, 1 << 18)
        if not isinstance(peak_of(data, max_bytes=limit)[1], Exception)
    )
    peak, traces = peak_of(data, max_bytes=enough)
    assert isinstance(traces, list)
    assert peak <= enough + WORKSPACE
    assert enough < 5 * trace.experts_TLK.nbytes
    peak, error = peak_of(data, max_bytes=enough - (1 << 18))
    assert isinstance(error, FormatError)
    assert peak < 1 << 20


# --- the library's reader agrees ---


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_we_read_the_safetensors_library_reads(data: st.DataObject) -> None:
    """Our reader of the envelope is at least as strict as the library's, and sees the same tensors."""
    damaged = bytearray(save(TRACE, codec=data.draw(st.sampled_from(CODECS))))
    length = struct.unpack_from("<Q", damaged)[0]
    at = data.draw(st.integers(0, 8 + length - 1))
    damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b" ", b"0", b"1", b"[", b'"', b","])
    )
    try:
        load(bytes(damaged))
    except FormatError:
        return
    safetensors.numpy.load(bytes(damaged))
