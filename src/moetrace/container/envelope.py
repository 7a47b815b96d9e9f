"""The safetensors file around our tensors: its header read and checked, its tensors read one by one.

It is written and read here, not by the safetensors library: that copies a large tensor three times to write it, and
reads whole files from memory or local paths, where a trace must be had from the middle of a file in a store. The tests
hold both writers and both readers against each other, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from moetrace.errors import FormatError

KEY = "moetrace"
DTYPES: dict[str, np.dtype] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4")}
HEADER_SHARE = 32
"""A parsed header takes up to so many times its own length, so its length is at most this part of the limit."""


def envelope_parts(tensors: Mapping[str, np.ndarray], text: str) -> list[np.ndarray]:
    """A safetensors file in parts, uint8 arrays; together the bytes that the library would write: largest dtype first,
    then by name. Tensors in C order are not copied.

    Args:
        tensors: of the types in `DTYPES`.
        text: the value of the metadata key "moetrace".
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {KEY: text}}
    blobs, offset = [], 0
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        blobs.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        spec = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        header[name], offset = spec, offset + array.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return [np.frombuffer(len(encoded).to_bytes(8, "little") + encoded, np.uint8), *blobs]


class Source(Protocol):
    """Bytes of which any part can be read."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """The bytes from `start` to `stop`, both within `size`."""

    def close(self) -> None:
        """Give back what was opened."""


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)

    def read(self, start: int, stop: int) -> memoryview:
        return self._data[start:stop]

    def close(self) -> None:
        pass


class FileSource:
    """An open local file; reads from several threads do not disturb each other."""

    def __init__(self, path: str | os.PathLike[str], flags: int = 0) -> None:
        """Open it with more `flags` than those for reading, such as `os.O_NOFOLLOW`."""
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        self.size = os.fstat(self._file).st_size

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file, stop - start, start)

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._file

    def close(self) -> None:
        os.close(self._file)


class RangeSource:
    """A part of another source, which it closes with itself."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self._source, self._start, self.size = source, start, stop - start

    def read(self, start: int, stop: int) -> bytes | memoryview:
        return self._source.read(self._start + start, self._start + stop)

    def close(self) -> None:
        self._source.close()


class TensorSpec(NamedTuple):
    """What a tensor is to be: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Envelope:
    """A safetensors file whose metadata has the key "moetrace".

    Attributes:
        text: that key's value.
    """

    def __init__(self, source: Source, max_bytes: int) -> None:
        """Read and check the header.

        Raises:
            FormatError: it is truncated, larger than `max_bytes / HEADER_SHARE`, or not that of such a file.
        """
        self._source = source
        length = int.from_bytes(source.read(0, min(8, source.size)), "little")
        if source.size < 8 or length > source.size - 8:
            if source.size > 8 and (first := bytes(source.read(8, 9))) != b"{":
                raise FormatError(
                    "the bytes are not a moetrace container",
                    expected="a safetensors file, with '{' at byte 8",
                    got=repr(first),
                    fix="Engines' own payloads are read by moetrace.dialects.",
                )
            raise FormatError(
                "the bytes end inside their header",
                expected=f"at least {8 + length} bytes",
                got=f"{source.size} bytes",
            )
        if length * HEADER_SHARE > max_bytes:
            raise FormatError(
                "the header alone is too large for the limit",
                expected=f"at most {max_bytes // HEADER_SHARE} bytes for max_bytes={max_bytes}",
                got=f"{length} bytes",
                fix="Pass a larger max_bytes if you trust where the bytes come from.",
            )
        self._data_start = 8 + length
        header = parse_json(source.read(8, self._data_start))
        try:
            self.text = header.pop("__metadata__")[KEY]
            if not isinstance(self.text, str):
                raise TypeError("its value is not text")
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                "the bytes are not a moetrace container",
                expected=f"a safetensors file with the metadata key {KEY!r}",
                got=repr(error),
                fix="Engines' own payloads are read by moetrace.dialects.",
            ) from error
        self._tensors: dict[str, tuple[TensorSpec, int]] = {}
        at = 0
        for name, spec, start, stop in sorted(_entries(header), key=lambda entry: entry[2:]):
            if start != at or stop - start != spec.nbytes:
                raise FormatError(
                    f"tensor {name!r} is not where it must be",
                    expected=f"{spec.nbytes} bytes from {at}",
                    got=f"{start} to {stop}",
                )
            self._tensors[name] = spec, start
            at = stop
        if self._data_start + at != source.size:
            raise FormatError(
                "the bytes end elsewhere than their header says",
                expected=f"{self._data_start + at} bytes",
                got=f"{source.size} bytes",
            )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def require(self, specs: dict[str, TensorSpec | None]) -> None:
        """Raise `FormatError` unless there are these tensors; None stands for any number of bytes."""
        for name, spec in specs.items():
            found, _ = self._tensors.get(name, (None, 0))
            fits = found == spec if spec else found and found.dtype == "U8" and len(found.shape) == 1
            if not fits:
                got = found or "no such tensor"
                raise FormatError(f"tensor {name!r} contradicts the header", expected=spec or "U8 [any]", got=got)

    def require_no_more(self, names: set[str]) -> None:
        """Raise `FormatError` if there are tensors of other names."""
        extra = sorted(self._tensors.keys() - names)
        if extra:
            raise FormatError("there are tensors that belong to no trace", got=", ".join(extra[:3]))

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, read only now; it may share memory with the source."""
        spec, start = self._tensors[name]
        data = self._source.read(self._data_start + start, self._data_start + start + spec.nbytes)
        if len(data) != spec.nbytes:
            raise FormatError("the bytes ended while they were read", expected=spec.nbytes, got=len(data))
        return np.frombuffer(data, DTYPES[spec.dtype]).reshape(spec.shape)


def parse_json(text: bytes | memoryview | str) -> Any:
    """JSON without repeated keys; whatever else it is, is a `FormatError`."""
    try:
        text = text if isinstance(text, str) else str(text, "utf-8")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise FormatError("the bytes are not a moetrace container", expected="JSON in UTF-8", got=str(error)) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _entries(header: dict[str, Any]) -> Iterable[tuple[str, TensorSpec, int, int]]:
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"tensor {name!r} has a broken entry", got=repr(error)) from error
        numbers_ok = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if not numbers_ok or not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(
                f"tensor {name!r} has a broken entry",
                expected=f"one of {', '.join(DTYPES)}, whole numbers",
                got=f"{dtype!r}, {shape!r}, {start!r}, {stop!r}",
            )
        yield name, TensorSpec(dtype, tuple(shape)), start, stop
