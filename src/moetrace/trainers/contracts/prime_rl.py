"""prime-rl: `TrainingSample.routed_experts`, a `RoutedExperts` of bytes, shape `[n, D, K]` and the name of a type.

One row for each token; its own tails and padding are zero bytes, so nothing says that a row is missing. The type is
uint8 or uint16, by the highest id of an array; the samples of a micro-batch must have the same one, so what is written
here follows the number of experts. Source: prime-rl at 559b4477, `transports/rollouts/types.py`,
`orchestrator/trajectories.py`, `trainer/batch.py`, `trainer/rl/data.py`.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np

from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace
from moetrace.trainers.contracts.contract import Captured, Contract, Facts

PRIME_RL = Contract("prime-rl", "routed_experts", ("uint8", "uint16"), rows="tokens", layers="all", narrowed=True)


def to_prime_rl(trace: RoutingTrace, tokens: Any, num_layers: int) -> dict[str, Any]:
    """`data`, `shape` and `dtype`: `RoutedExperts(**to_prime_rl(...))`. Arguments and errors: `Contract.write`."""
    ids_nDK = PRIME_RL.write(trace, tokens, num_layers)
    return {"data": ids_nDK.tobytes(), "shape": list(ids_nDK.shape), "dtype": ids_nDK.dtype.name}


def from_prime_rl(
    payload: Any,
    tokens: Any,
    layout: MoeLayout,
    num_layers: int,
    *,
    captured: Captured,
    **facts: Unpack[Facts],
) -> RoutingTrace:
    """Read a `RoutedExperts`, or a dict of its three fields. Arguments and errors: `Contract.read`."""
    get = payload.get if isinstance(payload, dict) else lambda name: getattr(payload, name, None)
    data, shape, dtype = get("data"), get("shape"), get("dtype")
    whole = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not isinstance(data, bytes | bytearray) or shape is None or not whole or dtype not in PRIME_RL.dtypes:
        raise FormatError(
            "the payload is not prime-rl's routed_experts",
            expected=f"bytes, a shape and a dtype of {' or '.join(PRIME_RL.dtypes)}",
            got=f"{type(data).__name__}, {shape!r} and {dtype!r}",
        )
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if len(data) != size:
        raise FormatError("prime-rl's routed_experts is cut", expected=f"{size} bytes of {shape}", got=len(data))
    ids_nDK = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return PRIME_RL.read(ids_nDK, tokens, layout, num_layers, captured=captured, **facts)
