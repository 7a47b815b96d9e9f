"""A Parquet file has one row a sequence, with nothing lost; Hugging Face `datasets` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace, refused, routing_traces

from moetrace import tables
from moetrace.errors import FormatError, LayoutMismatchError
from moetrace.layout import MoeLayout
from moetrace.tables import export_parquet, read_parquet, trace_of
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((1, 3), 300, 3)
HOLES = make_trace(range(9), LAYOUT, valid=[True, False, *[True] * 5, False], versions=[(0, "a"), (3, "b")])
TRACES = [("first", HOLES), ("second", make_trace(range(4), LAYOUT, fingerprint="f").without_tokens())]


def test_what_was_exported_is_read_back(tmp_path: Path) -> None:
    assert export_parquet(iter(TRACES), tmp_path / "t.parquet") == 2
    assert list(read_parquet(tmp_path / "t.parquet")) == TRACES
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_trace_survives_a_table(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    first = data.draw(routing_traces(max_rows=6))
    traces = [("a", first), ("b", data.draw(routing_traces(first.layout, max_rows=6)))]
    path = tmp_path_factory.mktemp("tables") / "t.parquet"
    export_parquet(traces, path)
    assert list(read_parquet(path)) == traces


def test_many_sequences_are_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP", 3)
    traces = [(str(i), make_trace(range(2 + i), LAYOUT, seed=i)) for i in range(10)]
    assert export_parquet(traces, tmp_path / "t.parquet") == 10
    assert list(read_parquet(tmp_path / "t.parquet")) == traces


def test_hugging_face_datasets_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_parquet(TRACES, tmp_path / "t.parquet")
    files = {"train": str(tmp_path / "t.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["name"][:] == ["first", "second"]
    assert rows[0]["experts"][0] == HOLES.experts_TLK[0].tolist()
    assert rows[0]["experts"][1] is None  # a row that was not captured
    assert rows[0]["tokens"] == list(range(9))
    assert [trace_of(row) for row in rows] == [trace for _, trace in TRACES]


@pytest.mark.parametrize("traces", [HOLES, None, [HOLES], [(3, HOLES)], [("a", None)], {"a": HOLES}], ids=repr)
def test_traces_without_names_are_refused(tmp_path: Path, traces: Any) -> None:
    with refused(FormatError, "has a name", expected="(name, RoutingTrace) pairs", fix="zip(names, traces)"):
        export_parquet(traces, tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_traces_of_two_models_are_refused(tmp_path: Path) -> None:
    with refused(LayoutMismatchError, "'other' has another layout", fix="a file of their own"):
        export_parquet([*TRACES, ("other", make_trace(range(4)))], tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_refused(tmp_path: Path) -> None:
    with refused(FormatError, "nothing to export", expected="at least one trace"):
        export_parquet([], tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"experts": [[[0, 1, 2]]]},
        {"experts": [[[0, 0, 1], [0, 1, 2]]]},
        {"experts": 5},
        {"experts": [[[65536, 65537, 65538], [0, 1, 2]]] * 8},
        {"experts": [[[-65535, 2, 3], [0, 1, 2]]] * 8},
        {"experts": [[[299, 300, 1], [0, 1, 2]]] * 8},
        {"experts": [[[1.9, 2.2, 3.3], [0, 1, 2]]] * 8},
        {"experts": [[["1", "2", "3"], ["0", "1", "2"]]] * 8},
        {"experts": [[[0, 1], [2, 0], [1, 2]]] * 8},
        {"experts": [[[0], [1], [2]], *[None] * 6, [[3], [4], [5]]]},
        {"tokens": [0.9, *range(1, 9)]},
        {"tokens": [str(token) for token in range(9)]},
        {"tokens": [2**70] * 9},
        {"layers": None},
        {"num_experts": 2},
        {"tokens": [1, 2, 3]},
        {"weight_spans": [1]},
        {"order": "best"},
    ],
    ids=repr,
)
def test_a_row_that_is_no_trace_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    export_parquet(TRACES, tmp_path / "t.parquet")
    row: dict[str, Any] = tables.pq.read_table(tmp_path / "t.parquet").to_pylist()[0]
    assert isinstance(trace_of(row), RoutingTrace)
    with pytest.raises(FormatError, match="the row is not that of a trace"):
        trace_of(row | change)
    with pytest.raises(FormatError, match="the row is not that of a trace"):
        trace_of({name: value for name, value in row.items() if name not in change})


def test_a_row_without_a_captured_row_is_read(tmp_path: Path) -> None:
    nothing = make_trace(range(4), LAYOUT, valid=[False] * 3)
    export_parquet([("a", nothing), ("b", make_trace([7], LAYOUT))], tmp_path / "t.parquet")
    assert list(read_parquet(tmp_path / "t.parquet")) == [("a", nothing), ("b", make_trace([7], LAYOUT))]


def test_a_file_that_is_no_table_of_ours_is_refused(tmp_path: Path) -> None:
    export_parquet(TRACES, tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    damaged = bytearray(whole)
    damaged[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    for data in (b"", b"no table", whole[:-1], whole[len(whole) // 2 :], bytes(damaged)):
        (tmp_path / "t.parquet").write_bytes(data)
        with refused(FormatError, "t.parquet is no Parquet file, or damaged"):
            list(read_parquet(tmp_path / "t.parquet"))
    for column, what in (
        ({"other": ["a"]}, "has no names"),
        ({"name": [None]}, "has no names"),
        ({"name": tables.pa.array([b"\xff"]).view(tables.pa.string())}, "is no Parquet file, or damaged"),
    ):
        tables.pq.write_table(tables.pa.table(column), tmp_path / "t.parquet")
        with refused(FormatError, what):
            list(read_parquet(tmp_path / "t.parquet"))
    with pytest.raises(FileNotFoundError):
        list(read_parquet(tmp_path / "none.parquet"))
