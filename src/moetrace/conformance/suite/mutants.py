"""Mutants: engines broken as real ones were, the proof that the suite convicts, and names what it sees.

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from moetrace.conformance.dye.form import DyeForm, digits_for
from moetrace.conformance.suite import bends
from moetrace.conformance.suite.broken import Broken, Mutant
from moetrace.conformance.suite.bugs import Bug
from moetrace.conformance.suite.oracle import Oracle
from moetrace.conformance.suite.report import Report
from moetrace.conformance.suite.run import check_engine
from moetrace.conformance.suite.session import Plan

_MANY = {"num_experts": 320}

MUTANTS: tuple[Mutant, ...] = (
    Mutant("rows one token ahead (overlapped scheduling)", Bug.SHIFTED, bends.ids(bends.ahead)),
    Mutant("rows one token behind", Bug.SHIFTED, bends.ids(bends.behind), also=frozenset({Bug.REPEATED})),
    Mutant("no row for the last input", Bug.LAST_ROW, bends.ids(lambda b, q, a, ids: ids[:-1])),
    Mutant("a scored prompt loses its last row", Bug.LAST_ROW, bends.ids(bends.only_scored)),
    Mutant(
        "no row for the last prompt token",
        Bug.PROMPT_ROW,
        bends.ids(bends.no_prompt_row),
        also=frozenset({Bug.LAST_ROW}),
    ),
    Mutant("a row for the token that was sampled last", Bug.EXTRA, bends.ids(bends.last_token_too)),
    Mutant("one row comes twice", Bug.DUPLICATED, bends.ids(bends.twice), also=frozenset({Bug.OVERLAP})),
    Mutant("one row comes twice, the last is cut off", Bug.DUPLICATED, bends.ids(bends.twice_cut)),
    Mutant("rows cut off under load", Bug.TRUNCATED, bends.ids(bends.busy_cut)),
    Mutant("two layers swapped", Bug.LAYER_MAP, bends.ids(bends.swapped)),
    Mutant("layers in reverse", Bug.LAYER_MAP, bends.ids(lambda b, q, a, ids: ids[:, ::-1])),
    Mutant("dense first layer counted", Bug.DENSE_COUNTED, bends.ids(bends.dense_first)),
    Mutant(
        "dense first layer counted, the last one cut off",
        Bug.LAYER_MAP,
        bends.ids(lambda b, q, a, ids: bends.dense_first(b, q, a, ids)[:, :-1]),
    ),
    Mutant("a draft head overwrites the first layer", Bug.SHIFTED, bends.ids(bends.draft), "layers 1 only"),
    Mutant("some rows never written", Bug.ZEROS, bends.put(lambda b, q, rows: slice(3, None, 7), 0)),
    Mutant("the last row never written", Bug.ZEROS, bends.put(lambda b, q, rows: rows - 1, 0), "last row"),
    Mutant(
        "a padding row at every chunk boundary",
        Bug.ZEROS,
        bends.put(lambda b, q, rows: slice(256 - q.start, None, 256), 0),
        "256",
    ),
    Mutant(
        "rows of a cached prefix hold the fill value",
        Bug.FILL,
        bends.put(lambda b, q, rows: slice(0, 0 if q.start else b.shared(q)), 255),
        "prefix asked before",
    ),
    Mutant("rows of a cached prefix do not come", Bug.HEAD, bends.ids(bends.prefix_gone), also=frozenset({Bug.SHARD})),
    Mutant("rows of a cached prefix are marked missing", Bug.MISSING, bends.unmarked, "prefix asked before"),
    Mutant(
        "rows of a cached prefix are another prompt's",
        Bug.STALE_PREFIX,
        bends.ids(bends.stale_prefix),
        "prefix asked before",
        also=frozenset({Bug.OTHER_SEQUENCE}),
    ),
    Mutant("rows of a cached prefix outlive their weights", Bug.STALE_WEIGHTS, bends.ids(bends.stale_weights)),
    Mutant(
        "rows of a neighbour in the batch",
        Bug.OTHER_SEQUENCE,
        bends.ids(bends.neighbour),
        also=frozenset({Bug.STALE_PREFIX}),
    ),
    Mutant(
        "a replayed graph repeats one token's routes",
        Bug.REPEATED,
        bends.ids(bends.replayed),
        also=frozenset({Bug.DUPLICATED}),
    ),
    Mutant("every sample has the last one's rows", Bug.SAMPLES, bends.last_sample),
    Mutant("physical ids", Bug.PHYSICAL, bends.ids(bends.physical)),
    Mutant("rank order lost", Bug.RANK_LOST, bends.ids(lambda b, q, a, ids: np.sort(ids))),
    Mutant(
        "ids as int8", Bug.OVERFLOW, bends.ids(lambda b, q, a, ids: ids.astype(np.int8).astype(np.int64)), form=_MANY
    ),
    Mutant(
        "ids as uint8", Bug.OVERFLOW, bends.ids(lambda b, q, a, ids: ids.astype(np.uint8).astype(np.int64)), form=_MANY
    ),
    Mutant("ids within one of two ranks", Bug.SHARD, bends.ids(lambda b, q, a, ids: ids % (b.form.num_experts // 2))),
    Mutant("half of the rows written", Bug.SHARD, bends.ids(bends.half_written), also=frozenset({Bug.ZEROS})),
    Mutant("every second row", Bug.SHARD, bends.ids(lambda b, q, a, ids: ids[::2]), also=frozenset({Bug.LAST_ROW})),
    Mutant(
        "a shared expert widens K", Bug.WIDTH, bends.ids(lambda b, q, a, ids: np.pad(ids, ((0, 0), (0, 0), (0, 1))))
    ),
    Mutant("K cut short", Bug.WIDTH, bends.ids(lambda b, q, a, ids: ids[..., :-1])),
    Mutant("axes swapped", Bug.AXES, bends.ids(lambda b, q, a, ids: ids.transpose(1, 0, 2).reshape(ids.shape))),
    Mutant("the start offset is ignored", Bug.OFFSET, bends.ids(bends.start_ignored)),
    Mutant("an aborted request loses its rows", Bug.NO_ROWS, bends.abort_empties),
    Mutant("pieces of a stream overlap", Bug.OVERLAP, bends.overlapping),
)
"""All of them. The form they are tried on has one dense layer first, and a rank order."""

_PLAN = Plan(requests=24, max_tokens=700, flood_tokens=1200, pressure=6, pressure_tokens=48)


def trial_form(num_experts: int = 64) -> DyeForm:
    """The checkpoint of trials: one dense layer first, then three with experts, in rank order."""
    digits = digits_for(4096, two=True)
    return DyeForm("qwen3_moe", digits, num_experts, 4, (1, 2, 3), 4, eos_token_id=math.prod(digits) - 1)


def trial(mutant: Mutant | None = None, *, seed: int = 0) -> Report:
    """Run the suite, small, on an oracle that a mutant has broken; on the sound one without."""
    form = trial_form(**(mutant.form if mutant else {}))
    oracle = Oracle(form)
    with tempfile.TemporaryDirectory() as folder:
        for version in (0, 1):
            place = Path(folder) / str(version)
            place.mkdir()
            replace(form, weight_version=version).save(place)
        subject = Broken(oracle, form, mutant) if mutant else oracle
        return check_engine(subject, Path(folder) / "0", plan=replace(_PLAN, seed=seed), update_dye=Path(folder) / "1")
