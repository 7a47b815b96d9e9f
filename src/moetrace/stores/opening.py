"""From a URI to its store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from moetrace.errors import StoreError
from moetrace.stores.base import Store
from moetrace.stores.directory import DirectoryStore
from moetrace.stores.memory import MemoryStore


def open_store(uri: str, *, create: bool = True) -> Store:
    """The store of a URI: `memory://name` (of this process), a path, `file:///path`, `shm://name`, or what fsspec has.

    Args:
        uri: which store.
        create: make a directory that is not there; otherwise that is an error.

    Raises:
        StoreError: there is no such store.
        MissingExtraError: fsspec, or what it needs for the URI, is not installed.
    """
    scheme, _, rest = uri.partition("://")
    if not rest and scheme == uri:
        return _directory(Path(uri), create)
    if scheme == "file":
        return _directory(_path_of(uri), create)
    if scheme == "memory":
        return MemoryStore.named(rest)
    if scheme == "shm":
        from moetrace.stores.shared import SharedMemoryStore

        return SharedMemoryStore(rest)
    from moetrace.stores.remote import RemoteStore

    return RemoteStore(uri)


def _path_of(uri: str) -> Path:
    """The path of a `file:` URI, which names no other host."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise StoreError(f"{uri} cannot be opened", expected="file:///path", got=str(error)) from error
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{uri} cannot be opened", expected="file:///path", got=f"a host, {parts.netloc}")
    return Path(unquote(parts.path))


def _directory(path: Path, create: bool) -> DirectoryStore:
    if not create and not path.is_dir():
        raise StoreError(f"there is no directory {path}", fix="It was removed, or lies on another host.")
    return DirectoryStore(path)
