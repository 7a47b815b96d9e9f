"""A step's ids become rows exactly, and padding never does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, ONE_OF_EACH, build, experts_spy, random_tokens

from moetrace.errors import CaptureError
from moetrace.layout import MoeLayout
from moetrace.recorder import Staging, commit_rows
from moetrace.routers import tap_model

CPU = torch.device("cpu")


def rows_of_slow_twin(ids_LNK: torch.Tensor, num_tokens: int) -> list[list[list[int]]]:
    """`[N][L][K]` by plain loops over Python integers."""
    layers, _, top_k = ids_LNK.shape
    return [
        [[int(ids_LNK[layer, token, k]) for k in range(top_k)] for layer in range(layers)]
        for token in range(num_tokens)
    ]


def filled(layout: MoeLayout, capacity: int) -> Staging:
    """Staging with distinct random ids everywhere, the largest id among them."""
    staging = Staging(layout, capacity, CPU)
    generator = torch.Generator().manual_seed(layout.num_experts)
    draws = torch.rand(layout.num_layers, capacity, layout.num_experts, generator=generator)
    staging.ids_LNK.copy_(draws.argsort(-1)[..., : layout.top_k])
    staging.ids_LNK[0, 0, 0] = layout.num_experts - 1
    staging.ids_LNK[0, 0, 1] = 0
    return staging


@pytest.mark.parametrize(
    ("num_experts", "dtype", "numpy_dtype"),
    [
        (8, torch.uint8, np.uint8),
        (128, torch.uint8, np.uint8),
        (255, torch.uint8, np.uint8),
        (256, torch.uint8, np.uint8),
        (257, torch.uint16, np.uint16),
        (300, torch.uint16, np.uint16),
        (512, torch.uint16, np.uint16),
    ],
)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 12])
def test_committed_rows_equal_a_plain_loop(
    num_experts: int, dtype: torch.dtype, numpy_dtype: type, num_tokens: int
) -> None:
    layout = MoeLayout((1, 2, 5), num_experts, 4)
    staging = filled(layout, capacity=12)
    rows_NLK = commit_rows(staging, num_tokens)
    assert rows_NLK.dtype == dtype
    assert rows_NLK.shape == (num_tokens, 3, 4)
    assert rows_NLK.is_contiguous()
    as_numpy = rows_NLK.numpy()
    assert as_numpy.dtype == numpy_dtype == layout.dtype
    assert as_numpy.tolist() == rows_of_slow_twin(staging.ids_LNK, num_tokens)


def test_committed_rows_do_not_change_when_the_next_step_overwrites_staging() -> None:
    staging = filled(MoeLayout((0, 1), 300, 2), capacity=6)
    rows_NLK = commit_rows(staging, 6)
    expected = rows_of_slow_twin(staging.ids_LNK, 6)
    staging.ids_LNK.fill_(7)
    assert rows_NLK.numpy().tolist() == expected


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_staging_holds_what_the_experts_received(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    tap = tap_model(model)
    staging = Staging(tap.layout, 32, CPU)
    address = staging.ids_LNK.data_ptr()
    with torch.no_grad(), tap.active(staging), experts_spy(model, name) as spy:
        model(tokens)
    assert torch.equal(staging.ids_LNK[:, :20], spy.last())
    assert commit_rows(staging, 20).numpy().tolist() == rows_of_slow_twin(spy.last(), 20)
    assert staging.order == FAMILIES[name].order
    assert staging.ids_LNK.data_ptr() == address


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_padding_rows_of_a_step_are_never_committed(name: str) -> None:
    model = build(name)
    tap = tap_model(model)
    staging = Staging(tap.layout, 24, CPU)
    staging.ids_LNK.fill_(-1)
    padded = torch.cat([random_tokens(1, 9, seed=1), torch.zeros(1, 7, dtype=torch.int64)], dim=1)
    with torch.no_grad(), tap.active(staging), experts_spy(model, name) as spy:
        model(padded)
    rows_NLK = commit_rows(staging, 9)
    assert rows_NLK.numpy().tolist() == rows_of_slow_twin(spy.last()[:, :9], 9)
    assert (staging.ids_LNK[:, 16:] == -1).all()  # a step writes its own tokens only


def test_a_shorter_step_leaves_no_row_of_the_longer_one_before() -> None:
    model = build("mixtral")
    tap = tap_model(model)
    staging = Staging(tap.layout, 16, CPU)
    with torch.no_grad(), tap.active(staging), experts_spy(model, "mixtral") as spy:
        model(random_tokens(1, 16, seed=1))
        model(random_tokens(1, 3, seed=2))
    assert commit_rows(staging, 3).numpy().tolist() == rows_of_slow_twin(spy.last(), 3)


def test_a_step_that_staging_cannot_hold_is_refused() -> None:
    model = build("mixtral")
    tap = tap_model(model)
    staging = Staging(tap.layout, 8, CPU)
    assert staging.capacity == 8
    with torch.no_grad(), tap.active(staging):
        model(random_tokens(1, 8))
        with pytest.raises(CaptureError, match="expected <= 8, got 9"):
            model(random_tokens(1, 9))


def test_committing_more_tokens_than_staging_holds_is_refused_not_cut_short() -> None:
    with pytest.raises(CaptureError):
        commit_rows(filled(MoeLayout((0, 1), 300, 2), capacity=6), 7)
