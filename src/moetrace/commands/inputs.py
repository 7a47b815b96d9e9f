"""Whatever a user may name on the command line, as named traces that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moetrace.container import MAX_BYTES, Container
from moetrace.errors import StoreError
from moetrace.format import open_file
from moetrace.stores import DirectoryStore, Store, TraceLog, open_reference, open_store
from moetrace.stores.records import SHARD
from moetrace.stores.traces import SUFFIX
from moetrace.trace import RoutingTrace

INPUTS = "a container file, a store (directory or URI), a log directory, a reference, or a Parquet file"


class Item(NamedTuple):
    """One trace of an input: its name there, and how it is read (`FormatError` where it is damaged)."""

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
            yield _of_container("", stack.enter_context(open_reference(text, max_bytes=max_bytes)))
        elif "://" in text:
            yield _of_store(open_store(text, create=False), max_bytes, stack)
        elif path.is_dir():
            log = TraceLog(path, max_bytes=max_bytes) if any(path.glob(f"*{SHARD}")) else None
            yield _of_log(log) if log else _of_store(DirectoryStore(path), max_bytes, stack)
        elif path.suffix == ".parquet":
            from moetrace.tables import read_parquet

            yield [Item(name, partial(_same, trace)) for name, trace in read_parquet(path)]
        else:
            yield _of_container("", stack.enter_context(open_file(path, max_bytes=max_bytes)))


def _of_container(prefix: str, container: Container) -> list[Item]:
    return [Item(f"{prefix}{i}", partial(container.__getitem__, i)) for i in range(len(container))]


def _of_log(log: TraceLog) -> list[Item]:
    return [Item(record.name, partial(log.__getitem__, i)) for i, record in enumerate(log.records)]


def _of_store(store: Store, max_bytes: int, stack: ExitStack) -> list[Item]:
    stack.callback(store.close)
    items = []
    for entry in store.entries():
        if entry.name.endswith(SUFFIX):
            source = store.source(entry.name)
            stack.callback(source.close)
            items += _of_container(f"{entry.name.removesuffix(SUFFIX)}/", Container(source, max_bytes))
    if not items:
        raise StoreError(f"there are no traces in {store.uri}", expected=f"containers named *{SUFFIX}")
    return items


def _same(trace: RoutingTrace) -> RoutingTrace:
    return trace
