"""Expert ids as bytes: `raw`, `bits` and `set`, each also under zstd (`raw+zstd`, ...). See docs/format.md.

A codec's full name is what a container's header says. Axes: V valid rows, L layers, K experts.
"""

from __future__ import annotations

import numpy as np

from moetrace.codecs import zstd
from moetrace.codecs.base import Codec
from moetrace.codecs.bits import Bits, id_bits
from moetrace.codecs.raw import Raw
from moetrace.codecs.sets import Set
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.sorting import is_ascending

_ZSTD = "+zstd"
_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Bits(), Set())}
NAMES = (*_CODECS, *(name + _ZSTD for name in _CODECS))
"""Every codec that a header can name; `AUTO` and `AUTO + "+zstd"` are resolved before anything is written."""
AUTO = "auto"
CHOICES = (AUTO, AUTO + _ZSTD, *NAMES)
"""Every codec that may be asked for."""


def encode(name: str, experts_VLK: np.ndarray, layout: MoeLayout) -> np.ndarray:
    """`[V, L, K]` ids of `layout.dtype`, K distinct ones in each route, as 1-D uint8.

    Raises:
        FormatError: the codec is unknown or cannot hold this layout.
        MissingExtraError: it needs zstd, which is not installed.
    """
    codec, compressed = find(name)
    data = codec.encode(experts_VLK, layout)
    return zstd.compress(data) if compressed else data


def unwrap(name: str, data: np.ndarray, num_rows: int, layout: MoeLayout) -> tuple[Codec, np.ndarray]:
    """The codec, and its bytes freed of zstd where there is any: never more than the codec's own size of `num_rows`.

    Raises:
        FormatError: the codec is unknown, or the frame does not hold just that many bytes.
        MissingExtraError: it needs zstd, which is not installed.
    """
    codec, compressed = find(name)
    return codec, zstd.decompress(data, codec.size(num_rows * layout.num_layers, layout)) if compressed else data


def decode(name: str, data: np.ndarray, num_rows: int, layout: MoeLayout) -> np.ndarray:
    """The `[V, L, K]` ids of `layout.dtype` that 1-D uint8 hold; they are not checked to be a trace's.

    Raises:
        FormatError: the codec is unknown, or the bytes do not hold just that many rows.
        MissingExtraError: it needs zstd, which is not installed.
    """
    codec, data = unwrap(name, data, num_rows, layout)
    return codec.decode(data, num_rows, layout)


def find(name: object) -> tuple[Codec, bool]:
    """The codec of a full name, and whether it goes under zstd."""
    _require_known(name, NAMES)
    base, compressed, _ = str(name).partition(_ZSTD)
    return _CODECS[base], bool(compressed)


def resolve(name: str, experts_TLK: np.ndarray, layout: MoeLayout, order: str) -> str:
    """The codec that `auto` or `auto+zstd` stands for: the smallest that loses nothing; other names as they are.

    The rule is that of the table in docs/performance.md, not of what happens to be installed. Ids in an order of their
    own need `bits` (`raw` where they fill their bytes anyway); a set whose ids ascend has its own codec. zstd finds
    something in ids that are bytes, little in sets, nothing in bits; ids of two bytes it makes larger than `bits`.

    Raises:
        FormatError: the codec is unknown.
    """
    _require_known(name, CHOICES)
    if name not in (AUTO, AUTO + _ZSTD):
        return name
    compressed = name.endswith(_ZSTD)
    if order == "set" and layout.num_experts <= Set.max_experts and is_ascending(experts_TLK):
        base = "set"
    elif id_bits(layout) == 8 * layout.dtype.itemsize or (compressed and layout.dtype.itemsize == 1):
        base = "raw"
    else:
        base = "bits"
    return base + _ZSTD if compressed else base


def _require_known(name: object, known: tuple[str, ...]) -> None:
    if name not in known:
        raise FormatError("the codec is unknown", expected=f"one of {', '.join(known)}", got=repr(name))


def usable(layout: MoeLayout) -> tuple[str, ...]:
    """The codecs that can hold this layout here: those with zstd only where it is installed."""
    names = [name for name in NAMES if zstd.available() or not name.endswith(_ZSTD)]
    return tuple(name for name in names if layout.num_experts <= find(name)[0].max_experts)
