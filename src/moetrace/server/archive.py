"""What clients were given references to: containers by digest, bounded in bytes and age. Used from worker threads."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile

from moetrace.container import BytesSource, Container, Source
from moetrace.container.header import TraceHeader
from moetrace.errors import ArchiveError, QuotaError, StoreError, UnknownTraceError
from moetrace.format import save
from moetrace.layout import MoeLayout
from moetrace.server.config import ServerConfig
from moetrace.stores import DirectoryStore, MemoryStore, Store, open_store
from moetrace.stores.traces import NAME, SUFFIX
from moetrace.trace import RoutingTrace

_OVERHEAD = 1 << 16
"""More than a container's headers and what zstd adds at worst, for usual models."""


@dataclass(frozen=True)
class Kept:
    """One container that is kept.

    Attributes:
        digest: `Container.digest`, its name.
        size: bytes.
        since: when it was last given out, in seconds since 1970.
        givings: how many were given it and have not deleted it.
        fetched: whether anybody has read it.
    """

    digest: str
    size: int
    since: float
    givings: int = 1
    fetched: bool = False


@dataclass(frozen=True)
class ArchiveState:
    """What is kept, what bounds it, and what became of the rest.

    Attributes:
        traces, num_bytes: what is kept.
        max_bytes, max_seconds: the bounds; None for no age.
        deleted: containers that those who were given them deleted.
        expired: containers that grew too old.
        evicted: containers that had to go for newer ones.
        unfetched: of the expired and evicted, those that nobody had read.
    """

    traces: int
    num_bytes: int
    max_bytes: int
    max_seconds: float | None
    deleted: int = 0
    expired: int = 0
    evicted: int = 0
    unfetched: int = 0


class Archive:
    """Containers in a store, each under its digest; equal ones are kept once. They never take more than
    `archive_bytes`: the oldest go.

    Unlike `TraceStore`, which refuses what does not fit, an archive forgets: whoever waits for a new trace is there,
    and whoever was given an old one had time to fetch it. It knows what it keeps without asking the store, so no other
    process may write there; what an earlier process left counts from the start.

    Args:
        config: where, how many bytes, how long.

    Raises:
        StoreError: the store cannot be opened.
    """

    def __init__(self, config: ServerConfig) -> None:
        uri = config.archive
        self._store: Store = MemoryStore(f"archive-{uuid.uuid4().hex}") if uri is None else open_store(uri)
        if isinstance(self._store, DirectoryStore):
            self._store.sweep()
        self._max_bytes, self._max_seconds = config.archive_bytes, config.archive_seconds or None
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # oldest first
        self._writing: dict[str, int] = {}
        self._num_bytes = 0
        self._ends = {"deleted": 0, "expired": 0, "evicted": 0, "unfetched": 0}
        self._changed = threading.Condition()
        with self._changed:
            self._find_earlier()
            self._make_room(0)

    def require_room_for(self, layout: MoeLayout, num_tokens: int) -> None:
        """Raise `QuotaError` unless the rows of so many tokens fit, in any codec: said before they are computed."""
        worst = num_tokens * (layout.row_bytes + layout.row_bytes // 128 + 5) + _OVERHEAD
        if worst > self._max_bytes:
            raise QuotaError(
                "the routes of this request may be larger than all that the server keeps",
                expected=f"at most {self._max_bytes} bytes",
                got=f"up to {worst}",
                fix='Ask for fewer tokens or "return_routed_experts": true, or raise --archive-bytes.',
            )

    def put(self, trace: RoutingTrace, codec: str) -> tuple[Kept, TraceHeader]:
        """Keep a trace; returns when it can be fetched.

        Raises:
            QuotaError: it alone is larger than the archive.
            ArchiveError: the store failed.
            FormatError: the codec cannot hold the trace.
        """
        data = save(trace, codec=codec)
        container = Container(BytesSource(data))
        digest, size = container.digest, len(data)
        with self._changed:
            before = self._kept.get(digest)
            if before is None:
                self._make_room(size)
                before = self._kept.get(digest)  # another may have given it out while this one waited for room
            givings = 1 if before is None else before.givings + 1
            kept = Kept(digest, size, time.time(), givings, before is not None and before.fetched)
            self._num_bytes += size if before is None else 0
            self._kept[digest] = kept
            self._kept.move_to_end(digest)
            self._writing[digest] = self._writing.get(digest, 0) + 1
        try:
            self._store.write(digest + SUFFIX, data)  # also where it is kept already: its file's age is that of `since`
        except Exception as error:
            with self._changed:
                self._give_back(digest)
            raise ArchiveError(f"{self._store.uri} did not take a trace", got=repr(error)) from error
        finally:
            with self._changed:
                self._writing[digest] -= 1
                if not self._writing[digest]:
                    del self._writing[digest]
                    if digest in self._kept and not self._kept[digest].givings:
                        self._forget(digest)
                self._changed.notify_all()
        return kept, container.headers[0]

    @contextmanager
    def open(self, digest: str, *, fetch: bool) -> Iterator[tuple[Kept, Source]]:
        """What is kept under a digest, opened for reading; `fetch` notes that somebody has read it.

        Raises:
            UnknownTraceError: nothing is.
        """
        with self._changed:
            self._expire()
            kept = self._require(digest)
            try:
                source = self._store.source(digest + SUFFIX)
            except StoreError as error:  # not written yet, or removed by somebody else
                if digest not in self._writing:
                    self._drop(digest)
                raise _unknown(digest) from error
            if fetch:
                self._kept[digest] = replace(kept, fetched=True)
        try:
            yield kept, source
        finally:
            source.close()

    def delete(self, digest: str) -> None:
        """One of those who were given it needs it no more; with the last of them it goes.

        Raises:
            UnknownTraceError: nothing is kept under it.
        """
        with self._changed:
            self._expire()
            self._require(digest)
            self._give_back(digest)
            self._ends["deleted"] += digest not in self._kept or not self._kept[digest].givings

    def state(self) -> ArchiveState:
        """What is kept now."""
        with self._changed:
            self._expire()
            return ArchiveState(len(self._kept), self._num_bytes, self._max_bytes, self._max_seconds, **self._ends)

    def expires_at(self, kept: Kept) -> float | None:
        """When it will be too old, in seconds since 1970, if nobody is given it again; None: never."""
        return None if self._max_seconds is None else kept.since + self._max_seconds

    def close(self) -> None:
        """Give back what the store holds open."""
        self._store.close()

    # From here on: with the lock held.

    def _find_earlier(self) -> None:
        now = time.time()
        found = [(entry, NAME.fullmatch(entry.name)) for entry in self._store.entries()]
        for entry, name in sorted(found, key=lambda pair: pair[0].modified):
            if name is not None:
                since = now if math.isnan(entry.modified) else min(entry.modified, now)
                self._kept[name["digest"]] = Kept(name["digest"], entry.size, since)
                self._num_bytes += entry.size

    def _require(self, digest: str) -> Kept:
        kept = self._kept.get(digest)
        if kept is None or not kept.givings:
            raise _unknown(digest)
        return kept

    def _make_room(self, size: int) -> None:
        if size > self._max_bytes:
            raise QuotaError(
                "the trace is larger than all that the server keeps",
                expected=f"at most {self._max_bytes} bytes",
                got=size,
                fix="Raise --archive-bytes.",
            )
        self._expire()
        while self._num_bytes + size > self._max_bytes:
            oldest = next((digest for digest in self._kept if digest not in self._writing), None)
            if oldest is None:
                self._changed.wait()  # all that is kept is being written: one of them is done soon
                continue
            self._end(oldest, "evicted")

    def _expire(self) -> None:
        if self._max_seconds is None:
            return
        before = time.time() - self._max_seconds
        old = takewhile(lambda kept: kept.since < before, self._kept.values())
        for digest in [kept.digest for kept in old if kept.digest not in self._writing]:
            self._end(digest, "expired")

    def _end(self, digest: str, how: str) -> None:
        unfetched = not self._kept[digest].fetched
        self._forget(digest)
        self._ends[how] += 1
        self._ends["unfetched"] += unfetched

    def _give_back(self, digest: str) -> None:
        kept = self._kept.get(digest)
        if kept is None:
            return
        self._kept[digest] = replace(kept, givings=kept.givings - 1)
        if kept.givings == 1 and digest not in self._writing:
            self._forget(digest)

    def _forget(self, digest: str) -> None:
        try:
            self._store.remove(digest + SUFFIX)
        except Exception as error:
            raise ArchiveError(f"{self._store.uri} did not let go of a trace", got=repr(error)) from error
        self._drop(digest)

    def _drop(self, digest: str) -> None:
        self._num_bytes -= self._kept.pop(digest).size


def _unknown(digest: str) -> UnknownTraceError:
    return UnknownTraceError(
        "there is no such trace here",
        got=digest,
        fix="It was never kept, was deleted, is older than --archive-seconds, or had to go for newer ones.",
    )
