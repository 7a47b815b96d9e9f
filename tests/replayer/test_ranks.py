"""Every rank gets exactly its tokens and layers, and all ranks together have the whole batch again.

Axes: B rows and S columns of a batch, N = B * S tokens in memory order, L MoE layers, K experts per token.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace, refused

from moetrace.errors import ReplayError
from moetrace.layout import MoeLayout
from moetrace.replayer import AlignedRoutes, align
from moetrace.replayer.ranks import (
    context_parallel,
    context_parallel_index,
    pipeline,
    pipeline_layers,
    sequence_parallel,
)

LAYOUT = MoeLayout((1, 2, 5), 16, 2)
examples = settings(max_examples=60, deadline=None)


def routes_of(rows: int, columns: int, *, holes: bool = True) -> AlignedRoutes:
    """A right-padded batch in which every token can be told from every other, with rows missing here and there."""
    lengths = [max(1, columns - 3 * row) for row in range(rows)]
    input_ids = np.arange(rows * columns).reshape(rows, columns)
    traces = [
        make_trace(
            ids[:n], LAYOUT, rows=n, seed=7 * number, valid=[not holes or (t + number) % 4 != 3 for t in range(n)]
        )
        for number, (ids, n) in enumerate(zip(input_ids.tolist(), lengths, strict=True))
    ]
    mask = [[int(column < n) for column in range(columns)] for n in lengths]
    return align(traces, input_ids, attention_mask=mask, missing="live")


def packed_routes(lengths: list[int]) -> AlignedRoutes:
    input_ids = list(range(sum(lengths)))
    bounds = np.cumsum((0, *lengths))
    traces = [
        make_trace(input_ids[start:stop], LAYOUT, rows=stop - start, seed=number)
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]
    return align(traces, [input_ids], cu_seqlens=bounds)


def slow_take(routes: AlignedRoutes, chosen: list[int]) -> dict[str, list]:
    """The definition of a slice, one token at a time."""
    whole = routes.experts_LNK.tolist()
    tokens = [(int(routes.sequence_N[n]), int(routes.position_N[n]), int(routes.mode_N[n])) for n in chosen]
    follows = [
        place > 0 and mode == 2 and tokens[place - 1][2] == 2 and tokens[place - 1][:2] == (sequence, position - 1)
        for place, (sequence, position, mode) in enumerate(tokens)
    ]
    return {
        "experts_LNK": [[layer[n] for n in chosen] for layer in whole],
        "mode_N": [mode for _, _, mode in tokens],
        "sequence_N": [sequence for sequence, _, _ in tokens],
        "position_N": [position for _, position, _ in tokens],
        "tokens_N": [int(routes.tokens_N[n]) for n in chosen],  # type: ignore[index]
        "follows_N": follows,
    }


def assert_equal_to_slow(sliced: AlignedRoutes, routes: AlignedRoutes, chosen: list[int]) -> None:
    for name, values in slow_take(routes, chosen).items():
        assert getattr(sliced, name).tolist() == values, name
    assert sliced.experts_LNK.flags.c_contiguous
    assert sliced.layout == routes.layout


def assert_same(a: AlignedRoutes, b: AlignedRoutes) -> None:
    for name in ("experts_LNK", "mode_N", "sequence_N", "position_N", "follows_N", "tokens_N"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def slow_context_parallel(bounds: list[int], rank: int, size: int, kind: str) -> list[int]:
    """Which tokens a rank has: piece by piece, token by token."""
    chosen = []
    for start, stop in pairwise(bounds):
        pieces = size if kind == "contiguous" else 2 * size
        for piece in [rank] if kind == "contiguous" else [rank, 2 * size - rank - 1]:
            chosen += [n for n in range(start, stop) if (n - start) // ((stop - start) // pieces) == piece]
    return chosen


kinds = st.sampled_from(["contiguous", "zigzag"])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), kinds)
@examples
def test_context_parallel_slices_of_padded_rows_equal_their_definition(
    rows: int, size: int, width: int, kind: Any
) -> None:
    columns = 2 * size * width
    routes = routes_of(rows, columns)
    chosen = []
    for rank in range(size):
        sliced = context_parallel(routes, rank, size, kind)
        mine = slow_context_parallel([row * columns for row in range(rows + 1)], rank, size, kind)
        assert_equal_to_slow(sliced, routes, mine)
        assert sliced.shape == (rows, columns // size)
        chosen += mine
    assert_same(routes.take(chosen).take(np.argsort(chosen)), routes)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 3), kinds)
@examples
def test_context_parallel_slices_of_packed_sequences_equal_their_definition(
    widths: list[int], size: int, kind: Any
) -> None:
    lengths = [2 * size * width for width in widths]
    routes, bounds = packed_routes(lengths), np.cumsum((0, *lengths)).tolist()
    parts, chosen = [], []
    for rank in range(size):
        parts.append(context_parallel(routes, rank, size, kind, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)))
        mine = slow_context_parallel(bounds, rank, size, kind)
        assert_equal_to_slow(parts[-1], routes, mine)
        chosen += mine
    assert sorted(chosen) == list(range(sum(lengths)))
    gathered = np.concatenate([part.experts_LNK for part in parts], axis=1)
    assert np.array_equal(gathered[:, np.argsort(chosen)], routes.experts_LNK)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@examples
def test_sequence_parallel_slices_are_the_chunks_of_seq_first_activations(rows: int, size: int, width: int) -> None:
    """Megatron-Core's `[S, B, H]` scattered along its first axis, as its routers see it flattened."""
    columns = size * width
    routes = routes_of(rows, columns)
    seq_first = np.arange(rows * columns).reshape(rows, columns).T.reshape(-1)
    for rank, chunk in enumerate(np.split(seq_first, size)):
        assert_equal_to_slow(sequence_parallel(routes, rank, size).sequence_first(), routes, chunk.tolist())


def test_neighbours_are_neighbours_of_the_slice_only() -> None:
    routes = packed_routes([8])
    assert routes.follows_N.tolist() == [False] + [True] * 7
    sliced = context_parallel(routes, 0, 2, "zigzag")
    assert sliced.position_N.tolist() == [0, 1, 6, 7]
    assert sliced.follows_N.tolist() == [False, True, False, True]
    middle = context_parallel(routes, 1, 2, "zigzag")  # pieces 1 and 2 happen to touch
    assert middle.position_N.tolist() == [2, 3, 4, 5]
    assert middle.follows_N.tolist() == [False, True, True, True]
    assert routes.take([1, 0, 3, 2]).follows_N.tolist() == [False] * 4


def test_the_last_token_of_one_sequence_does_not_precede_the_first_of_the_next_in_a_slice() -> None:
    routes = packed_routes([4, 4])
    sliced = context_parallel(routes, 0, 2, "contiguous", cu_seqlens=[0, 4, 8])
    assert list(zip(sliced.sequence_N.tolist(), sliced.position_N.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert sliced.follows_N.tolist() == [False, True, False, True]


# --- what other frameworks do ---


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_is_torchs_head_tail_load_balancer(size: int) -> None:
    balancer = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    length = 2 * size * 3
    index = balancer._HeadTailLoadBalancer(length, size, "cpu")._generate_indices()[0].chunk(size)
    for rank in range(size):
        assert context_parallel_index([0, length], rank, size, "zigzag").tolist() == index[rank].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_zigzag_is_what_megatron_core_slices(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("megatron.core.utils")
    monkeypatch.setattr(utils, "get_pg_size", lambda group: size)
    rows, columns = 2, 2 * size * 3
    routes = routes_of(rows, columns)
    for rank in range(size):
        monkeypatch.setattr(utils, "get_pg_rank", lambda group, rank=rank: rank)
        batch = {"tokens": torch.arange(rows * columns).view(rows, columns)}
        tokens = utils.get_batch_on_this_cp_rank(batch, cp_group=object())["tokens"]
        sliced = context_parallel(routes, rank, size, "zigzag")
        assert_same(sliced, routes.take(tokens.reshape(-1).numpy()))


def te_partitioned_indices(cu_seqlens: list[int], size: int, rank: int) -> list[int]:
    """TransformerEngine's `thd_get_partitioned_indices` as its documentation says it, token of the rank by token."""
    local = [bound // size for bound in cu_seqlens]
    chosen = []
    for token in range(local[-1]):
        sequence = max(number for number, bound in enumerate(local[:-1]) if bound <= token)
        half = (local[sequence + 1] - local[sequence]) // 2
        within = token - local[sequence]
        piece = rank if within < half else 2 * size - 1 - rank
        chosen.append(cu_seqlens[sequence] + piece * half + within % half)
    return chosen


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 4))
@examples
def test_packed_zigzag_is_transformer_engines_partition(widths: list[int], size: int) -> None:
    bounds = np.cumsum([0, *(2 * size * width for width in widths)]).tolist()
    for rank in range(size):
        assert context_parallel_index(bounds, rank, size, "zigzag").tolist() == te_partitioned_indices(
            bounds, size, rank
        )


# --- refusals of token slices ---


def test_rows_that_cannot_be_cut_are_refused_by_number_with_the_padding_they_need() -> None:
    routes = packed_routes([8, 6])
    what = "row or sequence 1 cannot be cut into 4 equal pieces (zigzag, 2 ranks)"
    with refused(ReplayError, what, expected="a multiple of 4 tokens", got=6, fix="before the routes are aligned"):
        context_parallel(routes, 0, 2, "zigzag", cu_seqlens=[0, 8, 14])
    with refused(ReplayError, "cannot be cut into 3 equal pieces (contiguous, 3 ranks)"):
        context_parallel(routes, 0, 3)
    with refused(ReplayError, "cannot be cut into 4 equal pieces"):
        sequence_parallel(routes, 0, 4)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_not_there_is_refused(rank: int, size: int) -> None:
    with refused(ReplayError, "there is no such rank", expected=f"0 <= rank < {size}", got=rank):
        context_parallel(packed_routes([8]), rank, size)


def test_boundaries_that_do_not_cover_the_batch_are_refused() -> None:
    routes = packed_routes([4, 4])
    with refused(ReplayError, "do not end with the batch", expected="from 0 to 8", fix="cu_seqlens_q_padded"):
        context_parallel(routes, 0, 2, cu_seqlens=[0, 4])
    for bounds in ([4, 8], [0, 6, 4, 8]):
        with refused(ReplayError, "boundaries must ascend from 0"):
            context_parallel(routes, 0, 2, cu_seqlens=bounds)
    with refused(ReplayError, "kind is unknown", got="'striped'"):
        context_parallel(routes, 0, 2, "striped")  # type: ignore[arg-type]


def test_tokens_in_another_order_are_not_sliced_by_columns() -> None:
    routes = routes_of(2, 4)
    for other in (routes.sequence_first(), routes.take([3, 1, 2])):
        for slice_it in (lambda it: context_parallel(it, 0, 1), lambda it: sequence_parallel(it, 0, 1)):
            with refused(ReplayError, "in no batch's memory order any more", fix="first, then reorder"):
                slice_it(other)
        with refused(ReplayError, "in no batch's memory order any more"):
            other.sequence_first()


# --- pipeline stages ---


def test_a_stage_gets_its_layers_by_absolute_number() -> None:
    routes = routes_of(2, 6)
    stage = pipeline(routes, range(2, 6))
    assert stage is not None
    assert stage.layout == MoeLayout((2, 5), 16, 2)
    assert stage.experts_LNK.tolist() == routes.experts_LNK[[1, 2]].tolist()
    assert stage.experts_LNK.flags.c_contiguous
    assert np.array_equal(stage.mode_N, routes.mode_N)
    assert pipeline(routes, [0, 3, 4]) is None  # dense layers only
    assert pipeline(routes, range(6)) is routes


def test_a_stage_knows_no_fingerprint_of_the_whole_model() -> None:
    trace = make_trace([1, 2, 3], LAYOUT, fingerprint="f00d")
    routes = align([trace], [[1, 2, 3]])
    stage, whole = pipeline(routes, [1]), pipeline(routes, [1, 2, 5])
    assert stage is not None
    assert whole is not None
    assert (stage.fingerprint, whole.fingerprint) == ("", "f00d")


def test_both_routers_of_a_layer_go_to_its_stage() -> None:
    layout = MoeLayout((0, 0, 1, 1), 8, 2)
    routes = align([make_trace([1, 2, 3], layout)], [[1, 2, 3]])
    stage = pipeline(routes, [1])
    assert stage is not None
    assert stage.layout.layers == (1, 1)
    assert stage.experts_LNK.tolist() == routes.experts_LNK[2:].tolist()


def test_a_stage_of_no_layers_or_of_one_twice_is_refused() -> None:
    for layers in ([], [1, 1]):
        with refused(ReplayError, "a stage has some layers, each once", got=layers):
            pipeline(routes_of(1, 2), layers)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4))
@examples
def test_all_stages_together_have_every_layer_once_in_the_order_they_run(
    size: int, chunks: int, per_chunk: int, dense: int
) -> None:
    num_layers = size * chunks * per_chunk
    in_order = [
        layer
        for chunk in range(chunks)
        for rank in range(size)
        for layer in pipeline_layers(num_layers, rank, size, chunk=chunk, chunks=chunks)
    ]
    assert in_order == list(range(num_layers))
    moe = tuple(range(min(dense, num_layers - 1), num_layers))
    routes = align([make_trace([1, 2, 3, 4], MoeLayout(moe, 16, 2))], [[1, 2, 3, 4]])
    stages = [
        pipeline(routes, pipeline_layers(num_layers, rank, size, chunk=chunk, chunks=chunks))
        for chunk in range(chunks)
        for rank in range(size)
    ]
    gathered = np.concatenate([stage.experts_LNK for stage in stages if stage is not None])
    assert np.array_equal(gathered, routes.experts_LNK)


def test_first_and_last_ranks_may_have_other_numbers_of_layers() -> None:
    assert [list(pipeline_layers(7, rank, 3, first=1, last=2)) for rank in range(3)] == [[0], [1, 2, 3, 4], [5, 6]]
    assert [list(pipeline_layers(7, rank, 3, last=1)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(pipeline_layers(3, rank, 2, first=1, last=2)) for rank in range(2)] == [[0], [1, 2]]
    interleaved = [list(pipeline_layers(10, rank, 3, chunk=1, chunks=2, first=2, last=4)) for rank in range(3)]
    assert interleaved == [[5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("num_layers", "size", "chunks", "first", "last"),
    [(8, 2, None, None, None), (12, 3, 2, None, None), (7, 3, None, 1, 2), (16, 4, 2, 2, 2), (9, 3, None, None, 1)],
)
def test_stages_are_where_megatron_core_puts_them(
    num_layers: int, size: int, chunks: int | None, first: int | None, last: int | None
) -> None:
    layer = pytest.importorskip("megatron.core.transformer.transformer_layer")
    config = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    for rank in range(size):
        for chunk in range(chunks or 1):
            mine = pipeline_layers(num_layers, rank, size, chunk=chunk, chunks=chunks or 1, first=first, last=last)
            vp_stage = None if chunks is None else chunk
            assert mine.start == layer.get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)


def test_layers_that_cannot_be_split_are_refused() -> None:
    with refused(ReplayError, "cannot be split evenly over the pipeline", expected="a multiple of 3", got="7 of 7"):
        pipeline_layers(7, 0, 3)
    with refused(ReplayError, "cannot be split into 2 chunks", expected="a multiple of 2", got=[3, 3]):
        pipeline_layers(6, 0, 2, chunks=2)
    with refused(ReplayError, "cannot be split evenly", expected="no layer left", got="1 of 6"):
        pipeline_layers(6, 0, 2, first=2, last=3)
    with refused(ReplayError, "cannot be split evenly", got="-1 of 4"):
        pipeline_layers(4, 0, 3, first=3, last=2)
    with refused(ReplayError, "one rank has all layers"):
        pipeline_layers(4, 0, 1, first=4)
    with refused(ReplayError, "there is no such chunk"):
        pipeline_layers(4, 0, 2, chunk=1)
