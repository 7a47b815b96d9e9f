"""SkyRL: `rollout_expert_indices`, `[R, D, K]` of a generator's output with R <= n rows from the first token on; in a
training batch `[B, S, D, K]` padded on the left, with `router_padding_mask` `[B, S]`, True where no route is.

Types are uint8, int16 or int32, by the highest id of an array. Where the mask is True a token is sent to experts 0 to
K - 1 and counted in no expert bias. Source: SkyRL at a9564572, `train/dataset/preprocess.py`,
`backends/skyrl_train/utils/routed_experts.py`, `utils/replay_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Unpack

import numpy as np

from moetrace.batch import segments_of, to_numpy
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace
from moetrace.trainers.contracts.batches import BatchContract
from moetrace.trainers.contracts.contract import Contract, Facts, Missing

SKYRL_BATCH = BatchContract(
    "SkyRL",
    "rollout_expert_indices",
    ("uint8", "int16", "int32"),
    rows="tokens",
    layers="all",
    pad="first",
    unknown="dummy",
    narrowed=True,
    side="left",
)
SKYRL = Contract(**{field.name: getattr(SKYRL_BATCH, field.name) for field in fields(Contract)} | {"rows": "prefix"})

to_skyrl, from_skyrl = SKYRL.write, SKYRL.read


def to_skyrl_batch(
    traces: Sequence[RoutingTrace],
    input_ids: Any,
    num_layers: int,
    *,
    attention_mask: Any = None,
    missing: Missing = "error",
) -> tuple[np.ndarray, np.ndarray]:
    """`rollout_expert_indices` and `router_padding_mask`. Arguments and errors: `BatchContract.write_batch`."""
    ids_BSDK = SKYRL_BATCH.write_batch(traces, input_ids, num_layers, attention_mask=attention_mask, missing=missing)
    input_ids_BS = to_numpy(input_ids)
    padding_N = np.ones(input_ids_BS.size, bool)
    for trace, segment in zip(traces, segments_of(input_ids_BS, attention_mask=attention_mask), strict=True):
        captured_n = padding_N[segment.start : segment.stop][trace.start : trace.stop]
        captured_n[:] = ~trace.valid_T[: len(captured_n)]
    return ids_BSDK, padding_N.reshape(input_ids_BS.shape)


def from_skyrl_batch(
    payload: Any,
    router_padding_mask: Any,
    input_ids: Any,
    layout: MoeLayout,
    num_layers: int,
    *,
    attention_mask: Any = None,
    **facts: Unpack[Facts],
) -> list[RoutingTrace]:
    """One trace for each sequence, not valid where the mask is True. Else as `BatchContract.read_batch`."""
    input_ids_BS, mask_BS = to_numpy(input_ids), to_numpy(router_padding_mask)
    if mask_BS.dtype != bool or mask_BS.shape != input_ids_BS.shape:
        raise FormatError(
            "SkyRL's router_padding_mask does not fit input_ids",
            expected=f"bool {list(input_ids_BS.shape)}",
            got=f"{mask_BS.dtype} {list(mask_BS.shape)}",
        )
    segments = segments_of(input_ids_BS, attention_mask=attention_mask)
    captured = [~mask_BS.reshape(-1)[segment.start : segment.stop] for segment in segments]
    return SKYRL_BATCH.read_batch(
        payload, input_ids, layout, num_layers, attention_mask=attention_mask, captured=captured, **facts
    )
