"""The records of an append-only log: how they are written, and how they are found again after a crash.

A shard is a file of records, one after the other, next to an index of the same name. A record is a line and then a
container. The line is the first 16 hex digits of the SHA-256 of what follows them, a space, canonical JSON, a newline:

    3b1c...e0 {"bytes":812,"digest":"...","name":"rollout-7","offset":4096}

`offset` is where the line begins in the shard, `bytes` the length of the container after it, `digest` the container's.
The same line is appended to the index after the record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrace.container import MAX_BYTES, Container, RangeSource, Source
from moetrace.errors import FormatError, StoreError
from moetrace.stores.directory import open_plain
from moetrace.trace import RoutingTrace

SHARD, INDEX = ".shard", ".index"
_MAX_LINE = 1024


@dataclass(frozen=True)
class Record:
    """One appended container: in which shard, from where to where, what it must be, and the name it was given."""

    shard: str
    offset: int
    start: int
    stop: int
    digest: str
    name: str


def line_of(offset: int, size: int, digest: str, name: str) -> bytes:
    """The line of a record that begins at `offset` and whose container has `size` bytes."""
    facts = {"offset": offset, "bytes": size, "digest": digest, "name": name}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    return _check(text) + b" " + text + b"\n"


def records_of(path: Path) -> Iterator[Record]:
    """The finished records of a shard: those in its index, then those that a crash kept out of it."""
    try:
        source = open_plain(path, path.parent.as_uri())
    except StoreError:  # removed meanwhile, or no shard at all
        return
    try:
        end = 0
        for line in _index_lines(path.with_suffix(INDEX)):
            record = _parse(line, path.name)
            if record is None or record.offset != end or record.stop > source.size:
                break
            yield record
            end = record.stop
        while (record := _record_at(source, end, path.name)) is not None:
            if _is_right(source, record):
                yield record
            end = record.stop
    finally:
        source.close()


def read_record(source: Source, record: Record, max_bytes: int) -> RoutingTrace:
    """The trace of a record, out of its shard.

    Raises:
        FormatError: it is damaged.
    """
    container = Container(RangeSource(source, record.start, record.stop), max_bytes)
    if container.digest != record.digest or len(container) != 1:
        raise FormatError(
            f"record {record.name!r} of {record.shard} is another than its line says",
            expected=record.digest,
            got=container.digest,
        )
    return container[0]


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def _parse(line: bytes, shard: str) -> Record | None:
    """The record that a line is of, if the line is whole and undamaged."""
    check, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or _check(text) != check:
        return None
    facts = json.loads(text)  # ours, because the check fits
    start = facts["offset"] + len(line)
    return Record(shard, facts["offset"], start, start + facts["bytes"], facts["digest"], facts["name"])


def _index_lines(path: Path) -> list[bytes]:
    try:
        index = open_plain(path, path.parent.as_uri())
    except StoreError:
        return []
    try:
        return index.read(0, index.size).splitlines(keepends=True)
    finally:
        index.close()


def _record_at(source: Source, offset: int, shard: str) -> Record | None:
    """The record whose line is at `offset`, if all of its bytes are there."""
    head = bytes(source.read(offset, min(offset + _MAX_LINE, source.size)))
    record = _parse(head[: head.find(b"\n") + 1], shard)
    return record if record is not None and record.offset == offset and record.stop <= source.size else None


def _is_right(source: Source, record: Record) -> bool:
    try:
        read_record(source, record, MAX_BYTES)
    except FormatError:
        return False
    return True
