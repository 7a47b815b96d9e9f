"""Files that were written once are read for ever, and written the same again: see golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moetrace import codecs
from moetrace.format import VERSION, load, load_file, open_file, save
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace, WeightSpan

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))


def golden_traces() -> list[RoutingTrace]:
    """Two traces in closed form: one with holes, spans and a start among 10 of 512, one whole and bare, 8 of 128."""
    t, layer, k = np.ix_(range(9), range(3), range(10))
    return [
        RoutingTrace.build(
            (511 - 37 * t - 11 * layer - 50 * k) % 512,
            MoeLayout((1, 2, 5), 512, 10),
            [0, 1, 151_642, *range(90, 99)],
            valid_T=np.array([True, True, False, True, False, False, True, True, True]),
            start=2,
            weight_spans=[WeightSpan(0, "step-7"), WeightSpan(4, "step-8")],
            fingerprint="qwen3-next",
            engine="golden Ω 1.0",
        ),
        RoutingTrace.build((127 - 5 * t - 3 * layer[:, :2] - k[..., :8]) % 128, MoeLayout((0, 1), 128, 8), range(10)),
    ]


def test_every_version_and_codec_has_a_file() -> None:
    names = {"v1-raw"} | {f"v{VERSION}-{name}" for name in codecs.NAMES}
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_file_is_read(path: Path) -> None:
    if path.stem.endswith("zstd") and not codecs.zstd.available():
        pytest.skip("zstd is not installed")
    traces = [trace.as_set() if "set" in path.stem else trace for trace in golden_traces()]
    assert load_file(path) == load(path.read_bytes()) == traces
    with open_file(path) as container:
        assert container[1] == traces[1]


@pytest.mark.parametrize("codec", [name for name in codecs.NAMES if not name.endswith("zstd")])
def test_the_golden_bytes_are_written_again(codec: str) -> None:
    assert save(golden_traces(), codec=codec) == (GOLDEN / f"v{VERSION}-{codec}.safetensors").read_bytes()
