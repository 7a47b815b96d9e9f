"""slime: `Sample.rollout_routed_experts`, int32 `[n - 1, D, K]`, as SGLang returns it.

The trainer counts the rows, refuses a MoE layer that is zero throughout, and fills up the last token and its padding
by itself. Nothing says that a row is missing. Source: slime at 624b824a, `utils/types.py`,
`observability/rollout_data_utils.py`, `backends/megatron_utils/cp_utils.py`.
"""

from __future__ import annotations

from moetrace.trainers.contracts.contract import Contract

SLIME = Contract("slime", "rollout_routed_experts", ("int32",), rows="inputs", layers="all", zero_dense=True)

to_slime, from_slime = SLIME.write, SLIME.read
