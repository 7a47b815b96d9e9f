"""Every kind of store keeps the same small promise: named blobs, whole or not at all, and nothing outside."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from traces import refused

from moetrace.errors import StoreError
from moetrace.files import PART_PATTERN, whole_file
from moetrace.stores import DirectoryStore, MemoryStore, Store, open_store
from moetrace.stores.remote import RemoteStore
from moetrace.stores.shared import SharedMemoryStore

KINDS = ("memory", "directory", "shared", "fsspec")


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    kind = request.param
    made: Store
    if kind == "memory":
        made = MemoryStore(f"test-{uuid.uuid4().hex}")
    elif kind == "directory":
        made = DirectoryStore(tmp_path / "store")
    elif kind == "shared":
        made = SharedMemoryStore(f"test-{os.getpid()}")
    else:
        fsspec.filesystem("memory").store.clear()
        made = RemoteStore("memory://bucket/folder")
    yield made
    made.close()


every_kind = pytest.mark.parametrize("store", KINDS, indirect=True)


def content(store: Store, name: str, start: int = 0, stop: int | None = None) -> bytes:
    source = store.source(name)
    try:
        return bytes(source.read(start, source.size if stop is None else stop))
    finally:
        source.close()


@every_kind
def test_a_blob_comes_back_whole_and_in_parts(store: Store) -> None:
    store.write("a.b-c_1", b"0123456789")
    assert content(store, "a.b-c_1") == b"0123456789"
    assert content(store, "a.b-c_1", 2, 5) == b"234"
    store.write("a.b-c_1", b"new")
    assert content(store, "a.b-c_1") == b"new"
    store.write("empty", b"")
    assert content(store, "empty") == b""


@every_kind
def test_entries_say_name_size_and_age(store: Store) -> None:
    assert store.entries() == []
    before = time.time()
    store.write("two", b"22")
    store.write("one", b"1")
    entries = store.entries()
    assert [(entry.name, entry.size) for entry in entries] == [("one", 1), ("two", 2)]
    assert all(before - 2 <= entry.modified <= time.time() + 2 for entry in entries)


@every_kind
def test_what_was_removed_is_gone(store: Store) -> None:
    store.write("a", b"1")
    store.remove("a")
    store.remove("a")
    assert store.entries() == []
    with refused(StoreError, f"there is no 'a' in {store.uri}", fix="removed, or has expired"):
        store.source("a")


BAD_NAMES = [
    "",
    ".",
    "..",
    "../up",
    "/etc/passwd",
    "a/b",
    ".hidden",
    "-option",
    "a\\b",
    "a\0b",
    "a b",
    "é",
    "x" * 201,
    "a\n",
]


@every_kind
@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_path_traversal_and_odd_names_are_refused(store: Store, name: str) -> None:
    for use in (lambda: store.write(name, b""), lambda: store.source(name), lambda: store.remove(name)):
        with refused(StoreError, "the name cannot be used", expected="1 to 200 letters", got=repr(name)):
            use()
    assert store.entries() == []


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_store_in_memory_cannot_be_named_so(name: str) -> None:
    for kind in (MemoryStore, SharedMemoryStore):
        with refused(StoreError, "the name cannot be used"):
            kind(name)


# --- directories ---


def test_symlinks_are_neither_read_nor_listed_nor_written_through(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    store = DirectoryStore(tmp_path / "store")
    (store.path / "link").symlink_to(secret)
    with refused(StoreError, "is a symbolic link", expected="a plain file", fix="Remove it"):
        store.source("link")
    assert store.entries() == []
    store.write("link", b"ours")
    assert content(store, "link") == b"ours"
    assert secret.read_bytes() == b"secret"
    (store.path / "dangling").symlink_to(tmp_path / "nowhere")
    with refused(StoreError, "is a symbolic link"):
        store.source("dangling")


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_plain_file_is_not_read(kind: str, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / "odd").mkdir() if kind == "directory" else os.mkfifo(tmp_path / "odd")
    with refused(StoreError, "is not a plain file"):
        store.source("odd")
    assert store.entries() == []


def test_what_a_dead_writer_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.write("kept", b"1")
    old, new = f".old.{'0f' * 16}", f".new.{'a1' * 16}"
    for name, age in ((old, 7200), (new, 0), (".config.yaml", 7200)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert store.entries() == [entry for entry in store.entries() if entry.name == "kept"]
    assert store.sweep() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.yaml", new, "kept"]


def test_what_is_half_written_has_the_name_that_is_swept(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.b"):
        assert [path.name for path in tmp_path.glob(PART_PATTERN)] == [path.name for path in tmp_path.iterdir()]
        assert list(tmp_path.glob(PART_PATTERN))


WRITER = """
import sys
from moetrace.stores import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for i in range(300):
    store.write("same", bytes([int(sys.argv[2])]) * (1 + 977 * i % 50_000))
"""


def test_concurrent_writers_of_one_name_never_mix(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, durable=False)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE) for i in (1, 2)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        data = content(store, "same") if store.entries() else b""
        assert len(set(data)) <= 1
        seen |= set(data)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen == {1, 2}
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()


# --- shared memory ---


def test_shared_memory_is_shared_and_the_last_to_leave_removes_it() -> None:
    name = f"both-{os.getpid()}"
    with SharedMemoryStore(name) as mine:
        mine.write("a", b"1")
        theirs = SharedMemoryStore(name)
        assert content(theirs, "a") == b"1"
        assert mine.path.stat().st_mode & 0o077 == 0
        theirs.close()
        theirs.close()
        assert content(mine, "a") == b"1"
    assert not mine.path.exists()


HOLDER = """
import sys
from moetrace.stores.shared import SharedMemoryStore
store = SharedMemoryStore(sys.argv[1])
store.write("a", b"1" * 1000)
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_in_shared_memory_is_cleaned_up() -> None:
    name = f"crash-{os.getpid()}"
    command = [sys.executable, "-c", HOLDER, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        other = SharedMemoryStore(f"other-{os.getpid()}")
        path = other.path.parent / other.path.name.replace("other", "crash")
        assert (path / "a").exists()  # still held, so opening another store has not swept it
        process.kill()
    assert (path / "a").exists()
    other.close()
    SharedMemoryStore(f"other-{os.getpid()}").close()
    assert not path.exists()


FORKING = """
import os, sys
from moetrace.stores.shared import SharedMemoryStore
store = SharedMemoryStore(sys.argv[1])
store.write("a", b"1")
other = SharedMemoryStore(sys.argv[1] + "-other")


def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0 if work.done else 1)
    return child


def gives_back():
    store.close()
    gives_back.done = True


def goes_on():
    assert len(os.listdir("/proc/self/fd")) == files + 2, "the parent's lock is none of the child's"
    os.read(parent_has_closed[0], 1)
    assert bytes(store.source("a").read(0, 1)) == b"1"
    store.write("b", b"2")
    assert os.waitpid(forked(gives_back), 0)[1] == 0  # whose parent is itself a child
    assert [entry.name for entry in store.entries()] == ["a", "b"]
    store.close()
    goes_on.done = not store.path.exists()


gives_back.done = goes_on.done = False
assert os.waitpid(forked(gives_back), 0)[1] == 0
assert [entry.name for entry in store.entries()] == ["a"], "a child that gives it back does not remove it"
other.close()
assert not other.path.exists(), "no child has it open any more"
files = len(os.listdir("/proc/self/fd"))
parent_has_closed = os.pipe()
child = forked(goes_on)
assert len(os.listdir("/proc/self/fd")) == files + 2
store.close()
os.write(parent_has_closed[1], b".")
assert os.waitpid(child, 0)[1] == 0, "the child had it open, and was the last"
"""


def test_shared_memory_lives_as_long_as_a_forked_process_has_it_open() -> None:
    name = f"fork-{os.getpid()}"
    subprocess.run([sys.executable, "-c", FORKING, name], check=True, timeout=60)


def test_shared_memory_that_was_pickled_is_opened_again() -> None:
    with SharedMemoryStore(f"pickled-{os.getpid()}") as mine:
        mine.write("a", b"1")
        theirs = pickle.loads(pickle.dumps(mine))
        theirs.close()
        assert content(mine, "a") == b"1"
        theirs = pickle.loads(pickle.dumps(mine))
    assert content(theirs, "a") == b"1"
    theirs.close()
    assert not mine.path.exists()


def test_a_name_that_somebody_else_has_taken_is_refused(tmp_path: Path) -> None:
    store = SharedMemoryStore(f"taken-{os.getpid()}")
    store.close()
    store.path.symlink_to(tmp_path)
    try:
        with refused(StoreError, "belongs to somebody else"):
            SharedMemoryStore(f"taken-{os.getpid()}")
    finally:
        store.path.unlink()
    assert list(tmp_path.iterdir()) == []


# --- by URI ---


def test_a_store_is_opened_by_its_uri(tmp_path: Path) -> None:
    memory = MemoryStore("found")
    shared = SharedMemoryStore(f"found-{os.getpid()}")
    for made in (memory, shared, DirectoryStore(tmp_path / "with space#?%"), RemoteStore(f"local://{tmp_path}/remote")):
        made.write("a", b"1")
        found = open_store(made.uri)
        assert content(found, "a") == b"1"
        assert found.uri == made.uri
        found.close()
    shared.close()
    assert open_store(str(tmp_path)).uri == tmp_path.as_uri()


def test_stores_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with refused(StoreError, "no memory store 'nobody' in this process", fix="a directory or shm://"):
        open_store("memory://nobody")
    with refused(StoreError, "there is no directory", fix="another host"):
        open_store(str(tmp_path / "none"), create=False)
    for uri in ("no-such-thing://x", "file://[x", "file://data/routes"):
        with refused(StoreError, "cannot be opened"):
            open_store(uri)
    first = MemoryStore("once")
    with refused(StoreError, "is open already"):
        MemoryStore("once")
    assert MemoryStore.named("once") is first
