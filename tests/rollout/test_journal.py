"""A prompt is in the responses and in the log, or in neither, wherever a crash comes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from traces import make_trace, refused

from moetrace.errors import FormatError, QuotaError, RolloutError
from moetrace.format import save
from moetrace.rollout.journal import Journal
from moetrace.stores import LogWriter, TraceLog

SETTINGS = {"prompts_sha256": "ab", "parameters": {"n": 2, "stop": ()}}


class Crash(BaseException):
    """The process is gone."""


def entry(number: int, n: int = 2) -> tuple[dict[str, Any], list[Any]]:
    sequences = [{"text": "naïve\u2028\n", "trace": f"{number}.{i}"} for i in range(n)]
    return {"number": number, "sequences": sequences}, [make_trace(range(3 + number + i)) for i in range(n)]


def content(path: Path) -> list[int]:
    """Numbers of the responses, after a check that the log has their traces, each once, and no other."""
    lines = [json.loads(line) for line in (path / "rollout.jsonl").read_bytes().splitlines()]
    log = TraceLog(path / "traces")
    assert sorted(record.name for record in log.records) == sorted(
        s["trace"] for line in lines for s in line["sequences"]
    )
    for line in lines:
        expected, traces = entry(line["number"], len(line["sequences"]))
        assert line == expected
        assert [log.find(sequence["trace"]) for sequence in line["sequences"]] == [[trace] for trace in traces]
    return [line["number"] for line in lines]


def crash(journal: Journal) -> None:
    """What the system does for a process that is gone."""
    for file in (journal._lock, journal._responses):
        os.close(file)
    journal._lock = journal._responses = -1


def test_what_was_committed_is_there_and_is_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "a" / "b", SETTINGS) as journal:
        assert journal.done == set()
        journal.commit(*entry(4))
        journal.commit(*entry(0, n=1))
        assert journal.done == {0, 4}
    with Journal(tmp_path / "a" / "b", SETTINGS) as journal:
        assert journal.done == {0, 4}
        with refused(RolloutError, "no more of this prompt", got="prompt 4"):
            journal.commit(*entry(4))
        journal.commit(*entry(2, n=0))
    assert content(tmp_path / "a" / "b") == [4, 0, 2]
    with refused(RolloutError, "no more of this prompt"):
        journal.commit(*entry(5))


def crashing(monkeypatch: pytest.MonkeyPatch, at: int, torn: bool) -> Callable[[], int]:
    """Let the `at`-th change of the disk from now on, and all later ones, not happen; `torn`: half of a write does."""
    count = 0

    def crash_at(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and torn and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if count >= at:
                raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "write"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "ftruncate")):
        crash_at(module, name)
    return lambda: count


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_crash_at_any_moment_loses_nothing_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool, again: bool
) -> None:
    at, crashes = 0, 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        journal = Journal(folder, SETTINGS)
        journal.commit(*entry(0))
        with monkeypatch.context() as patch:
            crashing(patch, at, torn)
            try:
                journal.commit(*entry(1))
                journal.close()
                break
            except Crash:
                crash(journal)
        crashes += 1
        if again:  # and once more while it recovers
            with monkeypatch.context() as patch:
                crashing(patch, 1 + at % 5, torn)
                recovering = None
                with suppress(Crash):
                    recovering = Journal(folder, SETTINGS)
                if recovering is not None:
                    recovering._close_log()
                    crash(recovering)
        with Journal(folder, SETTINGS) as journal:
            assert content(folder) == sorted(journal.done)
            assert journal.done in ({0}, {0, 1})
            for number in {1, 2} - journal.done:
                journal.commit(*entry(number))
        assert content(folder) == [0, 1, 2]
        assert not (folder / "pending").exists()
    assert crashes >= 10


def test_what_a_killed_writer_left_hidden_is_removed(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).close()
    (tmp_path / f".pending.{'0' * 32}").write_bytes(b"half")
    Journal(tmp_path, SETTINGS).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "rollout.jsonl", "settings.json", "traces"]


def test_a_disk_that_is_full_ends_the_journal_and_not_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise QuotaError("the log is full")

    journal = Journal(tmp_path, SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "append", full)
        with refused(QuotaError, "the log is full"):
            journal.commit(*entry(0))
    with refused(RolloutError, "no more"):
        journal.commit(*entry(1))  # it would take the place of the first one
    journal.close()
    with Journal(tmp_path, SETTINGS) as journal:
        assert journal.done == {0}
    assert content(tmp_path) == [0]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({**SETTINGS, "prompts_sha256": "cd"}, "prompts_sha256"),
        ({**SETTINGS, "parameters": {"n": 3, "stop": ()}}, "parameters"),
        ({"prompts_sha256": "ab"}, "parameters"),
        ({**SETTINGS, "codec": "set"}, "codec"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], name: str) -> None:
    Journal(tmp_path, SETTINGS).close()
    with refused(RolloutError, f"{name} is not what the rollout", fix="another --out"):
        Journal(tmp_path, changed)
    Journal(tmp_path, SETTINGS).close()


def test_one_process_at_a_time_and_only_in_a_rollouts_folder(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS), refused(RolloutError, "another process is at the rollout"):
        Journal(tmp_path, SETTINGS)
    (tmp_path / "settings.json").unlink()
    with refused(RolloutError, "has responses, but no settings.json"):
        Journal(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("settings.json", b"{"),
        ("settings.json", b"\xff"),
        ("settings.json", b"5"),
        ("settings.json", b"[" * 100_000),
        ("rollout.jsonl", b'{"number": 0\n'),
        ("rollout.jsonl", b"\xff\n"),
        ("rollout.jsonl", b"[]\n"),
        ("rollout.jsonl", b"{}\n"),
        ("rollout.jsonl", b'{"number": [0]}\n'),
        ("rollout.jsonl", b'{"number": "0"}\n'),
        ("pending", b"{\n"),
        ("pending", b'{"number": 7}\n' + save([])),
        ("pending", b'{"number": 7, "sequences": [{}]}\n' + save([])),
    ],
)
def test_a_file_that_is_damaged_is_refused_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    Journal(tmp_path, SETTINGS).close()
    (tmp_path / name).write_bytes(data)
    with refused(FormatError, f"{name} is damaged", fix="another --out"):
        Journal(tmp_path, SETTINGS)
    assert (tmp_path / name).read_bytes() == data
