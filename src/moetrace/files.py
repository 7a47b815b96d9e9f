"""Local files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART_PATTERN = ".*." + "[0-9a-f]" * 32
"""What the hidden names look like: a glob that no other file matches."""


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write, under a hidden name beside `path`; renamed to it when the block ends well, else removed.

    Args:
        path: where it shall be.
        durable: leave the block only when the disk has it.

    Raises:
        OSError: the disk is full, or the like; nothing is left behind. It names `path`, never the hidden name.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == os.fspath(part):
            error.filename = os.fspath(path)
            del error.filename2  # None would be printed
        with suppress(OSError):  # what went wrong first is what counts
            part.unlink()
        raise
    if durable:
        sync_directory(path.parent)


def write_whole(path: Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file that appears whole or not at all; see `whole_file`."""
    with whole_file(path, durable=durable) as file:
        file.write(data)


def sync_directory(path: Path) -> None:
    """Wait until the disk knows the names in a directory."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
