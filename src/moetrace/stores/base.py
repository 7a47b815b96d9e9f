"""The small protocol that every store speaks, and references to what lies in one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moetrace.container import Source
from moetrace.errors import StoreError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
_REFERENCE = re.compile(r"(?P<uri>[^#?]+)(\?bytes=(?P<start>\d{1,18})-(?P<stop>\d{1,18}))?#(?P<digest>[0-9a-f]{64})")


class Entry(NamedTuple):
    """What a store says of a blob: name, bytes, and when it was written, in seconds since 1970 (NaN: it cannot say)."""

    name: str
    size: int
    modified: float


class Store(Protocol):
    """Named blobs. Any number of processes may use one at the same time, where the kind of store has processes.

    Attributes:
        uri: how another process opens the same store: `open_store(uri)`.
    """

    @property
    def uri(self) -> str: ...

    def write(self, name: str, data: bytes) -> None:
        """Keep a blob, replacing one of that name. Readers see the old one or the new one, whole."""

    def source(self, name: str) -> Source:
        """A blob, opened for reading; the caller closes it.

        Raises:
            StoreError: there is none, or it is no plain file.
        """

    def remove(self, name: str) -> None:
        """Forget a blob; none of that name is as good."""

    def entries(self) -> list[Entry]:
        """All blobs, by name."""

    def close(self) -> None:
        """Give back what the store holds open; the blobs stay, unless the kind of store says otherwise."""


@dataclass(frozen=True)
class Reference:
    """Where a container is and what it must be: a string to pass instead of bytes.

    Attributes:
        uri: of the blob: that of the store, "/", the name.
        digest: of the container, see `Container.digest`: whoever resolves the reference gets that or an error.
        span: the bytes of the blob that are the container, or None where it is the whole blob.
    """

    uri: str
    digest: str
    span: tuple[int, int] | None = None

    def __str__(self) -> str:
        span = f"?bytes={self.span[0]}-{self.span[1]}" if self.span else ""
        return f"{self.uri}{span}#{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """The reference that a string says.

        Raises:
            StoreError: it is none.
        """
        found = _REFERENCE.fullmatch(text)
        if not found:
            raise StoreError("the text is not a reference", expected="URI[?bytes=START-STOP]#SHA-256", got=repr(text))
        span = (int(found["start"]), int(found["stop"])) if found["start"] else None
        return cls(found["uri"], found["digest"], span)


def require_name(name: str) -> str:
    """A name that is safe in every kind of store: it cannot leave the store, hide in it, or be mistaken for a URI."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StoreError(
            "the name cannot be used in a store",
            expected="1 to 200 letters, digits and ._+=-, the first a letter, digit or _",
            got=repr(name),
        )
    return name


def missing(name: str, uri: str) -> StoreError:
    """The error for a blob that is not there."""
    return StoreError(
        f"there is no {name!r} in {uri}",
        fix="It was never written, was removed, or has expired; see the store's entries.",
    )
