"""The file commands say what is so, in text and in JSON, and end with the exit codes of diff(1)."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import make_trace

from moetrace import codecs, tables
from moetrace.cli import main
from moetrace.commands import files
from moetrace.commands.inputs import Item, open_input
from moetrace.format import load_file, open_file, save_file
from moetrace.layout import MoeLayout
from moetrace.stores import DirectoryStore, LogWriter, TraceStore
from moetrace.tables import export_parquet
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((1, 4), 64, 4)
TRACES = [
    make_trace(range(20), LAYOUT, valid=[True] * 18 + [False], versions=[(0, "step-1")], fingerprint="f"),
    make_trace(range(30, 45), LAYOUT, seed=2),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TRACES, tmp_path / "traces.safetensors", codec="bits")
    return tmp_path / "traces.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def with_id(trace: RoutingTrace, row: int, layer: int, expert: int) -> RoutingTrace:
    experts_TLK = trace.experts_TLK.copy()
    experts_TLK[row, layer, 0] = expert
    return replace(trace, experts_TLK=experts_TLK)


def every_input(tmp_path: Path) -> dict[str, object]:
    """The same traces in everything that can be named on the command line."""
    store = TraceStore(DirectoryStore(tmp_path / "store"))
    reference = store.put(TRACES)
    with LogWriter(tmp_path / "log") as log:
        for trace in TRACES:
            log.append(trace)
    export_parquet([("a", TRACES[0]), ("b", TRACES[1])], tmp_path / "traces.parquet")
    inputs: dict[str, object] = {"log": tmp_path / "log", "parquet": tmp_path / "traces.parquet"}
    return inputs | {"store": tmp_path / "store", "uri": store.store.uri, "reference": reference}


# --- inspect ---


def test_inspect_counts_and_measures(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, "inspect", path)
    assert code == 0
    with open_file(path) as container:
        assert report["digest"] == container.digest
    assert report["bytes"] == path.stat().st_size
    counts = {name: report[name] for name in ("version", "sequences", "rows", "missing", "tokens")}
    assert counts == {"version": 2, "sequences": 2, "rows": 33, "missing": 1, "tokens": 35}
    assert report["layout"] == {"2 layers x 4 of 64": 2}
    assert report["codec"] == {"bits": 2}
    assert report["weights"] == {"step-1": 1}
    assert report["fingerprint"] == {"f": 1, "": 1}
    rows = [trace.experts_TLK[trace.valid_T] for trace in TRACES]
    expected = {name: sum(len(codecs.encode(name, ids, LAYOUT)) for ids in rows) for name in codecs.usable(LAYOUT)}
    assert report["bytes_of_ids"] == expected


def test_inspect_is_readable(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "inspect", path)
    assert code == 0
    lines = out.splitlines()
    assert "rows         33" in lines
    assert "layout       2 layers x 4 of 64: 2" in lines
    assert any(line.startswith("set ") for line in lines)


def test_every_kind_of_input_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, text in every_input(tmp_path).items():
        code, report = run_json(capsys, "inspect", text)
        assert (code, report["sequences"], report["rows"], report["missing"]) == (0, 2, 33, 1), kind


# --- convert ---


@pytest.mark.parametrize("codec", ["auto", "raw", "bits", "set"])
def test_convert_writes_the_newest_version(tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]) -> None:
    old = Path(__file__).parents[1] / "golden" / "v1-raw.safetensors"
    code, report = run_json(capsys, "convert", old, tmp_path / "new", "--codec", codec)
    assert code == 0
    assert report["bytes"] == (tmp_path / "new").stat().st_size
    with open_file(tmp_path / "new") as container:
        assert container.version == 2
        assert list(container) == [trace.as_set() if codec == "set" else trace for trace in load_file(old)]


def test_every_kind_of_input_converts_to_the_same_bytes(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, text in every_input(tmp_path).items():
        assert run(capsys, "convert", text, tmp_path / "out", "--codec", "bits")[0] == 0
        assert (tmp_path / "out").read_bytes() == path.read_bytes(), kind


# --- verify ---


def test_verify_names_the_damaged_sequence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "verify", path) == (0, {"input": str(path), "sequences": 2, "damaged": []})
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80  # the last bitmap
    path.write_bytes(data)
    code, report = run_json(capsys, "verify", path)
    assert code == 1
    assert [one["sequence"] for one in report["damaged"]] == ["1"]
    assert "not those that were written" in report["damaged"][0]["error"]
    code, out = run(capsys, "verify", path)
    assert code == 1
    assert "1 of 2 sequences are as they were written" in out


@pytest.fixture
def store(tmp_path: Path) -> TraceStore:
    return TraceStore(DirectoryStore(tmp_path / "store", durable=False))


def open_files() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())


@pytest.fixture
def few_files() -> Iterator[None]:
    """Twenty more files may be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if number not in open_files()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_a_store_may_have_more_containers_than_files_may_be_open(
    tmp_path: Path, store: TraceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(40):
        store.put([make_trace(range(3), LAYOUT, seed=seed + i) for i in (0, 50)])
    folder = tmp_path / "store"
    assert run_json(capsys, "verify", folder)[1] == {"input": str(folder), "sequences": 80, "damaged": []}
    assert run_json(capsys, "inspect", folder)[1]["sequences"] == 80
    assert run_json(capsys, "diff", folder, folder) == (0, {"equal": True, "sequences": 80})
    assert run_json(capsys, "convert", folder, tmp_path / "out")[1]["sequences"] == 80
    assert run_json(capsys, "export", folder, tmp_path / "out.parquet")[1]["sequences"] == 80


def test_a_container_of_a_store_is_opened_once_to_list_and_once_to_read_it(
    tmp_path: Path, store: TraceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [store.put([make_trace(range(3), LAYOUT, seed=seed + i) for i in (0, 50, 60)]).digest for seed in (1, 2)]
    opened, source = [], DirectoryStore.source

    def counting(self: DirectoryStore, name: str) -> Any:
        opened.append(name.removesuffix(".safetensors"))
        return source(self, name)

    monkeypatch.setattr(DirectoryStore, "source", counting)
    before = open_files()
    with open_input(str(tmp_path / "store")) as items:
        assert [item.read().num_rows for item in items] == [2] * 6
    assert opened == sorted(names) * 2
    assert open_files() == before


def test_what_cannot_be_read_hides_nothing_else_of_a_store(
    tmp_path: Path, store: TraceStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [store.put([make_trace(range(3), LAYOUT, seed=seed)]).digest for seed in range(4)]
    cut, gone = (tmp_path / "store" / f"{digest}.safetensors" for digest in digests[:2])
    cut.write_bytes(cut.read_bytes()[:-1])

    def another_removes(items: Sequence[Item], what: str) -> Sequence[Item]:
        gone.unlink()
        return items

    monkeypatch.setattr(files, "_progress", another_removes)
    code, report = run_json(capsys, "verify", tmp_path / "store")
    assert (code, report["sequences"]) == (1, 4)
    errors = {one["sequence"]: one["error"] for one in report["damaged"]}
    assert errors.keys() == {digests[0], f"{digests[1]}/0"}
    assert "end elsewhere" in errors[digests[0]]
    assert "removed, or has expired" in errors[f"{digests[1]}/0"]


def test_a_damaged_row_hides_nothing_else_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.parquet"
    export_parquet([("a", TRACES[0]), ("b", TRACES[1])], path)
    rows = tables.pq.read_table(path).to_pylist()
    rows[0]["experts"][0][0][0] = 255
    tables.pq.write_table(tables.pa.Table.from_pylist(rows), path)
    code, report = run_json(capsys, "verify", path)
    assert (code, report["sequences"], [one["sequence"] for one in report["damaged"]]) == (1, 2, ["a"])
    assert "an expert id is out of range" in report["damaged"][0]["error"]
    path.write_bytes(b"no table")
    code, report = run_json(capsys, "verify", path)
    assert (code, [one["sequence"] for one in report["damaged"]]) == (1, ["all"])
    assert main(["inspect", str(path)]) == 2
    assert "is no Parquet file, or damaged" in capsys.readouterr().err


def test_verify_of_a_file_that_was_cut_is_1(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    code, report = run_json(capsys, "verify", path)
    assert (code, [one["sequence"] for one in report["damaged"]]) == (1, ["all"])


def test_every_kind_of_input_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, text in every_input(tmp_path).items():
        code, report = run_json(capsys, "verify", text)
        assert (code, report["sequences"], report["damaged"]) == (0, 2, []), kind


# --- diff ---


def test_equal_inputs_have_no_difference(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(TRACES, tmp_path / "raw", codec="raw")
    assert run_json(capsys, "diff", path, tmp_path / "raw") == (0, {"equal": True, "sequences": 2})
    for kind, text in every_input(tmp_path).items():
        assert run(capsys, "diff", path, text)[0] == 0, kind


def test_the_first_different_route_is_named(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = with_id(with_id(TRACES[1], row=9, layer=0, expert=0), row=5, layer=1, expert=63)
    save_file([TRACES[0], changed], tmp_path / "other")
    code, report = run_json(capsys, "diff", path, tmp_path / "other")
    a, b = TRACES[1].experts_TLK[5, 1].tolist(), changed.experts_TLK[5, 1].tolist()
    facts = {"fact": "experts", "a": a, "b": b, "position": 5, "layer": 4}
    assert (code, report) == (1, {"equal": False, "sequence": 1} | facts)
    assert (
        run(capsys, "diff", path, tmp_path / "other")[1]
        == f"sequence 1, position 5, layer 4: experts {a} against {b}\n"
    )


def test_ranks_count_unless_sets_are_compared(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped = np.flip(TRACES[1].experts_TLK, axis=2)
    save_file([TRACES[0], replace(TRACES[1], experts_TLK=flipped)], tmp_path / "flipped")
    code, report = run_json(capsys, "diff", path, tmp_path / "flipped")
    assert (code, report["fact"], report["sequence"], report["position"], report["layer"]) == (1, "experts", 1, 0, 1)
    assert run(capsys, "diff", path, tmp_path / "flipped", "--sets")[0] == 0


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([TRACES[0]], {"sequence": 1, "fact": "number of sequences", "a": 2, "b": 1}),
        ([make_trace([*range(7), 99, *range(8, 20)], LAYOUT)], {"sequence": 0, "fact": "weight_spans"}),
        ([replace(TRACES[0], engine="x"), TRACES[1]], {"sequence": 0, "fact": "engine", "a": "", "b": "x"}),
        ([TRACES[0], TRACES[1].slice(2, 14)], {"sequence": 1, "fact": "start", "a": 0, "b": 2}),
        (
            [TRACES[0], make_trace([*range(30, 44), 7], LAYOUT, seed=2)],
            {"sequence": 1, "fact": "tokens", "position": 14, "a": 44, "b": 7},
        ),
        (
            [TRACES[0], make_trace(range(30, 45), LAYOUT, seed=2, valid=[True] * 3 + [False] + [True] * 10)],
            {"sequence": 1, "fact": "valid", "position": 3, "a": True, "b": False},
        ),
    ],
)
def test_every_fact_is_compared(
    path: Path, tmp_path: Path, other: list[RoutingTrace], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(other, tmp_path / "other")
    code, report = run_json(capsys, "diff", path, tmp_path / "other")
    assert code == 1
    assert {name: report[name] for name in expected} == expected


# --- export ---


def test_export_writes_a_table(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, "export", path, tmp_path / "out.parquet")
    assert (code, report["sequences"]) == (0, 2)
    assert run(capsys, "diff", path, tmp_path / "out.parquet")[0] == 0


# --- trouble ---


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["export", "out"], ["convert", "out"], ["diff", "x"]])
def test_what_cannot_be_done_is_2(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = command
    assert main([name, str(tmp_path / "none"), *rest]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moetrace: ")
    assert "none" in captured.err


def test_a_wrong_path_is_named_as_it_was_given_with_what_to_do(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, folder, below = tmp_path / "none", tmp_path / "folder", path / "out"
    folder.mkdir()
    for wrong, what, *command in (
        (nowhere, "Check the path", "inspect", nowhere),
        (nowhere / "out", "a folder to write into must be there", "convert", path, nowhere / "out"),
        (nowhere / "out", "a folder to write into must be there", "export", path, nowhere / "out"),
        (folder, "Name a file", "convert", path, folder),
        (folder, "Name a file", "export", path, folder),
        (below, "not below a file", "convert", path, below),
    ):
        assert main([str(argument) for argument in command]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"moetrace: {wrong} cannot be used: got ")
        assert what in told
    assert list(folder.iterdir()) == []


def test_the_limit_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--max-bytes", "1000"]) == 2
    assert "the limit" in capsys.readouterr().err


def test_the_process_ends_with_the_code(path: Path, tmp_path: Path) -> None:
    save_file(TRACES[:1], tmp_path / "other")
    for other, code in ((path, 0), (tmp_path / "other", 1), (tmp_path / "none", 2)):
        command = [sys.executable, "-m", "moetrace", "diff", str(path), str(other)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == code
