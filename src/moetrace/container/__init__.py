"""The container inside: a safetensors envelope, headers, reader and writer. `moetrace.format` is its front door."""

from moetrace.container.envelope import KEY, BytesSource, FileSource, RangeSource, Source
from moetrace.container.header import TraceHeader
from moetrace.container.reader import MAX_BYTES, Container
from moetrace.container.writer import VERSION, write, write_parts

__all__ = [
    "KEY",
    "MAX_BYTES",
    "VERSION",
    "BytesSource",
    "Container",
    "FileSource",
    "RangeSource",
    "Source",
    "TraceHeader",
    "write",
    "write_parts",
]
