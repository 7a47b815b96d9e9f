"""A store in a local directory."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

from moetrace.container import FileSource
from moetrace.errors import StoreError
from moetrace.files import PART_PATTERN, write_whole
from moetrace.stores.base import Entry, missing, require_name

_ABANDONED_S = 3600.0
"""A half-written file of this age belongs to a writer that has died."""


class DirectoryStore:
    """One file a blob, renamed into place when it is whole. Symbolic links are never followed, nor listed."""

    def __init__(self, path: str | os.PathLike[str], *, durable: bool = True) -> None:
        """Open the store, making the directory if there is none.

        Args:
            path: the directory.
            durable: a write returns when the disk has it, so that it survives a loss of power.
        """
        Path(path).mkdir(parents=True, exist_ok=True)
        self.path = Path(path).resolve()
        self.uri = self.path.as_uri()
        self._durable = durable

    def write(self, name: str, data: bytes) -> None:
        write_whole(self.path / require_name(name), data, durable=self._durable)

    def source(self, name: str) -> FileSource:
        return open_plain(self.path / require_name(name), self.uri)

    def remove(self, name: str) -> None:
        (self.path / require_name(name)).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        found = []
        for item in sorted(self.path.iterdir()):
            try:
                facts = item.lstat()
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            if stat.S_ISREG(facts.st_mode) and not item.name.startswith("."):
                found.append(Entry(item.name, facts.st_size, facts.st_mtime))
        return found

    def sweep(self) -> int:
        """Remove what writers that died have left half-written; returns how many files that were."""
        removed = 0
        for item in self.path.glob(PART_PATTERN):
            try:
                if item.lstat().st_mtime < time.time() - _ABANDONED_S:
                    item.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def close(self) -> None:
        pass


def open_plain(path: Path, uri: str) -> FileSource:
    """A plain file of the store called `uri`, opened for reading.

    Raises:
        StoreError: there is none, or it is a symbolic link, a directory, a pipe or the like.
    """
    try:
        # Without waiting for the other end, should it be a pipe.
        source = FileSource(path, os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise missing(path.name, uri) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path} is a symbolic link", expected="a plain file", fix="Remove it.") from error
        raise
    if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        source.close()
        raise StoreError(f"{path} is not a plain file", expected="a file that a store has written", fix="Remove it.")
    return source
