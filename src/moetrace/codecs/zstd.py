"""Encoded bytes under zstd (RFC 8878), by Python's own `compression.zstd` or its backport."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from moetrace.errors import FormatError, MissingExtraError

LEVEL = 3


def compress(data: np.ndarray) -> np.ndarray:
    """`[n]` uint8 as one frame, uint8. Equal input gives equal output with the same release of libzstd."""
    return np.frombuffer(_zstd().compress(data.data, LEVEL), np.uint8)


def decompress(frame: np.ndarray, size: int) -> np.ndarray:
    """The `size` bytes of one frame; never holds more than these and a window of their size.

    Raises:
        FormatError: there is not exactly one frame of exactly that many bytes.
    """
    zstd = _zstd()
    window_log = min(max((size - 1).bit_length(), 10), 27)
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window_log})
    try:
        data = decoder.decompress(frame.data, max_length=size + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"the bytes are not a zstd frame of {size} bytes ({error})") from error
    if len(data) != size or not decoder.eof or decoder.unused_data:
        raise FormatError(
            "the zstd frame does not hold what the header says",
            expected=f"one whole frame of {size} bytes",
            got=f"{len(data)} bytes or more, then {len(decoder.unused_data)} after the frame",
        )
    return np.frombuffer(data, np.uint8)


def available() -> bool:
    """Whether a zstd module is installed."""
    try:
        _zstd()
    except MissingExtraError:
        return False
    return True


def _zstd() -> ModuleType:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error
    raise MissingExtraError.of(missing, "zstd")
