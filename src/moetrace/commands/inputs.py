"""Whatever a user may name on the command line, as named traces that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from moetrace.container import MAX_BYTES, Container, Source
from moetrace.errors import FormatError, MoetraceError, StoreError
from moetrace.format import open_file
from moetrace.stores import DirectoryStore, Store, TraceLog, open_reference, open_store
from moetrace.stores.records import SHARD
from moetrace.stores.traces import SUFFIX
from moetrace.trace import RoutingTrace

INPUTS = "a container file, a store (directory or URI), a log directory, a reference, or a Parquet file"


class Item(NamedTuple):
    """One trace of an input: its name there, and how it is read.

    That raises `FormatError` where it is damaged, and `StoreError` where it was removed meanwhile. A container whose
    headers cannot be read is one item: nobody knows how many traces it has.
    """

    name: str
    read: Callable[[], RoutingTrace]


@contextmanager
def open_input(text: str, max_bytes: int = MAX_BYTES) -> Iterator[Sequence[Item]]:
    """The traces of an input, see `INPUTS`; nothing is decoded yet.

    Raises:
        MoetraceError: there is no such input, or it cannot be read at all.
        OSError: likewise.
    """
    with ExitStack() as stack:
        path = Path(text)
        if "#" in text and not path.exists():
            yield _of_container(stack.enter_context(open_reference(text, max_bytes=max_bytes)))
        elif "://" in text:
            yield _of_store(open_store(text, create=False), max_bytes, stack)
        elif path.is_dir():
            log = TraceLog(path, max_bytes=max_bytes) if any(path.glob(f"*{SHARD}")) else None
            yield _of_log(log) if log else _of_store(DirectoryStore(path), max_bytes, stack)
        elif path.suffix == ".parquet":
            from moetrace.tables import read_rows

            yield [_of_row(name, row) for name, row in read_rows(path)]
        else:
            yield _of_container(stack.enter_context(open_file(path, max_bytes=max_bytes)))


def _of_container(container: Container) -> list[Item]:
    return [Item(str(i), partial(container.__getitem__, i)) for i in range(len(container))]


def _of_log(log: TraceLog) -> list[Item]:
    return [Item(record.name, partial(log.__getitem__, i)) for i, record in enumerate(log.records)]


def _of_store(store: Store, max_bytes: int, stack: ExitStack) -> list[Item]:
    stack.callback(store.close)
    containers = _Containers(store, max_bytes)
    stack.callback(containers.close)
    items = []
    for entry in store.entries():
        if entry.name.endswith(SUFFIX):
            name = entry.name.removesuffix(SUFFIX)
            try:
                count = len(containers.open(entry.name))
            except (FormatError, StoreError) as error:
                items.append(Item(name, partial(_refuse, error)))
            else:
                items += [Item(f"{name}/{i}", partial(containers.read, entry.name, i)) for i in range(count)]
    if not items:
        raise StoreError(f"there are no traces in {store.uri}", expected=f"containers named *{SUFFIX}")
    return items


class _Containers:
    """Containers of a store, of which one is open at a time: there may be more than files may be open."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._opened: tuple[str, Source, Container] | None = None

    def open(self, name: str) -> Container:
        """The container of that name; another one that was open is closed."""
        if self._opened is None or self._opened[0] != name:
            self.close()
            source = self._store.source(name)
            try:
                self._opened = name, source, Container(source, self._max_bytes)
            except BaseException:
                source.close()
                raise
        return self._opened[2]

    def read(self, name: str, i: int) -> RoutingTrace:
        return self.open(name)[i]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


def _of_row(name: str, row: Mapping[str, Any]) -> Item:
    from moetrace.tables import trace_of

    try:
        return Item(name, partial(_same, trace_of(row)))
    except FormatError as error:
        return Item(name, partial(_refuse, error))


def _same(trace: RoutingTrace) -> RoutingTrace:
    return trace


def _refuse(error: MoetraceError) -> NoReturn:
    raise error
