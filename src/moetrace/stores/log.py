"""Append traces while a rollout runs: a directory of shards whose every finished trace survives a crash at any byte.

A writer makes a shard of its own and never touches another, so writers need no locks between them and a crash needs no
repair: readers believe an index as far as its lines are whole, then look for whole records after the last one in the
shard. `records.py` says what they look like.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moetrace import codecs
from moetrace.container import MAX_BYTES, BytesSource, Container
from moetrace.errors import QuotaError, StoreError
from moetrace.files import sync_directory
from moetrace.format import save
from moetrace.layout import as_int
from moetrace.stores.base import Reference, require_name
from moetrace.stores.directory import DirectoryStore, open_plain
from moetrace.stores.records import INDEX, SHARD, line_of, read_record, records_of
from moetrace.trace import RoutingTrace

_NAME = re.compile(rf"\d{{20}}-\d+-[0-9a-f]{{8}}{re.escape(SHARD)}")
"""What a writer calls its shards, see `_OpenShard`; what has another name is not removed."""


class LogWriter:
    """Appends traces to a directory. Any number of writers may, each into its own shards. Not for several threads; a
    process that was forked meanwhile begins a shard of its own."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codec: str = codecs.AUTO,
        shard_bytes: int = 1 << 28,
        quota: int | None = None,
        durable: bool = True,
    ) -> None:
        """Open a log for appending, making its directory if there is none.

        Args:
            path: the directory.
            codec: see `save`.
            shard_bytes: begin a new shard after so many bytes.
            quota: bytes that all shards of the directory may take together; None for no bound. Writers that append at
                the same moment may pass it by what they are appending.
            durable: `append` returns when the disk has the trace, so that it survives a loss of power too.
        """
        self._directory = DirectoryStore(path)
        self.path = self._directory.path
        self._codec, self._shard_bytes, self._quota, self._durable = codec, shard_bytes, quota, durable
        self._shard: _OpenShard | None = None

    def append(self, trace: RoutingTrace, name: str = "trace") -> Reference:
        """Keep a trace; when this returns, it is finished and no crash can lose it.

        Args:
            trace: what to keep.
            name: by which a reader may look for it, such as a request id; need not be unique.

        Raises:
            QuotaError: it would pass the quota.
            OSError: the disk is full, or the like. The trace is not kept; the next one goes to a new shard.
        """
        require_name(name)
        data = save(trace, codec=self._codec)
        digest = Container(BytesSource(data)).digest
        self._require_room(len(data))
        if self._shard is not None and self._shard.pid != os.getpid():  # another process goes on with that one
            self.close()
        shard = self._shard = self._shard or _OpenShard(self.path, self._durable)
        try:
            start = shard.append(data, digest, name)
        except BaseException:
            self.close()  # whatever was written of it ends this shard
            raise
        if shard.end >= self._shard_bytes:
            self.close()
        return Reference((self.path / shard.name).as_uri() + SHARD, digest, (start, start + len(data)))

    def close(self) -> None:
        """Close the shard that is being written; another `append` would begin a new one."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open shard: who unpickles it begins one of its own."""
        return self.__dict__ | {"_shard": None}

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_room(self, more: int) -> None:
        if self._quota is None:
            return
        used = sum(entry.size for entry in self._directory.entries() if entry.name.endswith(SHARD))
        if used + more > self._quota:
            raise QuotaError(
                f"the log {self.path} is full",
                expected=f"at most {self._quota} bytes",
                got=f"{used} kept and {more} more",
                fix="Let expire() remove old shards, or raise the quota.",
            )


class TraceLog:
    """Reads a directory that writers append to, also while they do: `len`, `log[i]`, iteration, `find`.

    Attributes:
        records: what was finished when the log was opened or refreshed; shards by age, records as appended.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        """Open a log for reading.

        Args:
            path: the directory.
            max_bytes: see `load`; for each trace.

        Raises:
            StoreError: there is no such directory.
        """
        self.path = Path(path).resolve()
        self._max_bytes = max_bytes
        if not self.path.is_dir():
            raise StoreError(f"there is no log {self.path}", expected="a directory of shards")
        self.refresh()

    def refresh(self) -> None:
        """See what has been finished since."""
        self.records = [record for path in sorted(self.path.glob(f"*{SHARD}")) for record in records_of(path)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> RoutingTrace:
        """Trace i, read and checked now.

        Raises:
            FormatError: it is damaged.
            InvalidTraceError: that is no number.
            IndexError: there is no such trace.
        """
        record = self.records[as_int(i, "the number of a trace")]
        source = open_plain(self.path / record.shard, self.path.as_uri())
        try:
            return read_record(source, record, self._max_bytes)
        finally:
            source.close()

    def __iter__(self) -> Iterator[RoutingTrace]:
        return (self[i] for i in range(len(self)))

    def find(self, name: str) -> list[RoutingTrace]:
        """All traces that were appended under a name."""
        return [self[i] for i, record in enumerate(self.records) if record.name == name]

    def reference(self, i: int) -> Reference:
        """A reference to trace i, see `resolve`."""
        record = self.records[i]
        return Reference((self.path / record.shard).as_uri(), record.digest, (record.start, record.stop))

    def expire(self, max_age_s: float) -> list[str]:
        """Remove the shards that no writer has open and that were written last before so many seconds; their names."""
        removed = []
        for path in sorted(path for path in self.path.glob(f"*{SHARD}") if _NAME.fullmatch(path.name)):
            with suppress(FileNotFoundError), _unless_written(path) as free:  # another process may remove it first
                if free and path.stat().st_mtime < time.time() - max_age_s:
                    path.unlink()
                    path.with_suffix(INDEX).unlink(missing_ok=True)
                    removed.append(path.name)
        self.refresh()
        return removed


class _OpenShard:
    """A shard that is being written, and its index."""

    def __init__(self, directory: Path, durable: bool) -> None:
        self.pid = os.getpid()
        self.name = f"{time.time_ns():020d}-{self.pid}-{secrets.token_hex(4)}"
        self.end = 0
        self._durable = durable
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_APPEND
        self._shard = os.open(directory / (self.name + SHARD), flags, 0o666)
        fcntl.flock(self._shard, fcntl.LOCK_SH)  # see `expire`
        self._index = os.open(directory / (self.name + INDEX), flags, 0o666)
        if durable:
            sync_directory(directory)

    def append(self, data: bytes, digest: str, name: str) -> int:
        """Write a record and then its line in the index; returns where its container begins."""
        line = line_of(self.end, len(data), digest, name)
        for file, part in ((self._shard, line + data), (self._index, line)):
            _write_all(file, part)
            if self._durable:
                os.fsync(file)
        start = self.end + len(line)
        self.end = start + len(data)
        return start

    def close(self) -> None:
        os.close(self._index)
        os.close(self._shard)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextmanager
def _unless_written(path: Path) -> Iterator[bool]:
    """Whether no writer has a shard open; none can open it within."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)
