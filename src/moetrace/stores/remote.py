"""A store anywhere fsspec reaches: s3://, gs://, hf://, sftp://, ..."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from moetrace.errors import MissingExtraError, StoreError
from moetrace.stores.base import Entry, missing, require_name

try:
    import fsspec
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error, "stores") from error

_WRITTEN = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Where file systems say when a file was written; there is no common name."""


class RemoteStore:
    """One object a blob. Whether an object appears whole is the file system's affair; a part of one is refused."""

    def __init__(self, uri: str, **options: Any) -> None:
        """Open the store; `options` are fsspec's, such as credentials.

        Raises:
            MissingExtraError: the file system needs a package that is not installed.
            StoreError: there is no such file system.
        """
        try:
            self._files, self._root = fsspec.core.url_to_fs(uri.rstrip("/"), **options)
        except ImportError as error:
            raise StoreError(f"{uri} cannot be opened", got=str(error), fix="Install what it names.") from error
        except ValueError as error:
            raise StoreError(f"{uri} cannot be opened", got=str(error)) from error
        self.uri = uri.rstrip("/")
        self._files.makedirs(self._root, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._path(name), bytes(data))

    def source(self, name: str) -> RemoteSource:
        try:
            return RemoteSource(self._files, self._path(name))
        except FileNotFoundError as error:
            raise missing(name, self.uri) from error

    def remove(self, name: str) -> None:
        if self._files.exists(self._path(name)):
            self._files.rm_file(self._path(name))

    def entries(self) -> list[Entry]:
        self._files.invalidate_cache()
        found = []
        for facts in self._files.ls(self._root, detail=True):
            name = facts["name"].rsplit("/", 1)[-1]
            if facts["type"] == "file" and not name.startswith("."):
                found.append(Entry(name, int(facts["size"]), _seconds(facts)))
        return sorted(found)

    def close(self) -> None:
        pass

    def _path(self, name: str) -> str:
        return f"{self._root}/{require_name(name)}"


class RemoteSource:
    """One object, read by ranges."""

    def __init__(self, files: Any, path: str) -> None:
        self._files, self._path = files, path
        self.size = int(files.size(path))

    def read(self, start: int, stop: int) -> bytes:
        return self._files.cat_file(self._path, start, stop)

    def close(self) -> None:
        pass


def _seconds(facts: dict[str, Any]) -> float:
    written = next((facts[key] for key in _WRITTEN if facts.get(key)), None)
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    if isinstance(written, datetime):
        return written.timestamp()
    return float("nan") if written is None else float(written)
