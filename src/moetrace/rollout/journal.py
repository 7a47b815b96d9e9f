"""What a rollout has finished, on disk: a prompt is in the responses and in the log of traces, or in neither.

    settings.json    what the rollout was begun with
    rollout.jsonl    a line for each finished prompt
    traces/          the log of their routes (`moetrace.stores.TraceLog`), by the names that the lines say
    pending          a prompt that is being written: its line, then a container of its traces; for a moment only

Two files cannot be written as one. So a finished prompt is first written to `pending`, which appears whole or not at
all, then to the log and to the responses, and then `pending` is removed. Whoever opens the journal after a crash writes
what is in `pending` again, as far as it is not there yet.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrace.errors import FormatError, InvalidTraceError, RolloutError
from moetrace.files import PART_PATTERN, sync_directory, write_whole
from moetrace.format import load, save
from moetrace.layout import as_int
from moetrace.stores import LogWriter, TraceLog
from moetrace.trace import RoutingTrace

Entry = dict[str, Any]


class Journal:
    """The folder of a rollout, held by one process. `commit` may be called from any thread.

    Attributes:
        path: the folder.
        done: numbers of the finished prompts.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Begin a rollout in a folder, or go on with the one that is there.

        Args:
            path: the folder; made if there is none.
            settings: what the rollout does, as JSON; must be what it was begun with.

        Raises:
            RolloutError: it was begun with other settings, or another process is at it.
            FormatError, OSError: the folder is damaged, or cannot be written.
        """
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._responses = -1
        self._log: LogWriter | None = None
        try:
            self._take()
            for part in self.path.glob(PART_PATTERN):  # a writer died
                part.unlink()
            self._require(json.loads(json.dumps(settings)))
            self.done = self._read()
            self._log = LogWriter(self.path / "traces")
            if self._pending.exists():
                with _reading(self._pending):
                    self._finish(self._pending.read_bytes(), names=self._logged())
        except BaseException:
            self.close()
            raise

    @property
    def _pending(self) -> Path:
        return self.path / "pending"

    def commit(self, entry: Entry, traces: Sequence[RoutingTrace]) -> None:
        """Keep a finished prompt; when this returns, no crash can lose it, or make it appear twice.

        Args:
            entry: its response: `number`, and a list `sequences`, each with the name of its `trace`.
            traces: of the sequences, in their order.

        Raises:
            RolloutError: the prompt is there already, or the journal is closed.
            OSError: the disk is full, or the like. The prompt is kept when the journal is opened again, or not at all.
        """
        data = json.dumps(entry, allow_nan=False).encode() + b"\n" + save(traces)
        with self._mutex:
            if self._log is None or entry["number"] in self.done:
                raise RolloutError("the journal takes no more of this prompt", got=f"prompt {entry['number']}")
            try:
                write_whole(self._pending, data, durable=True)
                self._finish(data, names=frozenset())
            except BaseException:  # the next prompt must not take the place of this one in `pending`
                self._close_log()
                raise

    def _finish(self, data: bytes, names: frozenset[str]) -> None:
        """Write a prompt where it belongs, but for traces of these names, which are there."""
        assert self._log is not None
        line, _, container = data.partition(b"\n")
        entry = json.loads(line)
        for sequence, trace in zip(entry["sequences"], load(container), strict=True):
            if sequence["trace"] not in names:
                self._log.append(trace, sequence["trace"])
        if entry["number"] not in self.done:
            _write(self._responses, line + b"\n")
            self.done.add(entry["number"])
        self._pending.unlink()

    def close(self) -> None:
        """Give the folder back, after what is being committed."""
        with self._mutex:
            self._close_log()
            for file in (self._responses, self._lock):
                if file >= 0:
                    os.close(file)
            self._responses = self._lock = -1

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RolloutError(
                f"another process is at the rollout in {self.path}", fix="Wait for it, or use another --out."
            ) from error

    def _require(self, settings: Any) -> None:
        """The settings are those that the rollout was begun with, if it was."""
        path = self.path / "settings.json"
        if not path.exists():
            if (self.path / "rollout.jsonl").exists():
                raise RolloutError(f"{self.path} has responses, but no settings.json", fix="Use another --out.")
            return write_whole(path, json.dumps(settings, indent=1).encode() + b"\n", durable=True)
        with _reading(path):
            before = dict(json.loads(path.read_bytes()))
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise RolloutError(
                    f"{name} is not what the rollout in {self.path} was begun with",
                    expected=before.get(name),
                    got=settings.get(name),
                    fix="Go on with what it was begun with, or use another --out.",
                )
        return None

    def _read(self) -> set[int]:
        """Open the responses, cut off a line that a crash left unfinished, and read the numbers of the others."""
        path = self.path / "rollout.jsonl"
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        self._responses = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if whole < len(data):
            os.ftruncate(self._responses, whole)
            os.fsync(self._responses)
        sync_directory(self.path)
        with _reading(path):
            return {as_int(json.loads(line)["number"], "a number") for line in data[:whole].splitlines()}

    def _logged(self) -> frozenset[str]:
        return frozenset(record.name for record in TraceLog(self.path / "traces").records)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever is not as the journal wrote it is a `FormatError` that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RecursionError, InvalidTraceError) as error:
        raise FormatError(
            f"{path} is damaged", got=repr(error), fix="Repair it by hand, or use another --out."
        ) from error


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.fsync(file)
