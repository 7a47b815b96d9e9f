"""Every MoE architecture of the installed transformers is recorded and replayed, or refused for a named reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tapped import NAMES, REFUSED, TAPPED, found

from moetrace.conformance import zoo
from moetrace.conformance.census import examine
from moetrace.errors import RouterError, UnsupportedRouterError
from moetrace.recorder import record
from moetrace.replayer import replay
from moetrace.routers import find_routers, selection, tap_model
from moetrace.routers.find import traits_of
from moetrace.trace import RoutingTrace


@pytest.mark.parametrize("name", NAMES)
def test_a_family_works_or_is_refused_by_name(name: str) -> None:
    finding = found(name)
    if name in REFUSED:
        assert REFUSED[name] in finding.refusal
        assert not finding.works
    else:
        assert finding.works, finding


@pytest.mark.parametrize("name", TAPPED)
@pytest.mark.parametrize(
    ("dtype", "experts"),
    [
        (torch.bfloat16, "eager"),
        (torch.bfloat16, "batched_mm"),
        (torch.bfloat16, "grouped_mm"),
        (torch.float32, "batched_mm"),
        (torch.float32, "grouped_mm"),
    ],
)
def test_a_family_works_in_every_dtype_and_with_every_experts_implementation(name, dtype, experts) -> None:
    architecture = zoo.architecture(name)
    try:
        zoo.tiny(architecture, dtype=dtype, experts_implementation=experts)(torch.ones(1, 4, dtype=torch.long))
    except RuntimeError as error:
        if transformers.__version__ != "5.17.0":
            raise
        pytest.skip(f"the model itself does not run so in this release ({error})")
    finding = examine(architecture, dtype=dtype, experts_implementation=experts)
    assert finding.replayed
    assert finding.gradient
    assert finding.received is not False
    assert finding.altered is not False


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", TAPPED)
def test_a_family_recomputes_with_the_routes_it_was_given(name: str, reentrant: bool) -> None:
    ids_BS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    model = zoo.tiny(zoo.architecture(name))
    if not model.supports_gradient_checkpointing:
        pytest.skip("the model itself has no gradient checkpointing")
    layout = tap_model(model).layout
    real = 8 if layout.num_experts == 9 else layout.num_experts
    order = torch.rand(12, layout.num_layers, real, generator=torch.Generator().manual_seed(2)).argsort(-1)
    trace = RoutingTrace.build(order[..., : layout.top_k].numpy(), layout, ids_BS[0].numpy())

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with replay(model, trace, input_ids=ids_BS, on_shift="ignore"):
            logits = model(input_ids=ids_BS, use_cache=False).logits
        logits.float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    for site in find_routers(model):
        site.module.train(not traits_of(site.module).in_turn)
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max() + 1))


def test_a_tap_that_forgets_the_mask_is_convicted(monkeypatch) -> None:
    monkeypatch.setattr(selection.SelectionMode, "_unmasked", lambda self, scores: scores)
    finding = examine(zoo.architecture("deepseek_v2"))
    assert not finding.works
    assert finding.altered is False
    assert finding.gradient == ""


def test_a_tap_that_gathers_other_scores_is_convicted(monkeypatch) -> None:
    monkeypatch.setattr(selection.SelectionMode, "_unmasked", lambda self, scores: scores.roll(1, -1))
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert not examine(zoo.architecture(name)).works


def test_a_router_tapped_at_another_method_is_not_tapped_twice() -> None:
    model: Any = zoo.tiny(zoo.architecture("dbrx"))
    with record(model), pytest.raises(UnsupportedRouterError, match="already tapped"), record(model.transformer):
        pass
    assert all("route_tokens_to_experts" not in vars(module) for module in model.modules())


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RouterError, match=r"no MoE architecture of this name: expected .*mixtral.*got nowhere"):
        zoo.architecture("nowhere")


def test_what_was_left_out_has_a_reason() -> None:
    assert zoo.excluded()
    assert all(item.reason for item in zoo.excluded())


def test_the_families_page_is_fresh() -> None:
    page = Path("docs/families.md").read_text()
    written_under = page.partition("architecture of transformers ")[2].partition(",")[0]
    if written_under != transformers.__version__:
        pytest.skip(f"the page was written under transformers {written_under}")
    done = subprocess.run(
        [sys.executable, "scripts/families.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_lowest_release_is_the_lowest_supported_one() -> None:
    assert json.loads(Path("docs/families-lowest.json").read_text())["transformers"] == "5.17.0"
