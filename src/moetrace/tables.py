"""Traces as tables: one row a sequence, in Parquet, for SQL engines, pandas and Hugging Face `datasets`.

Axes: T rows, L MoE layers, K experts per token. A row of a trace that was not captured is a null, not a list of zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import FormatError, LayoutMismatchError, MissingExtraError, MoetraceError
from moetrace.files import whole_file
from moetrace.layout import MoeLayout
from moetrace.spans import WeightSpan
from moetrace.tokens import as_token_ids
from moetrace.trace import RoutingTrace

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise MissingExtraError.of(error, "tables") from error

GROUP = 64
"""Sequences of a row group: what is held in memory at once, and what a reader may skip."""
_FACTS = ("num_tokens", "token_sha256", "start", "order", "fingerprint", "engine")


def export_parquet(traces: Iterable[tuple[str, RoutingTrace]], path: str | os.PathLike[str]) -> int:
    """Write named traces of one layout to a Parquet file, which appears whole or not at all.

    Columns: `name`; `tokens` (list of uint32, null where only their hash is known); `experts` (list of T nullable
    `[L][K]` of uint8 or uint16); `layers`, `num_experts`, `top_k`; `weight_spans` (list of `start`, `version`); and
    `num_tokens`, `token_sha256`, `start`, `order`, `fingerprint`, `engine` as `RoutingTrace` has them.

    Args:
        traces: (name, trace) pairs; only `GROUP` of them are held at once.
        path: of the file.

    Returns:
        how many sequences were written.

    Raises:
        LayoutMismatchError: a trace has another layout than the first one; export them apart.
        FormatError: there are no traces, so the columns' types are unknown; or one has no name.
    """
    pairs = map(_named, traces if isinstance(traces, Iterable) else [traces])
    group = list(islice(pairs, GROUP))
    if not group:
        raise FormatError("there is nothing to export", expected="at least one trace", got="none")
    layout, count = group[0][1].layout, 0
    schema = _schema(layout)
    with whole_file(Path(path)) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while group:
            writer.write_table(_table(group, layout, schema), row_group_size=GROUP)
            count += len(group)
            group = list(islice(pairs, GROUP))
    return count


def read_parquet(path: str | os.PathLike[str]) -> Iterator[tuple[str, RoutingTrace]]:
    """The named traces of a file that `export_parquet` wrote, one row group at a time.

    Raises:
        FormatError: the file is no such table, or damaged; a row is not that of a trace.
        OSError: there is no such file, or it cannot be opened.
    """
    return ((name, trace_of(row)) for name, row in read_rows(path))


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names of a file that `export_parquet` wrote, each with its row, see `trace_of`; one row group at a time.

    Raises:
        FormatError: the file is no such table, or damaged.
        OSError: there is no such file, or it cannot be opened.
    """
    with Path(path).open("rb") as opened:
        try:
            with pq.ParquetFile(opened) as file:
                for group in file.iter_batches(batch_size=GROUP):
                    for row in group.to_pylist():
                        if not isinstance(row.get("name"), str):
                            raise FormatError(f"{path} has no names", expected="a column `name`", got=", ".join(row))
                        yield row["name"], row
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise FormatError(f"{path} is no Parquet file, or damaged", got=str(error).partition("\n")[0]) from error


def trace_of(row: Mapping[str, Any]) -> RoutingTrace:
    """The trace of one row, as `datasets`, pandas or pyarrow give it: a mapping of the columns to plain lists.

    Raises:
        FormatError: a column is missing, or the values are not those of a trace.
    """
    try:
        layout = MoeLayout(tuple(row["layers"]), row["num_experts"], row["top_k"])
        valid_T = np.array([experts is not None for experts in row["experts"]], bool)
        experts_TLK = np.zeros((len(valid_T), layout.num_layers, layout.top_k), layout.dtype)
        if valid_T.any():
            experts_TLK[valid_T] = _ids_of([experts for experts in row["experts"] if experts is not None], layout)
        return RoutingTrace(
            experts_TLK,
            valid_T,
            layout,
            None if row["tokens"] is None else as_token_ids(row["tokens"]),
            weight_spans=tuple(WeightSpan(span["start"], span["version"]) for span in row["weight_spans"]),
            **{name: row[name] for name in _FACTS},
        )
    except MoetraceError as error:
        raise FormatError(f"the row is not that of a trace ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"the row is not that of a trace ({error!r})", expected="the columns of export_parquet"
        ) from error


def _ids_of(rows: Sequence[Any], layout: MoeLayout) -> np.ndarray:
    """`[V, L, K]` of nested lists, of the layout's type; no id changes on the way there."""
    ids, shape = np.array(rows), (len(rows), layout.num_layers, layout.top_k)
    if ids.shape != shape or ids.dtype.kind not in "iu":
        raise FormatError(
            "the experts are not those of its layout",
            expected=f"shape {shape}, integers",
            got=f"shape {ids.shape}, dtype {ids.dtype}",
        )
    if not 0 <= ids.min() <= ids.max() < layout.num_experts:
        raise FormatError(
            "an expert id is out of range",
            expected=f"0 <= id < {layout.num_experts}",
            got=f"{ids.min()} to {ids.max()}",
        )
    return ids.astype(layout.dtype)


def _named(pair: object) -> tuple[str, RoutingTrace]:
    match pair:
        case (str(name), RoutingTrace() as trace):
            return name, trace
    raise FormatError(
        "each row of a table has a name",
        expected="(name, RoutingTrace) pairs",
        got=repr(pair)[:80],
        fix="Name them: zip(names, traces).",
    )


def _schema(layout: MoeLayout) -> pa.Schema:
    ids = pa.uint8() if layout.num_experts <= 256 else pa.uint16()
    route = pa.list_(pa.field("element", ids), layout.top_k)
    experts = pa.list_(pa.field("element", pa.list_(pa.field("element", route), layout.num_layers)))
    span = pa.struct({"start": pa.int64(), "version": pa.string()})
    texts = {name: pa.string() for name in ("token_sha256", "order", "fingerprint", "engine")}
    columns: dict[str, pa.DataType] = {"name": pa.string(), "tokens": pa.list_(pa.uint32()), "experts": experts}
    columns |= {"layers": pa.list_(pa.int32()), "num_experts": pa.int32(), "top_k": pa.int32()}
    columns |= {"weight_spans": pa.list_(span), "num_tokens": pa.int64(), "start": pa.int64()} | texts
    return pa.schema(columns)


def _table(group: list[tuple[str, RoutingTrace]], layout: MoeLayout, schema: pa.Schema) -> pa.Table:
    for name, trace in group:
        if trace.layout != layout:
            raise LayoutMismatchError(
                f"{name!r} has another layout than the traces before it",
                expected=layout,
                got=trace.layout,
                fix="Export the traces of each model to a file of their own.",
            )
    traces = [trace for _, trace in group]
    columns: dict[str, Any] = {
        "name": [name for name, _ in group],
        "tokens": pa.array([trace.tokens for trace in traces], pa.list_(pa.uint32())),
        "experts": _experts(traces, layout, schema.field("experts").type),
        "layers": [list(layout.layers)] * len(traces),
        "num_experts": [layout.num_experts] * len(traces),
        "top_k": [layout.top_k] * len(traces),
        "weight_spans": [[vars(span) for span in trace.weight_spans] for trace in traces],
    }
    columns |= {name: [getattr(trace, name) for trace in traces] for name in _FACTS}
    return pa.table(columns, schema=schema)


def _experts(traces: list[RoutingTrace], layout: MoeLayout, kind: pa.DataType) -> pa.Array:
    ids = pa.array(np.concatenate([trace.experts_TLK.reshape(-1) for trace in traces]))
    missing = pa.array(~np.concatenate([trace.valid_T for trace in traces]))
    routes = pa.FixedSizeListArray.from_arrays(ids, layout.top_k)
    rows = pa.FixedSizeListArray.from_arrays(routes, layout.num_layers, mask=missing)
    ends = np.cumsum([0, *map(len, traces)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), rows).cast(kind)
