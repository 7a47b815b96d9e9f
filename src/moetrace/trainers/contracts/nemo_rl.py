"""NeMo-RL: `routed_experts`, the narrowest signed type that holds E, `[n, layers, K]` of the messages of a log, `[B, S,
layers, K]` of a batch padded on the right.

-1 in all of a row sends its token to where the model's own router would. The last token's row, padding, and what an
environment says behind the last generation hold experts 0 to K - 1, which look like a route. Layers are all, or MoE
layers one after another. Source: NeMo-RL at 7ea279ab, `models/generation/interfaces.py`,
`models/generation/vllm/utils.py`, `experience/rollouts.py`, `models/megatron/router_replay.py`.
"""

from __future__ import annotations

from moetrace.trainers.contracts.batches import BatchContract

NEMO_RL = BatchContract(
    "NeMo-RL",
    "routed_experts",
    ("int8", "int16", "int32"),
    rows="tokens",
    layers="either",
    pad="first",
    marks_missing=True,
    unknown="live",
    side="right",
)

to_nemo_rl, from_nemo_rl = NEMO_RL.write, NEMO_RL.read
to_nemo_rl_batch, from_nemo_rl_batch = NEMO_RL.write_batch, NEMO_RL.read_batch
