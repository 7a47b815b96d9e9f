"""MaxText by tunix: `routed_experts` of a `TrainExample`, int16 `[B, P + C, D, K]`, which reaches the model as
`forced_routed_experts`; of one generation `[n, D, K]`, which `align_routed_experts` puts there.

Prompts are padded on the left, completions on the right. -1 in all of a row marks what was not captured, the last token
and padding; tunix means it for the router's own choice, and MaxText is reported to send such tokens to experts of no
meaning. tunix finds the end of a prompt by counting back from the last row: a sequence with one row less than it has
tokens would be shifted by one throughout. Source: tunix at 0340b3b9, `rl/common.py`; MaxText pull request 3881.
"""

from __future__ import annotations

from moetrace.trainers.contracts.batches import BatchContract

MAXTEXT = BatchContract(
    "MaxText",
    "routed_experts",
    ("int16",),
    rows="tokens",
    layers="all",
    pad="missing",
    marks_missing=True,
    unknown="dummy",
)

to_maxtext, from_maxtext = MAXTEXT.write, MAXTEXT.read
to_maxtext_batch, from_maxtext_batch = MAXTEXT.write_batch, MAXTEXT.read_batch
