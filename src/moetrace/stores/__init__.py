"""Where traces are kept: in memory, a directory, shared memory, anything fsspec reaches, or an append-only log."""

from moetrace.stores.base import Entry, Reference, Store
from moetrace.stores.directory import DirectoryStore
from moetrace.stores.log import LogWriter, TraceLog
from moetrace.stores.memory import MemoryStore
from moetrace.stores.opening import open_store
from moetrace.stores.traces import TraceStore, open_reference, resolve

__all__ = [
    "DirectoryStore",
    "Entry",
    "LogWriter",
    "MemoryStore",
    "Reference",
    "Store",
    "TraceLog",
    "TraceStore",
    "open_reference",
    "open_store",
    "resolve",
]
