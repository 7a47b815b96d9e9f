"""Traces as bytes and files: one trace or a batch in a safetensors container; see docs/format.md.

Equal traces give equal bytes; nothing is ever unpickled; a damaged byte is noticed, wherever it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moetrace import codecs
from moetrace.container import KEY, MAX_BYTES, VERSION, BytesSource, Container, FileSource, write
from moetrace.files import write_whole
from moetrace.trace import RoutingTrace, as_traces

__all__ = ["KEY", "MAX_BYTES", "VERSION", "load", "load_file", "open_file", "save", "save_file"]


def save(traces: RoutingTrace | Sequence[RoutingTrace], *, codec: str = codecs.AUTO) -> bytes:
    """One trace, or a batch of them, as container bytes.

    Args:
        traces: what to save.
        codec: one of `moetrace.codecs.CHOICES`. `set` keeps which experts were chosen but not their ranks: such a trace
            comes back as `trace.as_set()`. `auto` takes the smallest codec that loses nothing of the trace (see
            `moetrace.codecs.resolve`), `auto+zstd` likewise.

    Raises:
        InvalidTraceError: something else than traces is given.
        FormatError: the codec is unknown or cannot hold a trace's layout.
        MissingExtraError: it needs zstd, which is not installed.
    """
    return write(as_traces(traces), codec)


def load(data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> list[RoutingTrace]:
    """The traces of container bytes, checked and validated.

    Args:
        data: a container of version 1 or 2.
        max_bytes: refuse what would take more memory than this to decode.

    Raises:
        FormatError: the bytes are truncated, damaged, too large, of an unknown version or codec, or contradict
            themselves.
        MissingExtraError: they need zstd, which is not installed.
    """
    return _all_of(Container(BytesSource(data), max_bytes))


def save_file(
    traces: RoutingTrace | Sequence[RoutingTrace], path: str | os.PathLike[str], *, codec: str = codecs.AUTO
) -> None:
    """Write a container file, see `save`; it appears whole or not at all."""
    write_whole(Path(path), save(traces, codec=codec))


def load_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> list[RoutingTrace]:
    """The traces of a container file; see `load`."""
    with open_file(path, max_bytes=max_bytes) as container:
        return _all_of(container)


@contextmanager
def open_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Iterator[Container]:
    """A container file opened for reading single traces: `with open_file(path) as container: container[i]`.

    Only the headers are read at first, and then what is asked for; `max_bytes` holds for each trace on its own.

    Raises:
        FormatError: as `load`.
    """
    source = FileSource(path)
    try:
        yield Container(source, max_bytes)
    finally:
        source.close()


def _all_of(container: Container) -> list[RoutingTrace]:
    container.require_room_for_all()
    return list(container)
