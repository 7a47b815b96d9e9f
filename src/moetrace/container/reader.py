"""Read traces out of a container, all of them or one at a time. The rules are in docs/format.md.

Axes: T rows, V valid rows, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace import codecs
from moetrace.codecs.packing import unpack
from moetrace.container.envelope import Envelope, Source, TensorSpec, parse_json
from moetrace.container.header import TraceHeader
from moetrace.container.writer import VERSION, header_sha256, payload_sha256
from moetrace.errors import FormatError, MissingExtraError, MoetraceError
from moetrace.layout import as_int
from moetrace.trace import RoutingTrace

if TYPE_CHECKING:
    import torch

MAX_BYTES = 1 << 32
"""Unless told otherwise a reader refuses what would take more than 4 GiB."""


class Container:
    """A container that is open for reading: `len`, `container[i]`, iteration. Only what is asked for is read.

    Attributes:
        version: of the format, 1 or 2.
        headers: what the container says about each trace.
        digest: SHA-256 (hex) that covers every header and, through their checksums, every array; "" in version 1.
    """

    def __init__(self, source: Source, max_bytes: int = MAX_BYTES) -> None:
        """Read and check the headers.

        Args:
            source: where the bytes are.
            max_bytes: refuse what would make the reader hold more than this beside a fixed workspace, which is a few
                MiB for usual shapes and 64 MiB at most.

        Raises:
            FormatError: the bytes are truncated, damaged, of an unknown version or codec, too large, or contradict
                themselves.
        """
        self._max_bytes = max_bytes
        self._envelope = Envelope(source, max_bytes)
        self.version, self.digest, traces = _read_content(self._envelope.text)
        self.headers = tuple(_read_header(i, facts, self.version) for i, facts in enumerate(traces))
        names: set[str] = set()
        for i, header in enumerate(self.headers):
            with _naming(i):
                specs = header.tensors(i) if self.version > 1 else _tensors_v1(i, header, self._envelope)
                self._envelope.require(specs)
                names |= specs.keys()
        self._envelope.require_no_more(names)

    def __len__(self) -> int:
        return len(self.headers)

    def __getitem__(self, i: int) -> RoutingTrace:
        """Trace i, from 0; its bytes are read, checked and decoded now.

        Raises:
            FormatError: as the constructor; the message names the trace.
            InvalidTraceError: that is no number.
            IndexError: there is no such trace.
        """
        i = range(len(self))[as_int(i, "the number of a trace")]
        header = self.headers[i]
        self.require_room(header.decoded_bytes, f"trace {i}")
        with _naming(i):
            return self._read(i, header) if self.version > 1 else self._read_v1(i, header)

    def __iter__(self) -> Iterator[RoutingTrace]:
        return (self[i] for i in range(len(self)))

    def experts_tensor(self, i: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The ids of trace i's valid rows on a device, decoded there: `[V, L, K]`, see `decode_tensor` for the dtype.

        The checksum is verified; ids are not checked against each other, which would wait for the device.

        Raises:
            FormatError: as `container[i]`; version 1 cannot be read so.
            MissingExtraError: torch is not installed.
        """
        from moetrace.codecs.tensors import decode_tensor

        i = range(len(self))[as_int(i, "the number of a trace")]
        header = self.headers[i]
        if header.num_valid is None:
            raise FormatError("version 1 is not decoded to a device", fix="Convert the file: moetrace convert OLD NEW")
        self.require_room(header.decoded_bytes, f"trace {i}")
        with _naming(i):
            data = self._checked_arrays(i, header)[f"{i}.experts"].reshape(-1).view(np.uint8)
            codec, data = codecs.unwrap(header.codec, data, header.num_valid, header.layout)
            return decode_tensor(codec, data, header.num_valid, header.layout, device)

    def require_room(self, needed: int, what: str) -> None:
        """Raise `FormatError` if `needed` bytes are more than `max_bytes`."""
        if needed > self._max_bytes:
            raise FormatError(
                f"{what} is larger than the limit",
                expected=f"at most max_bytes={self._max_bytes}",
                got=f"{needed} bytes to decode it",
                fix="Read traces one by one (open_file), or pass a larger max_bytes if you trust the source.",
            )

    def require_room_for_all(self) -> None:
        """Raise `FormatError` if all traces together are more than `max_bytes`."""
        self.require_room(sum(header.decoded_bytes for header in self.headers), "the container")

    def _checked_arrays(self, i: int, header: TraceHeader) -> dict[str, np.ndarray]:
        arrays = {name: self._envelope.tensor(name) for name in header.tensors(i)}
        checksum = payload_sha256(arrays.values())
        if checksum != header.sha256:
            raise FormatError(
                "the arrays are not those that were written",
                expected=f"SHA-256 {header.sha256[:16]}...",
                got=f"{checksum[:16]}...",
                fix="The bytes are damaged; fetch them again.",
            )
        return arrays

    def _read(self, i: int, header: TraceHeader) -> RoutingTrace:
        assert header.num_valid is not None  # from_json wants it in version 2
        arrays = self._checked_arrays(i, header)
        valid_T = _unpack_valid(arrays[f"{i}.valid"], header.num_rows)
        if np.count_nonzero(valid_T) != header.num_valid:
            raise FormatError(
                "the bitmap has another number of rows", expected=header.num_valid, got=np.count_nonzero(valid_T)
            )
        data = arrays[f"{i}.experts"].reshape(-1).view(np.uint8)
        experts_TLK = codecs.decode(header.codec, data, header.num_valid, header.layout)
        if header.num_valid < header.num_rows:
            experts_VLK = experts_TLK
            experts_TLK = np.zeros((header.num_rows, *experts_VLK.shape[1:]), experts_VLK.dtype)
            experts_TLK[valid_T] = experts_VLK
        tokens = None
        if header.token_bits is not None:
            tokens = np.zeros(header.num_tokens, np.int64)
            unpack(arrays[f"{i}.tokens"], header.num_tokens, header.token_bits, tokens)
        return _trace_of(header, experts_TLK, valid_T, tokens)

    def _read_v1(self, i: int, header: TraceHeader) -> RoutingTrace:
        arrays = {name: self._envelope.tensor(name) for name in _tensors_v1(i, header, self._envelope)}
        tokens = arrays.get(f"{i}.tokens")
        valid_T = _unpack_valid(arrays[f"{i}.valid"], header.num_rows)
        experts_TLK = arrays[f"{i}.experts"].astype(header.layout.dtype)
        return _trace_of(header, experts_TLK, valid_T, None if tokens is None else tokens.astype(np.int64))


def _read_content(text: str) -> tuple[int, str, list[Any]]:
    """Version, digest and trace headers of the metadata."""
    content = parse_json(text)
    if not isinstance(content, dict) or not {"version", "traces"} <= content.keys():
        raise FormatError(
            "the bytes are not a moetrace container", expected="an object with version and traces", got=text[:40]
        )
    version, traces = content["version"], content["traces"]
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(
            "the container has an unknown version",
            expected=f"1 to {VERSION}",
            got=version,
            fix="Upgrade moetrace to read it.",
        )
    if not isinstance(traces, list):
        raise FormatError("the container's header is broken", expected="a list of traces", got=type(traces).__name__)
    digest = header_sha256(version, traces) if version > 1 else ""
    if version > 1 and content != {"version": version, "traces": traces, "sha256": digest}:
        raise FormatError(
            "the container's header is not the one that was written",
            expected=f"SHA-256 {content.get('sha256')}",
            got=digest,
            fix="The bytes are damaged; fetch them again.",
        )
    return version, digest, traces


def _read_header(i: int, facts: Any, version: int) -> TraceHeader:
    with _naming(i):
        return TraceHeader.from_json(facts, version)


def _tensors_v1(i: int, header: TraceHeader, envelope: Envelope) -> dict[str, TensorSpec | None]:
    layout = header.layout
    specs: dict[str, TensorSpec | None] = {
        f"{i}.experts": TensorSpec(f"U{8 * layout.dtype.itemsize}", (header.num_rows, layout.num_layers, layout.top_k)),
        f"{i}.valid": TensorSpec("U8", (-(-header.num_rows // 8),)),
    }
    if f"{i}.tokens" in envelope:
        specs[f"{i}.tokens"] = TensorSpec("U32", (header.num_tokens,))
    return specs


def _unpack_valid(packed: np.ndarray, num_rows: int) -> np.ndarray:
    valid_T = np.unpackbits(packed, count=num_rows).view(bool)
    if num_rows % 8 and packed[-1] & (1 << -num_rows % 8) - 1:
        raise FormatError("the bitmap goes on after the last row", expected="zeros", got=f"{int(packed[-1]):08b}")
    return valid_T


def _trace_of(
    header: TraceHeader, experts_TLK: np.ndarray, valid_T: np.ndarray, tokens: np.ndarray | None
) -> RoutingTrace:
    for array in (experts_TLK, valid_T, tokens):
        if array is not None:
            array.flags.writeable = False  # ours alone, so the trace need not copy it
    return RoutingTrace(
        experts_TLK,
        valid_T,
        header.layout,
        tokens,
        header.num_tokens,
        header.token_sha256,
        header.start,
        header.weight_spans,
        header.order,
        header.fingerprint,
        header.engine,
    )


@contextmanager
def _naming(i: int) -> Iterator[None]:
    """Whatever is wrong with trace i is a `FormatError` that says so."""
    try:
        yield
    except MissingExtraError:
        raise
    except MoetraceError as error:
        raise FormatError(f"trace {i}: {error.what}", expected=error.expected, got=error.got, fix=error.fix) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"trace {i} has a broken header ({error!r})") from error
