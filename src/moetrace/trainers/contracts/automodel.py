"""NeMo Automodel: `RouterReplay.replay(list)`, for each gate an int64 tensor `[N, K]`, in the order of the gates.

The gates of a model are those of its MoE layers, and N are all tokens of the batch in memory order, padding too: a gate
replays all rows or none. Source: nemo-automodel 0.7.0, `components/moe/router_replay.py`, `components/moe/layers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from moetrace.batch import to_numpy
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace
from moetrace.trainers.contracts.batches import BatchContract
from moetrace.trainers.contracts.contract import Captured, Facts

AUTOMODEL = BatchContract("NeMo Automodel", "replay indices", ("int64",), rows="tokens", layers="moe")


def to_automodel(traces: Sequence[RoutingTrace], input_ids: Any, **batch: Any) -> list[np.ndarray]:
    """For each MoE layer `[N, K]`. Arguments and errors: `BatchContract.write_batch`, but for `num_layers`.

    A token that stands for nothing gets distinct ids that load all experts alike.
    """
    ids_BSLK = AUTOMODEL.write_batch(traces, input_ids, **batch)
    return list(np.ascontiguousarray(ids_BSLK.reshape(-1, *ids_BSLK.shape[2:]).transpose(1, 0, 2)))


def from_automodel(
    payload: Sequence[Any],
    input_ids: Any,
    layout: MoeLayout,
    *,
    captured: Sequence[Captured],
    attention_mask: Any = None,
    position_ids: Any = None,
    cu_seqlens: Any = None,
    **facts: Unpack[Facts],
) -> list[RoutingTrace]:
    """What `RouterReplay.collect` returns, as one trace for each sequence. Else as `BatchContract.read_batch`.

    `captured` is what the recording forward is to be believed: with its tokens given, all of them.
    """
    layers = [to_numpy(ids_NK) for ids_NK in payload]
    input_ids_BS = to_numpy(input_ids)
    shapes = sorted({ids_NK.shape for ids_NK in layers})
    if len(layers) != layout.num_layers or shapes != [(input_ids_BS.size, layout.top_k)]:
        raise FormatError(
            "NeMo Automodel's replay indices do not fit input_ids and the model",
            expected=f"{layout.num_layers} of {[input_ids_BS.size, layout.top_k]}",
            got=f"{len(layers)} of {' and '.join(str(list(shape)) for shape in shapes)}",
        )
    return AUTOMODEL.read_batch(
        np.stack(layers, axis=1).reshape(*input_ids_BS.shape, layout.num_layers, layout.top_k),
        input_ids,
        layout,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        captured=captured,
        **facts,
    )
