"""Replay under Megatron-Core's own parallelism: two gloo ranks, its real schedules, against one process without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_two_ranks

pytest.importorskip("megatron.core")

import megatron_models as mm
from megatron_worker import COLUMNS, MICROBATCHES, ROWS, alone, microbatch, with_weights_by_name

WORKER = Path(__file__).with_name("megatron_worker.py")
pytestmark = pytest.mark.filterwarnings("ignore")  # Megatron-Core's own deprecations


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each plan's ranks saw, and what is right."""
    folder = tmp_path_factory.mktemp("megatron")
    with mm.on_cpu():
        whole = mm.model()
        torch.save([router.weight.detach() for router in mm.routers_of(whole)], folder / "weights.pt")
        right = {"sequence": alone(whole), "pipeline": alone(with_weights_by_name(mm.model()))}
    right["virtual"] = right["pipeline"]
    run_two_ranks(WORKER, folder)
    return right | {path.stem: torch.load(path) for path in folder.glob("*-[01].pt")}


def given(number: int, layer: int, columns: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some columns, in the order `[S, B]`: which tokens are replayed, and the experts they must reach."""
    routes = microbatch(number)[1]
    ids = routes.experts_LNK[mm.LAYERS.index(layer)].reshape(ROWS, COLUMNS, mm.TOP_K)[:, columns]
    replayed = torch.from_numpy(mm.sequence_major((routes.mode_N == 2).reshape(ROWS, COLUMNS)[:, columns]))
    return replayed, mm.one_hot(mm.sequence_major(ids))


def require_gradients(found: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> None:
    for layer, gradient in found.items():
        torch.testing.assert_close(gradient, right[layer], rtol=1e-4, atol=1e-7)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_sequence_parallel_ranks_replay_their_columns(seen: dict[str, Any], rank: int) -> None:
    found = seen[f"sequence-{rank}"]
    half = COLUMNS // 2
    for number in range(MICROBATCHES):
        for layer, map_NE in found["chosen"][number * 3 : number * 3 + 3]:
            replayed_N, right_NE = given(number, layer, slice(rank * half, (rank + 1) * half))
            assert torch.equal(map_NE[replayed_N], right_NE[replayed_N])
    for output, right in zip(found["outputs"], seen["sequence"]["outputs"], strict=True):
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-4)
    require_gradients(found["gradients"], seen["sequence"]["gradients"])


@pytest.mark.parametrize("plan", ["pipeline", "virtual"])
def test_stages_replay_their_layers_with_several_microbatches_in_flight(seen: dict[str, Any], plan: str) -> None:
    layers: list[int] = []
    for rank in range(2):
        found = seen[f"{plan}-{rank}"]
        layers += found["gradients"]
        for layer in found["gradients"]:
            maps = [map_NE for of, map_NE in found["chosen"] if of == layer]
            assert len(maps) == 2 * MICROBATCHES, "a forward-only step and a training step"
            for number, map_NE in enumerate(maps):
                replayed_N, right_NE = given(number % MICROBATCHES, layer)
                assert torch.equal(map_NE[replayed_N], right_NE[replayed_N])
        require_gradients(found["gradients"], seen[plan]["gradients"])
    assert sorted(layers) == list(mm.LAYERS)
    dense_and_two = {"pipeline": ([1], [2, 3]), "virtual": ([2], [1, 3])}
    assert tuple(list(seen[f"{plan}-{rank}"]["gradients"]) for rank in range(2)) == dense_and_two[plan]
