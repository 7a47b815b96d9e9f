"""Traces in a store, by reference: what goes in, what bounds it, and what comes out again elsewhere."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moetrace import codecs
from moetrace.container import MAX_BYTES, BytesSource, Container, RangeSource
from moetrace.errors import QuotaError, StoreError
from moetrace.format import save
from moetrace.stores.base import Entry, Reference, Store
from moetrace.stores.opening import open_store
from moetrace.trace import RoutingTrace

SUFFIX = ".safetensors"
NAME = re.compile(f"(?P<digest>[0-9a-f]{{64}}){re.escape(SUFFIX)}")
"""What a container is called that a store was given by digest; whatever has another name is somebody else's."""


class TraceStore:
    """Containers in a `Store`, each under its own digest: equal traces are kept once, and writers cannot collide."""

    def __init__(
        self, store: Store, *, codec: str = codecs.AUTO, quota: int | None = None, max_age_s: float | None = None
    ) -> None:
        """Keep traces in `store`.

        Args:
            store: where.
            codec: see `save`.
            quota: bytes that all blobs of the store may take together; None for no bound. Writers that write at the
                same moment may pass it by what they are writing, until they notice and take it back.
            max_age_s: seconds after which a container expires; None for never.

        Raises:
            StoreError: that is no store, but where one is.
        """
        if isinstance(store, str | os.PathLike):
            fix = "Open it: TraceStore(open_store(...))."
            raise StoreError("a place is no store yet", expected="a Store", got=repr(store), fix=fix)
        self.store = store
        self._codec, self._quota, self._max_age_s = codec, quota, max_age_s

    def put(self, traces: RoutingTrace | Sequence[RoutingTrace]) -> Reference:
        """Keep one container of these traces; returns when it can be read by others.

        Raises:
            QuotaError: it would pass the quota, even after what has expired was removed. Nothing else is given up.
            FormatError: the codec cannot hold the traces.
        """
        data = save(traces, codec=self._codec)
        digest = Container(BytesSource(data)).digest
        name = digest + SUFFIX
        self.expire()
        is_kept = self._require_room(name, len(data))
        self.store.write(name, data)
        try:
            if not is_kept:  # else it takes no more room than before, and others have references to it
                self._require_room(name, 0)  # somebody may have written at the same time
        except QuotaError:
            self.store.remove(name)
            raise
        return Reference(f"{self.store.uri}/{name}", digest)

    def expire(self) -> list[Entry]:
        """Remove the containers that are older than `max_age_s`; returns what that was. Other blobs stay."""
        if self._max_age_s is None:
            return []
        entries = self.store.entries()
        if any(math.isnan(entry.modified) for entry in entries):
            raise StoreError(f"{self.store.uri} does not say when a blob was written", fix="Open it without max_age_s.")
        before = time.time() - self._max_age_s
        old = [entry for entry in entries if NAME.fullmatch(entry.name) and entry.modified < before]
        for entry in old:
            self.store.remove(entry.name)
        return old

    def references(self) -> list[Reference]:
        """References to every container that is kept, by digest."""
        found = [(entry.name, NAME.fullmatch(entry.name)) for entry in self.store.entries()]
        return [Reference(f"{self.store.uri}/{name}", match["digest"]) for name, match in found if match]

    def _require_room(self, name: str, more: int) -> bool:
        """Raise `QuotaError` unless there is room for a blob; whether one of that name is there. Without a quota nobody
        looks."""
        if self._quota is None:
            return False
        entries = self.store.entries()
        used = sum(entry.size for entry in entries if not (more and entry.name == name))
        if used + more > self._quota:
            raise QuotaError(
                f"{self.store.uri} is full",
                expected=f"at most {self._quota} bytes",
                got=f"{used} kept and {more} more",
                fix="Remove what has been read, shorten max_age_s, or raise the quota.",
            )
        return any(entry.name == name for entry in entries)


def resolve(reference: Reference | str, *, max_bytes: int = MAX_BYTES) -> list[RoutingTrace]:
    """The traces that a reference stands for, in whatever process.

    Raises:
        StoreError: it is no reference, or what it refers to is gone.
        FormatError: what lies there is damaged, too large, or something else than what was referred to.
        MissingExtraError: its kind of store needs a package that is not installed.
    """
    with open_reference(reference, max_bytes=max_bytes) as container:
        container.require_room_for_all()
        return list(container)


@contextmanager
def open_reference(reference: Reference | str, *, max_bytes: int = MAX_BYTES) -> Iterator[Container]:
    """What a reference stands for, opened for reading single traces; see `resolve`."""
    reference = Reference.parse(reference) if isinstance(reference, str) else reference
    root, _, name = reference.uri.rpartition("/")
    store = open_store(root, create=False)
    try:
        source = store.source(name)
        try:
            if reference.span:
                source = RangeSource(source, *_checked_span(reference.span, source.size))
            container = Container(source, max_bytes)
            if container.digest != reference.digest:
                raise StoreError(
                    "the reference leads to something else than it was made for",
                    expected=reference.digest,
                    got=container.digest,
                    fix="It was replaced since; ask for a new reference.",
                )
            yield container
        finally:
            source.close()
    finally:
        store.close()


def _checked_span(span: tuple[int, int], size: int) -> tuple[int, int]:
    if not 0 <= span[0] <= span[1] <= size:
        raise StoreError("the reference leads past the end of its blob", expected=f"at most {size}", got=span)
    return span
