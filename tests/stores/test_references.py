"""A reference is resolved by any process to exactly what it was made for, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from traces import make_trace, refused

from moetrace.errors import FormatError, QuotaError, StoreError
from moetrace.format import save
from moetrace.stores import DirectoryStore, MemoryStore, Reference, Store, TraceStore, open_reference, resolve
from moetrace.stores.remote import RemoteStore
from moetrace.stores.shared import SharedMemoryStore

TRACES = [make_trace(range(50), seed=seed, fingerprint="f", versions=[(0, "a"), (7, "b")]) for seed in range(3)]
ELSEWHERE = """
import sys
from moetrace.stores import resolve
for text in sys.argv[1:]:
    traces = resolve(text)
    print(len(traces), traces[-1].token_sha256, traces[-1].experts_TLK.sum(), traces[-1].weight_version(8))
"""


@pytest.mark.parametrize("place", ["dir", Path("dir")], ids=repr)
def test_a_place_is_no_store(place: Any) -> None:
    with refused(StoreError, "no store yet", expected="a Store", got=repr(place), fix="open_store"):
        TraceStore(place)


def test_a_reference_is_resolved_in_another_process(tmp_path: Path) -> None:
    shared = SharedMemoryStore(f"references-{os.getpid()}")
    kinds: list[Store] = [DirectoryStore(tmp_path / "a b"), shared, RemoteStore(f"local://{tmp_path}/remote")]
    references = [TraceStore(store).put(TRACES) for store in kinds]
    command = [sys.executable, "-c", ELSEWHERE, *map(str, references)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    last = TRACES[-1]
    assert lines == [f"3 {last.token_sha256} {last.experts_TLK.sum()} b"] * 3
    shared.close()


@pytest.mark.parametrize("codec", ["auto", "raw", "bits", "set"])
def test_every_fact_survives_a_store(codec: str) -> None:
    memory = MemoryStore("facts")
    reference = TraceStore(memory, codec=codec).put(TRACES)
    assert resolve(reference) == [trace.as_set() if codec == "set" else trace for trace in TRACES]
    with open_reference(str(reference)) as container:
        assert container[1].order == ("set" if codec == "set" else "rank")


def test_a_reference_survives_being_a_string() -> None:
    for reference in (Reference("s3://bucket/a.b", "0f" * 32), Reference("file:///a%23b/c", "a1" * 32, (5, 99))):
        assert Reference.parse(str(reference)) == reference
    assert str(Reference("shm://x/y", "00" * 32, (1, 2))) == f"shm://x/y?bytes=1-2#{'00' * 32}"


@pytest.mark.parametrize(
    "text", ["", "x", "file:///x", "file:///x#12", f"#{'0' * 64}", f"a?bytes=1#{'0' * 64}", f"a#{'G' * 64}"]
)
def test_a_text_that_is_no_reference_is_refused(text: str) -> None:
    with refused(StoreError, "the text is not a reference", expected="#SHA-256", got=repr(text)):
        resolve(text)


def test_a_reference_to_something_else_is_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    reference = TraceStore(store).put(TRACES)
    name = reference.uri.rpartition("/")[2]
    store.write(name, save(TRACES[:2]))
    with refused(StoreError, "leads to something else", expected=reference.digest, fix="a new reference"):
        resolve(reference)
    store.write(name, save(TRACES)[:-1])
    with refused(FormatError, "end elsewhere"):
        resolve(reference)
    store.remove(name)
    with refused(StoreError, f"there is no {name!r}"):
        resolve(reference)
    with refused(StoreError, "past the end"):
        resolve(Reference(TraceStore(store).put(TRACES).uri, reference.digest, (0, 10**9)))
    for uri in (f"{store.uri}/../{tmp_path.name}/..", f"{store.uri}/%2e%2e", "/etc/passwd"):
        with pytest.raises((StoreError, FormatError)):
            resolve(Reference(uri, reference.digest))


def test_a_reference_bounds_what_resolving_it_takes(tmp_path: Path) -> None:
    reference = TraceStore(DirectoryStore(tmp_path)).put([make_trace(range(5000))] * 3)
    with refused(FormatError, "the container is larger than the limit"):
        resolve(reference, max_bytes=1 << 18)
    with open_reference(reference, max_bytes=1 << 18) as container:
        assert container[2] == make_trace(range(5000))


# --- bounds ---


def test_equal_traces_are_kept_once(tmp_path: Path) -> None:
    store = TraceStore(DirectoryStore(tmp_path))
    assert store.put(TRACES) == store.put(TRACES) != store.put(TRACES[:1])
    assert len(store.references()) == 2
    assert sorted(store.references(), key=str) == store.references()
    assert [len(resolve(reference)) for reference in sorted(store.references(), key=lambda r: len(resolve(r)))] == [
        1,
        3,
    ]


def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    room = len(save(TRACES[0])) * 2 + 10
    store = TraceStore(DirectoryStore(tmp_path), quota=room)
    kept = [store.put(trace) for trace in TRACES[:2]]
    with refused(QuotaError, "is full", expected=f"at most {room} bytes", fix="raise the quota"):
        store.put(TRACES[2])
    assert [resolve(reference) for reference in kept] == [[trace] for trace in TRACES[:2]]
    assert store.put(TRACES[0]) == kept[0]  # which is there already, and takes no more room
    store.store.remove(kept[0].uri.rpartition("/")[2])
    assert resolve(store.put(TRACES[2])) == [TRACES[2]]


def test_writers_that_pass_the_quota_together_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = DirectoryStore(tmp_path)
    store = TraceStore(directory, quota=len(save(TRACES[0])) + 10)
    write = directory.write

    def another_writes_too(name: str, data: bytes) -> None:
        write(name, data)
        write("another", save(TRACES[1]))

    monkeypatch.setattr(directory, "write", another_writes_too)
    with refused(QuotaError, "is full"):
        store.put(TRACES[0])
    assert [entry.name for entry in directory.entries()] == ["another"]


def test_what_was_there_already_stays_though_others_pass_the_quota_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = DirectoryStore(tmp_path)
    store = TraceStore(directory, quota=len(save(TRACES[0])) + 10)
    given = store.put(TRACES[0])
    write = directory.write

    def another_writes_too(name: str, data: bytes) -> None:
        write(name, data)
        write("another", save(TRACES[1]))

    monkeypatch.setattr(directory, "write", another_writes_too)
    assert store.put(TRACES[0]) == given
    assert resolve(given) == [TRACES[0]]


def test_what_is_too_old_expires(tmp_path: Path) -> None:
    store = TraceStore(DirectoryStore(tmp_path), max_age_s=100, quota=len(save(TRACES[0])) + 10)
    old = store.put(TRACES[0])
    assert store.expire() == []
    path = tmp_path / old.uri.rpartition("/")[2]
    os.utime(path, (time.time() - 101,) * 2)
    new = store.put(TRACES[1])  # for which there is room only because the old one has expired
    assert store.references() == [new]
    assert TraceStore(DirectoryStore(tmp_path)).expire() == []


def test_only_containers_expire(tmp_path: Path) -> None:
    store = TraceStore(DirectoryStore(tmp_path), max_age_s=100)
    kept = store.put(TRACES[0])
    name = kept.uri.rpartition("/")[2]
    others = {"model-00001.safetensors", "run.jsonl", name.removesuffix(".safetensors"), f"{name}.bak", f"x{name[1:]}"}
    for path in (tmp_path / other for other in others):
        path.write_bytes(b"somebody else's")
        os.utime(path, (time.time() - 101,) * 2)
    store.put(TRACES[1])
    assert others < {path.name for path in tmp_path.iterdir()}
    assert [reference.digest for reference in store.references()] == sorted({kept.digest, store.put(TRACES[1]).digest})
    os.utime(tmp_path / name, (time.time() - 101,) * 2)
    assert [entry.name for entry in store.expire()] == [name]
    assert others < {path.name for path in tmp_path.iterdir()}


def test_expiry_without_times_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryStore("timeless")
    memory.write("a", b"")
    entries = [entry._replace(modified=float("nan")) for entry in memory.entries()]
    monkeypatch.setattr(memory, "entries", lambda: entries)
    with refused(StoreError, "does not say when", fix="without max_age_s"):
        TraceStore(memory, max_age_s=1).put(TRACES)
