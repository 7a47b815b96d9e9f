"""No crash, at any byte, loses a trace whose append has returned; and nothing is read that was not appended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from traces import make_trace, refused

from moetrace.errors import FormatError, InvalidTraceError, QuotaError, StoreError
from moetrace.stores import LogWriter, TraceLog, resolve
from moetrace.trace import RoutingTrace

TRACES = [make_trace(range(5 + 3 * seed), seed=seed, fingerprint="f" * seed) for seed in range(4)]


def write(path: Path, traces: list[RoutingTrace], **knobs: object) -> None:
    with LogWriter(path, **knobs) as log:  # type: ignore[arg-type]
        for number, trace in enumerate(traces):
            log.append(trace, f"request-{number}")


def only(path: Path, suffix: str) -> Path:
    (found,) = path.glob(f"*{suffix}")
    return found


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path, TRACES)
    log = TraceLog(tmp_path)
    assert list(log) == TRACES
    assert log[-1] == TRACES[-1]
    assert [record.name for record in log.records] == [f"request-{number}" for number in range(4)]
    assert log.find("request-2") == [TRACES[2]]
    assert log.find("nobody") == []
    with pytest.raises(IndexError):
        log[4]
    with refused(InvalidTraceError, "the number of a trace is not a whole number", got="slice(0, 2, None)"):
        log[0:2]  # type: ignore[index]


def test_a_reader_sees_what_is_finished_while_the_writer_goes_on(tmp_path: Path) -> None:
    with LogWriter(tmp_path) as writer:
        log = TraceLog(tmp_path)
        assert len(log) == 0
        for number, trace in enumerate(TRACES, start=1):
            reference = writer.append(trace)
            assert resolve(str(reference)) == [trace]
            log.refresh()
            assert list(log) == TRACES[:number]
            assert log.reference(number - 1) == reference


def test_shards_end_at_their_size_and_are_read_by_age(tmp_path: Path) -> None:
    write(tmp_path, TRACES * 3, shard_bytes=1500)
    assert 3 <= len(list(tmp_path.glob("*.shard"))) < 12
    assert list(TraceLog(tmp_path)) == TRACES * 3


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = (
        "import sys; from moetrace.stores import LogWriter, TraceLog\n"
        "(trace,) = TraceLog(sys.argv[1])\n"
        "with LogWriter(sys.argv[2], shard_bytes=20_000, durable=False) as log:\n"
        "    for number in range(150): log.append(trace, f'{sys.argv[3]}-{number}')\n"
    )
    write(tmp_path / "one", TRACES[:1])
    command = [sys.executable, "-c", script, str(tmp_path / "one"), str(tmp_path / "log")]
    writers = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    log = TraceLog(tmp_path / "log")
    assert sorted(record.name for record in log.records) == sorted(f"{i}-{n}" for i in range(3) for n in range(150))
    assert set(log) == {TRACES[0]}


# --- crashes ---


def test_a_crash_at_any_byte_loses_no_finished_trace(tmp_path: Path) -> None:
    """Every state the two files can be in: the shard is written first, then the index, each from its beginning."""
    write(tmp_path / "whole", TRACES[:3])
    shard, index = only(tmp_path / "whole", ".shard"), only(tmp_path / "whole", ".index")
    records = TraceLog(tmp_path / "whole").records
    shard_bytes, index_bytes = shard.read_bytes(), index.read_bytes()
    lines = index_bytes.splitlines(keepends=True)
    ends = {record.stop for record in records}
    crashed = tmp_path / "crashed"
    for length in range(len(shard_bytes) + 1):
        finished = sum(record.stop <= length for record in records)
        begun = sum(record.offset < length for record in records)
        for indexed in {max(begun - 1, 0), finished}:  # the line of the last record is there, or is not
            shutil.rmtree(crashed, ignore_errors=True)
            crashed.mkdir()
            (crashed / shard.name).write_bytes(shard_bytes[:length])
            (crashed / index.name).write_bytes(b"".join(lines[: min(indexed, finished)]))
            log = TraceLog(crashed)
            assert log.records == records[:finished]
            if length % 16 == 0 or length in ends:
                assert list(log) == TRACES[:finished]
    for length in range(len(index_bytes) + 1):
        (crashed / index.name).write_bytes(index_bytes[:length])
        assert TraceLog(crashed).records == records
    (crashed / index.name).unlink()
    assert list(TraceLog(crashed)) == TRACES[:3]


def test_a_log_is_written_on_after_a_crash(tmp_path: Path) -> None:
    write(tmp_path, TRACES[:2])
    shard = only(tmp_path, ".shard")
    os.truncate(shard, shard.stat().st_size - 1)
    write(tmp_path, TRACES[2:])
    assert list(TraceLog(tmp_path)) == [TRACES[0], *TRACES[2:]]


def test_kill_9_while_appending_loses_nothing() -> None:
    """A short run of what scripts/crash_log.py does a thousand times."""
    script = Path(__file__).parents[2] / "scripts" / "crash_log.py"
    for knobs in ([], ["--durable"]):
        command = [sys.executable, str(script), "--kills", "25", *knobs]
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert report["wrong"] == []
        assert report["found"] >= report["finished"] > 25  # each writer was let finish two on average


def test_a_full_disk_costs_one_trace_and_no_other(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from moetrace.stores import LogWriter, TraceLog\n"
        "traces = list(TraceLog(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with LogWriter(sys.argv[2]) as log:\n"
        "    log.append(traces[0], 'a')\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, -1))\n"
        "    try: log.append(traces[1], 'b')\n"
        "    except OSError as error: print(type(error).__name__)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "    log.append(traces[2], 'c')\n"
    )
    write(tmp_path / "input", TRACES)
    command = [sys.executable, "-c", script, str(tmp_path / "input"), str(tmp_path / "log")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "OSError\n"
    assert list(TraceLog(tmp_path / "log")) == [TRACES[0], TRACES[2]]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_flipped_bit_costs_its_own_trace_only(tmp_path: Path, with_index: bool) -> None:
    write(tmp_path, TRACES)
    shard, index = only(tmp_path, ".shard"), only(tmp_path, ".index")
    record = TraceLog(tmp_path).records[1]
    damaged = bytearray(shard.read_bytes())
    damaged[record.stop - 3] ^= 1
    shard.write_bytes(damaged)
    if not with_index:
        index.unlink()
        assert list(TraceLog(tmp_path)) == [TRACES[0], *TRACES[2:]]
        return
    log = TraceLog(tmp_path)
    assert [log[i] for i in (0, 2, 3)] == [TRACES[0], *TRACES[2:]]
    with refused(FormatError, "arrays are not those that were written"):
        log[1]


def test_a_damaged_index_is_made_up_for_by_the_shard(tmp_path: Path) -> None:
    write(tmp_path, TRACES)
    index = only(tmp_path, ".index")
    whole = index.read_bytes()
    for at in range(0, len(whole), 7):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert list(TraceLog(tmp_path)) == TRACES


def test_a_record_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [TRACES[0]])
    write(tmp_path / "b", [make_trace(range(5), seed=9)])
    ours, theirs = only(tmp_path / "a", ".shard"), only(tmp_path / "b", ".shard")
    first = TraceLog(tmp_path / "a").records[0]
    other = TraceLog(tmp_path / "b").records[0]
    ours.write_bytes(ours.read_bytes()[: first.start] + theirs.read_bytes()[other.start :])
    with pytest.raises(FormatError):
        TraceLog(tmp_path / "a")[0]


def test_symlinked_shards_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "real", TRACES)
    (tmp_path / "log").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "log" / path.name).symlink_to(path)
    assert len(TraceLog(tmp_path / "log")) == 0


# --- bounds ---


def test_a_full_log_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    with LogWriter(tmp_path, quota=2500) as log:
        kept = 0
        with refused(QuotaError, "is full", expected="at most 2500 bytes", fix="expire"):
            while True:
                log.append(TRACES[0])
                kept += 1
    assert list(TraceLog(tmp_path)) == [TRACES[0]] * kept
    assert kept >= 2


def test_old_shards_expire_unless_somebody_writes_to_them(tmp_path: Path) -> None:
    write(tmp_path, TRACES[:1])
    writer = LogWriter(tmp_path)
    writer.append(TRACES[1])
    for path in tmp_path.glob("*.shard"):
        os.utime(path, (time.time() - 100,) * 2)
    write(tmp_path, TRACES[2:3])
    log = TraceLog(tmp_path)
    assert len(log.expire(max_age_s=50)) == 1
    assert list(log) == TRACES[1:3]
    writer.append(TRACES[3])
    writer.close()
    assert sorted(map(len, TraceLog(tmp_path))) == sorted(map(len, TRACES[1:]))
    assert len(list(tmp_path.iterdir())) == 4


def test_shards_of_others_do_not_expire(tmp_path: Path) -> None:
    write(tmp_path, TRACES[:1])
    (tmp_path / "checkpoint-7.shard").write_bytes(b"somebody else's")
    for path in tmp_path.glob("*.shard"):
        os.utime(path, (time.time() - 100,) * 2)
    assert len(TraceLog(tmp_path).expire(max_age_s=50)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7.shard"]


FORKING = """
import os, pickle, sys
from moetrace.stores import LogWriter, TraceLog
first, second, third, last = TraceLog(sys.argv[1])
with LogWriter(sys.argv[2]) as log:
    log.append(first, "before")
    if not (child := os.fork()):
        log.append(second, "child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    log.append(third, "parent")
    with pickle.loads(pickle.dumps(log)) as copy:
        copy.append(last, "copy")
    log.append(first, "after")
"""


def test_a_writer_that_was_forked_or_pickled_goes_on_in_a_shard_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "input", TRACES)
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path / "input"), str(tmp_path / "log")], check=True)
    log = TraceLog(tmp_path / "log")
    names = ["before", "parent", "after", "child", "copy"]
    assert [record.name for record in log.records] == names
    assert list(log) == [TRACES[0], TRACES[2], TRACES[0], TRACES[1], TRACES[3]]


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused(StoreError, "there is no log", expected="a directory of shards"):
        TraceLog(tmp_path / "none")


@pytest.mark.parametrize("name", ["", "../x", "a\nb", "x" * 300])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with LogWriter(tmp_path) as log, refused(StoreError, "the name cannot be used"):
        log.append(TRACES[0], name)
    assert list(tmp_path.iterdir()) == []
