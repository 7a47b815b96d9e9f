"""The archive behind references: what was given out is there, unless a bound says otherwise, and bounds hold."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traces import make_trace, routing_traces

from moetrace import codecs, load
from moetrace.container import Container
from moetrace.errors import ArchiveError, QuotaError, StoreError, UnknownTraceError
from moetrace.layout import MoeLayout
from moetrace.server import ServerConfig
from moetrace.server import archive as archive_module
from moetrace.server.archive import Archive
from moetrace.stores import DirectoryStore, MemoryStore
from moetrace.trace import RoutingTrace

TRACES = [make_trace([i, 2, 3, 4]) for i in range(200)]
SIZE = Archive(ServerConfig()).put(TRACES[0], "raw")[0].size


def archive_of(traces: float = 10, **knobs: Any) -> Archive:
    """An archive with room for so many of `TRACES`, all of one size."""
    return Archive(ServerConfig(archive_bytes=int(traces * SIZE), **knobs))


def read(archive: Archive, digest: str, *, fetch: bool = True) -> RoutingTrace:
    with archive.open(digest, fetch=fetch) as (kept, source):
        data = bytes(source.read(0, source.size))
        assert kept.size == source.size
        assert Container(source).digest == kept.digest == digest
    return load(data)[0]


def put(archive: Archive, trace: RoutingTrace) -> str:
    return archive.put(trace, "raw")[0].digest


def assert_consistent(archive: Archive) -> None:
    """What the archive knows is what its store holds."""
    entries = archive._store.entries()
    assert {entry.name for entry in entries} == {f"{digest}.safetensors" for digest in archive._kept}
    state = archive.state()
    assert (state.traces, state.num_bytes) == (len(entries), sum(entry.size for entry in entries))
    assert state.num_bytes <= state.max_bytes
    assert not archive._writing


def test_what_was_put_is_there_under_its_digest() -> None:
    archive = archive_of()
    kept, header = archive.put(TRACES[0], "auto")
    assert read(archive, kept.digest) == TRACES[0]
    assert header.codec == "bits"
    assert archive.state().traces == 1
    with pytest.raises(UnknownTraceError, match="no such trace"), archive.open("0" * 64, fetch=True):
        pass


def test_full_the_oldest_go_and_are_counted() -> None:
    archive = archive_of(3.5)
    digests = [put(archive, trace) for trace in TRACES[:3]]
    read(archive, digests[0])
    read(archive, digests[1], fetch=False)
    digests += [put(archive, trace) for trace in TRACES[3:5]]
    for digest in digests[:2]:
        with pytest.raises(UnknownTraceError):
            read(archive, digest)
    for digest, trace in zip(digests[2:], TRACES[2:5], strict=True):
        assert read(archive, digest) == trace
    state = archive.state()
    assert (state.traces, state.num_bytes, state.evicted, state.unfetched) == (3, 3 * SIZE, 2, 1)
    assert_consistent(archive)


def test_what_is_given_out_again_is_young_again() -> None:
    archive = archive_of(2)
    first, second = put(archive, TRACES[0]), put(archive, TRACES[1])
    assert put(archive, TRACES[0]) == first
    put(archive, TRACES[2])
    assert read(archive, first) == TRACES[0]
    with pytest.raises(UnknownTraceError):
        read(archive, second)


def test_equal_traces_are_kept_once_and_until_everybody_has_deleted_theirs() -> None:
    archive = archive_of()
    digest = put(archive, TRACES[0])
    assert put(archive, TRACES[0]) == digest
    assert archive.state().num_bytes == SIZE
    archive.delete(digest)
    assert read(archive, digest) == TRACES[0]
    assert archive.state().deleted == 0
    archive.delete(digest)
    assert archive.state().deleted == 1
    for gone in (lambda: archive.delete(digest), lambda: read(archive, digest)):
        with pytest.raises(UnknownTraceError):
            gone()
    assert_consistent(archive)


def test_what_is_too_old_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(archive_module.time, "time", lambda: now)
    archive = archive_of(archive_seconds=60)
    kept, _ = archive.put(TRACES[0], "raw")
    assert archive.expires_at(kept) == 1060
    now = 1030
    later = put(archive, TRACES[1])
    now = 1059.9
    assert read(archive, kept.digest) == TRACES[0]
    now = 1060.1
    with pytest.raises(UnknownTraceError):
        archive.delete(kept.digest)
    assert read(archive, later) == TRACES[1]
    assert archive.state().expired == 1
    assert archive.state().unfetched == 0
    now = 2000
    assert (archive.state().expired, archive.state().unfetched, archive.state().traces) == (2, 0, 0)
    assert_consistent(archive)


def test_no_age_is_no_end() -> None:
    archive = archive_of(archive_seconds=0)
    assert archive.expires_at(archive.put(TRACES[0], "raw")[0]) is None
    assert archive.state().max_seconds is None


def test_one_larger_than_all_is_refused_and_harms_nothing() -> None:
    archive = archive_of(1)
    digest = put(archive, TRACES[0])
    with pytest.raises(QuotaError, match="archive-bytes"):
        put(archive, make_trace(list(range(100))))
    assert read(archive, digest) == TRACES[0]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(trace=routing_traces(), codec=st.sampled_from(codecs.NAMES))
def test_what_is_promised_room_before_it_is_computed_has_room(trace: RoutingTrace, codec: str) -> None:
    if codec not in codecs.usable(trace.layout):
        return
    archive = Archive(ServerConfig())
    size = archive.put(trace, codec)[0].size
    with pytest.raises(QuotaError, match="archive-bytes"):
        Archive(ServerConfig(archive_bytes=size - 1)).require_room_for(trace.layout, max(trace.num_tokens, 1))
    archive.require_room_for(trace.layout, trace.num_tokens)


def test_room_for_a_long_sequence_is_not_asked_for_twice() -> None:
    """48 layers * 8 of 128 * 32,768 tokens are 12.6 MB of ids."""
    layout = MoeLayout(tuple(range(48)), 128, 8)
    Archive(ServerConfig(archive_bytes=14 << 20)).require_room_for(layout, 1 << 15)
    with pytest.raises(QuotaError):
        Archive(ServerConfig(archive_bytes=12 << 20)).require_room_for(layout, 1 << 15)


def test_a_directory_outlives_its_server_and_is_bounded_at_once(tmp_path: Path) -> None:
    first = archive_of(archive=str(tmp_path))
    digests = [put(first, trace) for trace in TRACES[:4]]
    (tmp_path / "notes.txt").write_text("not ours")
    second = archive_of(3.5, archive=tmp_path.as_uri())
    assert (second.state().traces, second.state().evicted) == (3, 1)
    kept = [digest for digest in digests if (tmp_path / f"{digest}.safetensors").exists()]
    assert len(kept) == 3
    for digest in kept:
        assert read(second, digest) == TRACES[digests.index(digest)]
        second.delete(digest)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_somebody_else_removed_is_not_there(tmp_path: Path) -> None:
    archive = archive_of(archive=str(tmp_path))
    digest = put(archive, TRACES[0])
    (tmp_path / f"{digest}.safetensors").unlink()
    with pytest.raises(UnknownTraceError):
        read(archive, digest)
    assert archive.state().num_bytes == 0


def test_a_memory_store_that_nobody_has_is_said_at_the_start() -> None:
    with pytest.raises(StoreError, match="no memory store"):
        archive_of(archive="memory://nobody")


class Failing(MemoryStore):
    """A store that fails while it is told to."""

    failing: tuple[str, ...] = ()

    def write(self, name: str, data: bytes) -> None:
        if "write" in self.failing:
            raise OSError("no space left")
        super().write(name, data)

    def remove(self, name: str) -> None:
        if "remove" in self.failing:
            raise OSError("read-only")
        super().remove(name)


def test_a_store_that_fails_is_told_and_takes_no_room() -> None:
    archive = archive_of(2)
    store = archive._store = Failing("failing-archive")
    digest = put(archive, TRACES[0])
    store.failing = ("write",)
    with pytest.raises(ArchiveError, match=r"memory://failing-archive.*no space left"):
        put(archive, TRACES[1])
    assert_consistent(archive)
    store.failing = ("write", "remove")
    for fails in (lambda: put(archive, TRACES[1]), lambda: archive.delete(digest)):
        with pytest.raises(ArchiveError, match="read-only"):
            fails()
    store.failing = ()
    for trace in TRACES[2:6]:
        put(archive, trace)
    assert_consistent(archive)


class Slow(MemoryStore):
    """A store whose writes wait until they are let through."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.let, self.begun = threading.Event(), threading.Semaphore(0)

    def write(self, name: str, data: bytes) -> None:
        self.begun.release()
        assert self.let.wait(30)
        super().write(name, data)


def test_room_is_not_taken_from_what_is_being_written() -> None:
    archive = archive_of(2)
    store = archive._store = Slow("slow-archive")
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(put, archive, trace) for trace in TRACES[:2]]
        for _ in first:
            assert store.begun.acquire(timeout=30)
        third = pool.submit(put, archive, TRACES[2])
        assert not store.begun.acquire(timeout=0.2)  # it waits: there is no room, and nothing that could go
        assert archive.state().num_bytes == 2 * SIZE
        store.let.set()
        assert read(archive, third.result(30)) == TRACES[2]
    assert archive.state().evicted == 1
    assert_consistent(archive)


def test_deleted_while_it_is_given_out_again_it_goes_with_the_last() -> None:
    archive = archive_of(2)
    digest = put(archive, TRACES[0])
    store = Slow("slow-again")
    store.let.set()
    store.write(f"{digest}.safetensors", bytes(archive._store.source(f"{digest}.safetensors").read(0, SIZE)))
    store.begun.acquire()
    archive._store = store
    store.let.clear()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(put, archive, TRACES[0])
        assert store.begun.acquire(timeout=30)
        archive.delete(digest)
        archive.delete(digest)
        with pytest.raises(UnknownTraceError):
            archive.delete(digest)
        store.let.set()
        again.result(30)
    assert archive.state().traces == 0
    assert_consistent(archive)


class Watched(DirectoryStore):
    """A directory whose size is looked at whenever it has grown."""

    most = 0

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        self.most = max(self.most, sum(entry.size for entry in self.entries()))


def test_many_threads_never_pass_the_bound_and_never_read_what_is_not_whole(tmp_path: Path) -> None:
    archive = archive_of(6)
    store = archive._store = Watched(tmp_path, durable=False)

    def work(seed: int) -> int:
        rng, found, given = random.Random(seed), 0, list[tuple[str, RoutingTrace]]()
        for _ in range(150):
            trace = rng.choice(TRACES[:20])
            given.append((put(archive, trace), trace))
            digest, trace = rng.choice(given)
            try:
                if rng.random() < 0.4:
                    archive.delete(digest)
                else:
                    assert read(archive, digest) == trace
                    found += 1
            except UnknownTraceError:
                pass
        return found

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert 0 < store.most <= 6 * SIZE
    assert archive.state().evicted > 0
    assert_consistent(archive)


def test_what_a_server_that_died_left_half_written_does_not_stay(tmp_path: Path) -> None:
    part = tmp_path / f".left.{'0' * 32}"
    part.write_bytes(b"half")
    os.utime(part, (1, 1))
    archive_of(archive=str(tmp_path))
    assert not part.exists()
