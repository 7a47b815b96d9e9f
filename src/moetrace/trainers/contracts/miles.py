"""miles: `Sample.rollout_routed_experts`, an int32 numpy array `[n - 1, D, K]`, as SGLang returns it.

Rows of -1 are its own padding: their tokens are sent to experts 0 to K - 1, not where the router would. Source: miles
at 31f1ca96, `utils/types.py`, `rollout/session/samples/codec.py`, `backends/training_utils/replay_data.py`,
`utils/replay_base.py`.
"""

from __future__ import annotations

from moetrace.trainers.contracts.contract import Contract

MILES = Contract(
    "miles",
    "rollout_routed_experts",
    ("int32",),
    rows="inputs",
    layers="all",
    marks_missing=True,
    unknown="dummy",
    zero_dense=True,
)

to_miles, from_miles = MILES.write, MILES.read
