"""Decoding to torch gives what decoding to numpy gives, on whatever device there is."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from traces import make_trace, random_ids, refused

from moetrace import codecs
from moetrace.codecs import base
from moetrace.codecs.tensors import decode_tensor
from moetrace.container import BytesSource, Container
from moetrace.errors import FormatError
from moetrace.format import save
from moetrace.layout import MoeLayout


def _decode_batched(decode_into: Any, *args: Any, batched: bool) -> None:
    decode_into(*args, batched=True)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
SHAPES = [(128, 8), (256, 8), (384, 8), (512, 10), (1024, 40), (5, 5), (1, 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["raw", "bits", "set"])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_tensors_equal_arrays(
    num_experts: int, top_k: int, name: str, batched: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BLOCK_IDS", 40 * top_k)
    layout = MoeLayout((0, 4), num_experts, top_k)
    experts_VLK = random_ids(np.random.default_rng(1), 101, layout).astype(layout.dtype)
    data = codecs.encode(name, experts_VLK, layout)
    codec, _ = codecs.find(name)
    if batched:  # as on a GPU: all full blocks at once
        monkeypatch.setattr(codec, "decode_into", partial(_decode_batched, codec.decode_into))
    tensor = decode_tensor(codec, data, 101, layout, device)
    assert tensor.dtype == (torch.uint8 if num_experts <= 256 else torch.int16)
    np.testing.assert_array_equal(tensor.cpu().numpy(), codecs.decode(name, data, 101, layout))


@pytest.mark.parametrize("name", ["raw", "bits"])
def test_ids_beyond_int16_are_int32(name: str) -> None:
    layout = MoeLayout((0,), 65_536, 2)
    experts_VLK = np.array([[[65_535, 0]], [[32_768, 255]]], np.uint16)
    data = codecs.encode(name, experts_VLK, layout)
    tensor = decode_tensor(codecs.find(name)[0], data, 2, layout, "cpu")
    assert tensor.dtype == torch.int32
    assert tensor.tolist() == experts_VLK.tolist()


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_a_container_gives_the_ids_of_its_valid_rows_as_a_tensor(codec: str) -> None:
    if codec.endswith("zstd") and not codecs.zstd.available():
        pytest.skip("zstd is not installed")
    trace = make_trace(range(100), MoeLayout((1, 2), 128, 8), valid=[row % 3 != 1 for row in range(99)])
    container = Container(BytesSource(save([trace, trace], codec=codec)))
    expected = trace.as_set() if "set" in codec else trace
    assert container.experts_tensor(1).tolist() == expected.experts_TLK[trace.valid_T].tolist()


def test_a_damaged_trace_never_becomes_a_tensor() -> None:
    data = bytearray(save(make_trace(range(100))))
    data[-20] ^= 1
    with refused(FormatError, "trace 0: the arrays are not those that were written"):
        Container(BytesSource(data)).experts_tensor(0)
