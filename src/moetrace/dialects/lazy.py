"""Ids in the order and type of a payload, converted where they are read: who sends them need not wait for all of them.

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

import numpy as np

from moetrace.trace import RoutingTrace


class LazyIds:
    """The ids of a trace as `[T, L, K]` or `[L, T, K]` of another type, in C order and little-endian.

    Args:
        trace: whose ids.
        layer_major: whether the layers come first.
        dtype: an integer type that holds every id.
        missing: what the rows hold that were not captured.

    Attributes:
        shape: of the three axes.
        nbytes: of all of them.
    """

    def __init__(self, trace: RoutingTrace, *, layer_major: bool, dtype: str, missing: int) -> None:
        self._experts_TLK = trace.experts_TLK
        self._missing_T = None if trace.valid_T.all() else ~trace.valid_T
        self._layer_major, self._missing = layer_major, missing
        self._dtype = np.dtype(dtype).newbyteorder("<")
        rows, layers, top_k = self._experts_TLK.shape
        self.shape = (layers, rows, top_k) if layer_major else (rows, layers, top_k)
        self.nbytes = self._experts_TLK.size * self._dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start <= b < stop` of them, a uint8 array."""
        size = self._dtype.itemsize * self.shape[2]
        first, last = start // size, -(-stop // size)
        routes = self._of_layers(first, last) if self._layer_major else self._of_rows(first, last)
        return routes.reshape(-1).view(np.uint8)[start - first * size : stop - first * size]

    def _of_rows(self, first: int, last: int) -> np.ndarray:
        """`[last - first, K]`: routes by number, where the layers of one row follow each other."""
        layers = self.shape[1]
        row, behind = first // layers, -(-last // layers)
        ids_TLK = self._converted(self._experts_TLK[row:behind], slice(row, behind))
        return ids_TLK.reshape(-1, self.shape[2])[first - row * layers : last - row * layers]

    def _of_layers(self, first: int, last: int) -> np.ndarray:
        """The same, where the rows of one layer follow each other."""
        rows, top_k = self.shape[1:]
        parts = []
        while first < last:
            layer, row = divmod(first, rows)
            some = slice(row, min(rows, row + last - first))
            parts.append(self._converted(self._layer(layer, some), some))
            first += some.stop - row
        return np.concatenate(parts) if parts else np.empty((0, top_k), self._dtype)

    def _layer(self, layer: int, rows: slice) -> np.ndarray:
        """`[T, K]`: a route at a time, since numpy takes its time over a short innermost axis."""
        top_k, itemsize = self.shape[2], self._experts_TLK.itemsize
        routes_TL = self._experts_TLK.view(f"V{top_k * itemsize}")[..., 0]
        return np.ascontiguousarray(routes_TL[rows, layer]).view(self._experts_TLK.dtype).reshape(-1, top_k)

    def _converted(self, ids: np.ndarray, rows: slice) -> np.ndarray:
        missing = None if self._missing_T is None else self._missing_T[rows]
        if missing is None or not missing.any():
            return ids.astype(self._dtype, copy=False)
        ids = ids.astype(self._dtype)
        ids[missing] = self._missing
        return ids
