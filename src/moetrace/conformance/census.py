"""The census: what the tap does with every MoE architecture of the installed transformers, measured on tiny models.

Each fact comes from running the model: expert ids are read where the experts module receives them, by hooks of torch,
and compared with what was recorded or given. `docs/families.md` is written from this (`make families`).

Axes: B sequences and S tokens of a batch, N = B * S tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

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
        order: "rank" or "set".
        received: the experts received exactly the recorded ids; None where they receive no ids to compare.
        replayed: replaying the model's own record left logits and all gradients bit-identical.
        altered: altered routes reached the experts, with finite and non-zero weights; None as for `received`.
        gradient: every router's parameters got a non-zero gradient under altered routes.
        scoring: which formula in float64 gives the weights that the experts received, from the router's logits at the
            live ids; "own" where none of the common ones does, "" where the two cannot be seen.
        scoring_replayed: the same at the ids that were given: it must be the same formula.
        grouped: the router also selects groups.
        bias: experts are selected by scores with a correction bias.
        shared: the model has shared experts.
    """

    name: str
    refusal: str = ""
    layout: MoeLayout | None = None
    routers: tuple[str, ...] = ()
    order: str = ""
    received: bool | None = None
    replayed: bool = False
    altered: bool | None = None
    gradient: bool = False
    scoring: str = ""
    scoring_replayed: str = ""
    grouped: bool = False
    bias: bool = False
    shared: bool = False

    @property
    def works(self) -> bool:
        """True where nothing that could be measured was wrong."""
        right = self.replayed and self.gradient and self.received is not False and self.altered is not False
        return not self.refusal and right and self.scoring == self.scoring_replayed


def examine(architecture: Architecture, **tiny_arguments: Any) -> Finding:
    """Measure one architecture; `tiny_arguments` are those of `zoo.tiny`."""
    model = tiny(architecture, **tiny_arguments)
    try:
        layout = layout_of(model)
    except RouterError as error:
        return Finding(architecture.name, refusal=str(error))
    ids_BS = torch.randint(3, 96, TOKENS_BS, generator=torch.Generator().manual_seed(0))
    plain = _run(model, ids_BS)
    with record(model) as recording, _spies(model) as live:
        model(input_ids=ids_BS, use_cache=False)
    recorded_LNK = recording.experts_LNK
    with replay(model, recording.traces(ids_BS), input_ids=ids_BS, on_shift="ignore"):
        own = _run(model, ids_BS)
    given_LNK = _random_routes(model, layout, ids_BS.numel())
    given = _traces(layout, given_LNK, ids_BS)
    with replay(model, given, input_ids=ids_BS, on_shift="ignore"), _spies(model) as forced:
        altered = _run(model, ids_BS)
    sites = find_routers(model)
    return Finding(
        name=architecture.name,
        layout=layout,
        routers=tuple(sorted({type(site.module).__name__ for site in sites})),
        order=recording.traces(ids_BS)[0].order,
        received=_same_ids(live, recorded_LNK),
        replayed=all(torch.equal(a, b) for a, b in zip(plain, own, strict=True)),
        altered=_same_ids(forced, torch.from_numpy(given_LNK)) and _weighs_all(forced, layout),
        gradient=bool(torch.isfinite(altered[0]).all()) and all(_learns(site.module) for site in sites),
        scoring=_scoring(live, recorded_LNK),
        scoring_replayed=_scoring(forced, torch.from_numpy(given_LNK)),
        grouped=any("group" in name and _above_1(value) for site in sites for name, value in vars(site.module).items()),
        bias=any(CORRECTION_BIAS.search(name) for name, _ in (*model.named_parameters(), *model.named_buffers())),
        shared=any("shared_expert" in name or "shared_mlp" in name for name, _ in model.named_modules()),
    )


def _run(model: nn.Module, ids_BS: torch.Tensor) -> list[torch.Tensor]:
    """Logits and all gradients of one forward and backward."""
    model.zero_grad()
    logits = model(input_ids=ids_BS, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@dataclass
class _Seen:
    """Tensors that each experts module received, and those that each router returned, in the order of the calls."""

    received: list[list[torch.Tensor]] = field(default_factory=list)
    returned: list[list[torch.Tensor]] = field(default_factory=list)


@contextmanager
def _spies(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()

    def on_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.received.append([value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])

    def on_router(module: nn.Module, args: tuple, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        seen.returned.append([value.detach() for value in outputs if isinstance(value, torch.Tensor)])

    sites = find_routers(model)
    blocks = {site.name for site in sites} | {site.name.rpartition(".")[0] for site in sites}
    hooks = [site.module.register_forward_hook(on_router) for site in sites]
    hooks += [
        module.register_forward_pre_hook(on_experts, with_kwargs=True)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and name.rpartition(".")[0] in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _same_ids(seen: _Seen, ids_LNK: torch.Tensor) -> bool | None:
    received = [[value for value in call if not value.is_floating_point()] for call in seen.received]
    if len(received) != len(ids_LNK) or not all(received):
        return None
    return all(
        torch.equal(call[-1].reshape(ids_NK.shape), ids_NK) for call, ids_NK in zip(received, ids_LNK, strict=True)
    )


def _weights(seen: _Seen, top_k: int) -> list[torch.Tensor]:
    """The last float tensor of width K that each experts module received: hidden states come first."""
    found = [[v for v in call[1:] if v.is_floating_point() and v.shape[-1] == top_k] for call in seen.received]
    return [weights[-1].detach().reshape(-1, top_k) for weights in found if weights]


def _weighs_all(seen: _Seen, layout: MoeLayout) -> bool:
    return all(bool(torch.isfinite(w_NK).all() and (w_NK != 0).all()) for w_NK in _weights(seen, layout.top_k))


def _scoring(seen: _Seen, ids_LNK: torch.Tensor) -> str:
    """Name of the formula that gives the experts' weights from the router's logits.

    softmax(x)[ids] renormalised over K is the same number as softmax(x[ids]): Mixtral's and GPT-OSS's rules are one.
    """
    weights = _weights(seen, ids_LNK.shape[2])
    logits = [call[0] for call in seen.returned if call]
    if not len(weights) == len(logits) == len(ids_LNK):
        return ""
    names = {
        _formula(x_NE, w_NK, ids_NK)
        for x_NE, w_NK, ids_NK in zip(logits, weights, ids_LNK, strict=True)
        if x_NE.ndim == 2 and len(x_NE) == len(ids_NK) and x_NE.shape[1] > int(ids_NK.max())
    }
    return names.pop() if len(names) == 1 else "own" if names else ""


def _formula(logits_NE: torch.Tensor, weights_NK: torch.Tensor, ids_NK: torch.Tensor) -> str:
    x_NE = logits_NE.double()
    candidates = {
        "softmax": x_NE.softmax(-1),
        "sigmoid": x_NE.sigmoid(),
        "sqrt(softplus)": torch.nn.functional.softplus(x_NE).sqrt(),
    }
    for name, scores_NE in candidates.items():
        chosen_NK = scores_NE.gather(1, ids_NK)
        for title, expected_NK in (
            (name, chosen_NK),
            (f"{name}, renormalised", chosen_NK / chosen_NK.sum(-1, keepdim=True)),
        ):
            ratio_NK = weights_NK.double() / expected_NK
            scale = float(ratio_NK.median())
            if torch.allclose(ratio_NK, torch.full_like(ratio_NK, scale), rtol=1e-4):
                return title if abs(scale - 1) < 1e-4 else f"{title}, scaled"
    return "own"


def _learns(router: nn.Module) -> bool:
    gradients = [p.grad for p in router.parameters() if p.grad is not None]
    return any(bool((grad != 0).any()) for grad in gradients)


def _random_routes(model: nn.Module, layout: MoeLayout, tokens: int) -> np.ndarray:
    """Distinct random experts; of real ones where the router can also choose to skip."""
    counts = [
        getattr(module, "num_experts", None) for name, module in model.named_modules() if name.endswith(".experts")
    ]
    experts = min([layout.num_experts, *(count for count in counts if isinstance(count, int))])
    order = np.random.default_rng(1).random((layout.num_layers, tokens, experts)).argsort(-1)
    return order[..., : layout.top_k]


def _above_1(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _traces(layout: MoeLayout, routes_LNK: np.ndarray, ids_BS: torch.Tensor) -> list[RoutingTrace]:
    size = ids_BS.shape[1]
    return [
        RoutingTrace.build(routes_LNK[:, row * size : (row + 1) * size].transpose(1, 0, 2), layout, ids.numpy())
        for row, ids in enumerate(ids_BS)
    ]
