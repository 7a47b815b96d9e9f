"""verl: `routed_experts` of an agent loop's output and of its batches, int16.

An agent loop returns `[R, layers, K]` for prompt and response, any number of rows from the first token on;
`AgentLoopOutput.as_dict` makes int16 `[n, layers, K]` of it, zeros behind what there is, and the worker `[B, S, layers,
K]`, prompts padded on the left and responses on the right. A replay in mode R3 takes n or n - 1 rows of a jagged
tensor, in all layers or, counted one after another, in MoE layers, and replays every row but the last of a sequence
with a response (`build_r3_replay_mask`): a row that is missing in front of it would be taken as it stands. Source: verl
0.9.1, `experimental/agent_loop/agent_loop.py`, `workers/utils/padding.py`, `utils/megatron/router_replay_utils.py`.
"""

from __future__ import annotations

from moetrace.trainers.contracts.batches import BatchContract

VERL = BatchContract("verl", "routed_experts", ("int16",), rows="either", layers="either")

to_verl, from_verl = VERL.write, VERL.read
to_verl_batch, from_verl_batch = VERL.write_batch, VERL.read_batch
