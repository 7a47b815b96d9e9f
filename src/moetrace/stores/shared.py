"""A store in shared memory, between the processes of one host."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from moetrace.errors import StoreError
from moetrace.stores.base import require_name
from moetrace.stores.directory import DirectoryStore

ROOT = Path("/dev/shm")
_LOCK = ".lock"


class SharedMemoryStore(DirectoryStore):
    """A directory of the host's memory file system that lives as long as a process has it open.

    Every process that has it open holds a lock, which the kernel takes back when that process ends, however it ends.
    Who closes the store last removes it; what a crash has left is removed when any store is opened next. A process that
    is forked has the stores of its parent open too, until it closes them or ends.
    """

    def __init__(self, name: str) -> None:
        """Open the store of that name, made if no process of this user has it open.

        Raises:
            StoreError: there is no shared memory here, or somebody else has taken the name.
        """
        if not ROOT.is_dir():
            raise StoreError("there is no shared memory on this host", expected=f"a directory {ROOT}", got="none")
        sweep_shared_memory()
        path = _path_of(name)
        self._lock: int | None = _join(path)
        self._lock_of_fork: int | None = None
        super().__init__(path, durable=False)
        self.uri = f"shm://{name}"
        with _FORKING:
            _OPEN.add(self)

    def close(self) -> None:
        """Let go of the store; the last process to do so removes it."""
        with _FORKING:
            _OPEN.discard(self)
            lock, self._lock = self._lock, None
        if lock is not None:
            _leave(self.path, lock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Whoever unpickles it opens it: a lock does not travel."""
        return SharedMemoryStore, (self.uri.removeprefix("shm://"),)

    def __enter__(self) -> SharedMemoryStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_FORKING = threading.RLock()
"""Held while a process forks, and by who changes what must not change meanwhile."""
_OPEN: WeakSet[SharedMemoryStore] = WeakSet()


def _before_fork() -> None:
    """Take locks for the child: those of this process would be one with the child's, so that either could take the
    other's for its own alone, and remove a store that is in use. Before, because afterwards the parent may be gone."""
    _FORKING.acquire()
    for store in _OPEN:
        with suppress(FileNotFoundError):  # somebody has removed it by hand
            store._lock_of_fork = os.open(store.path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            fcntl.flock(store._lock_of_fork, fcntl.LOCK_SH)


def _after_fork_in_parent() -> None:
    for store in _OPEN:
        if store._lock_of_fork is not None:
            os.close(store._lock_of_fork)
            store._lock_of_fork = None
    _FORKING.release()


def _after_fork_in_child() -> None:
    for store in _OPEN:
        if store._lock is not None:
            os.close(store._lock)
        store._lock, store._lock_of_fork = store._lock_of_fork, None
    _FORKING.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def sweep_shared_memory() -> int:
    """Remove this user's stores that no process has open any more; returns how many that were."""
    removed = 0
    for path in ROOT.glob(f"{_prefix()}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # just being made, just removed, or not ours
            continue
        removed += _leave(path, lock)
    return removed


def _prefix() -> str:
    return f"moetrace-{os.getuid()}-"


def _path_of(name: str) -> Path:
    return ROOT / f"{_prefix()}{require_name(name)}"


def _join(path: Path) -> int:
    """The file descriptor of a shared lock on the store at `path`, which is made where needed."""
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise StoreError(f"{path} belongs to somebody else", fix="Choose another name.")
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # its last user removed it meanwhile
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if os.fstat(lock).st_ino == (path / _LOCK).lstat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _leave(path: Path, lock: int) -> bool:
    """Close a lock; remove the store if nobody else holds one. Whether it was removed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(lock)
