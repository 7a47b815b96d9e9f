"""A store in this process's memory."""

from __future__ import annotations

import threading
import time
from weakref import WeakValueDictionary

from moetrace.container import BytesSource
from moetrace.errors import StoreError
from moetrace.stores.base import Entry, missing, require_name

_OPEN: WeakValueDictionary[str, MemoryStore] = WeakValueDictionary()


class MemoryStore:
    """Blobs in a dict, for as long as somebody in this process holds the store. `MemoryStore.named` finds it again."""

    def __init__(self, name: str) -> None:
        """Make the store of that name.

        Raises:
            StoreError: there is one already.
        """
        self.uri = f"memory://{require_name(name)}"
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        if _OPEN.setdefault(name, self) is not self:
            raise StoreError(f"the memory store {name!r} is open already", fix="Find it by MemoryStore.named(name).")

    @staticmethod
    def named(name: str) -> MemoryStore:
        """The open store of that name, in this process."""
        store = _OPEN.get(name)
        if store is None:
            raise StoreError(
                f"there is no memory store {name!r} in this process",
                fix="Only the process that made it sees it; use a directory or shm:// between processes.",
            )
        return store

    def write(self, name: str, data: bytes) -> None:
        with self._lock:
            self._blobs[require_name(name)] = bytes(data), time.time()

    def source(self, name: str) -> BytesSource:
        blob = self._blobs.get(require_name(name))
        if blob is None:
            raise missing(name, self.uri)
        return BytesSource(blob[0])

    def remove(self, name: str) -> None:
        with self._lock:
            self._blobs.pop(require_name(name), None)

    def entries(self) -> list[Entry]:
        with self._lock:
            return [Entry(name, len(data), modified) for name, (data, modified) in sorted(self._blobs.items())]

    def close(self) -> None:
        pass
