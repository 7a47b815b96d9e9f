"""The census: what the tap does with every MoE architecture of the installed transformers, measured on tiny models.

Each fact comes from running the model: ids and weights are read where the experts module receives them, by hooks of
torch, and compared with what was recorded or given, and with the family's formula in `scoring`. `docs/families.md` is
written from this (`make families`).

Axes: B sequences and S tokens of a batch, N = B * S tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrace.conformance.scoring import RULES
from moetrace.conformance.spies import spying
from moetrace.conformance.verdicts import Reach, follows, gradient, received, weighs_all
from moetrace.conformance.zoo import CORRECTION_BIAS, Architecture, tiny
from moetrace.errors import RouterError
from moetrace.layout import MoeLayout
from moetrace.recorder import record
from moetrace.replayer import replay
from moetrace.routers import find_routers, layout_of
from moetrace.trace import RoutingTrace

TOKENS_BS = (2, 16)


@dataclass(frozen=True)
class Finding:
    """What was measured on one architecture.

    Attributes:
        name: of the architecture.
        refusal: the error's text where its routers cannot be tapped, else "".
        layout: the tiny model's layout, None where refused.
        routers: class names of the tapped routers.
        source_file: where their code is, in transformers/models.
        order: "rank" or "set".
        received: the experts received exactly the recorded ids; None where they receive no ids to compare.
        replayed: replaying the model's own record left logits and all gradients bit-identical.
        altered: altered routes reached the experts, with finite and non-zero weights; None as for `received`.
        weights: at the live ids and at altered ones the experts received the weights that the family's rule gives, in
            float64 from the router's logits; None without a rule, or where logits or weights cannot be seen.
        gradient: which logits got, under altered routes, the gradient that the rule's derivative gives: "chosen",
            "all", "none" or "unseen", see `verdicts.gradient`; "" if it is wrong or missing.
        router_logits: what `output_router_logits` returns: "logits", "logits, aux loss" or "".
        grouped: the router also selects groups.
        bias: experts are selected by scores with a correction bias.
        shared: the model has shared experts.
    """

    name: str
    refusal: str = ""
    layout: MoeLayout | None = None
    routers: tuple[str, ...] = ()
    source_file: str = ""
    order: str = ""
    received: bool | None = None
    replayed: bool = False
    altered: bool | None = None
    weights: bool | None = None
    gradient: Reach = ""
    router_logits: str = ""
    grouped: bool = False
    bias: bool = False
    shared: bool = False

    @property
    def works(self) -> bool:
        """True where nothing that could be measured was wrong."""
        wrong = False in (self.received, self.altered, self.weights)
        return not self.refusal and self.replayed and bool(self.gradient) and not wrong


def examine(architecture: Architecture, **tiny_arguments: Any) -> Finding:
    """Measure one architecture; `tiny_arguments` are those of `zoo.tiny`."""
    model = tiny(architecture, **tiny_arguments)
    try:
        layout = layout_of(model)
    except RouterError as error:
        return Finding(architecture.name, refusal=str(error))
    rule, config = RULES.get(architecture.name), model.config.get_text_config(decoder=True)
    ids_BS = batch()
    plain = _run(model, ids_BS)
    with record(model) as recording, spying(model) as live:
        model(input_ids=ids_BS, use_cache=False)
    recorded_LNK = recording.experts_LNK
    with replay(model, recording.traces(ids_BS), input_ids=ids_BS, on_shift="ignore"):
        own = _run(model, ids_BS)
    given_LNK = random_routes(model, layout, ids_BS.numel())
    given = traces_of(layout, given_LNK, ids_BS)
    with replay(model, given, input_ids=ids_BS, on_shift="ignore"), spying(model) as forced:
        altered = _run(model, ids_BS)
    sites = find_routers(model)
    return Finding(
        name=architecture.name,
        layout=layout,
        routers=tuple(sorted({type(site.module).__name__ for site in sites})),
        source_file="/".join(type(sites[0].module).__module__.split(".")[-2:]) + ".py",
        order=recording.traces(ids_BS)[0].order,
        received=received(live, recorded_LNK),
        replayed=all(torch.equal(a, b) for a, b in zip(plain, own, strict=True)),
        altered=received(forced, given_LNK) and weighs_all(forced, given_LNK),
        weights=follows(rule, config, live, recorded_LNK) and follows(rule, config, forced, given_LNK),
        gradient=gradient(rule, config, forced, given_LNK) if bool(torch.isfinite(altered[0]).all()) else "",
        router_logits=_router_logits(model, ids_BS),
        grouped=any("group" in name and _above_1(value) for site in sites for name, value in vars(site.module).items()),
        bias=any(CORRECTION_BIAS.search(name) for name, _ in (*model.named_parameters(), *model.named_buffers())),
        shared=any("shared_expert" in name or "shared_mlp" in name for name, _ in model.named_modules()),
    )


def batch() -> torch.Tensor:
    """`[B, S]` token ids, always the same."""
    return torch.randint(3, 96, TOKENS_BS, generator=torch.Generator().manual_seed(0))


def _run(model: nn.Module, ids_BS: torch.Tensor) -> list[torch.Tensor]:
    """Logits and all gradients of one forward and backward."""
    model.zero_grad()
    logits = model(input_ids=ids_BS, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@torch.no_grad()
def _router_logits(model: nn.Module, ids_BS: torch.Tensor) -> str:
    output = model(input_ids=ids_BS, use_cache=False, output_router_logits=True)
    offered = ["logits"] if getattr(output, "router_logits", None) else []
    return ", ".join(offered + ["aux loss"] * isinstance(getattr(output, "aux_loss", None), torch.Tensor))


def random_routes(model: nn.Module, layout: MoeLayout, tokens: int) -> torch.Tensor:
    """`[L, N, K]` int64: distinct random experts; of real ones where the router can also choose to skip."""
    counts = [
        getattr(module, "num_experts", None) for name, module in model.named_modules() if name.endswith(".experts")
    ]
    experts = min([layout.num_experts, *(count for count in counts if isinstance(count, int))])
    order = np.random.default_rng(1).random((layout.num_layers, tokens, experts)).argsort(-1)
    return torch.from_numpy(order[..., : layout.top_k])


def traces_of(layout: MoeLayout, routes_LNK: torch.Tensor, ids_BS: torch.Tensor) -> list[RoutingTrace]:
    """One trace for each row of an unpadded batch."""
    rows = routes_LNK.unflatten(1, ids_BS.shape).permute(1, 2, 0, 3)
    return [RoutingTrace.build(row.numpy(), layout, ids.numpy()) for row, ids in zip(rows, ids_BS, strict=True)]


def _above_1(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
