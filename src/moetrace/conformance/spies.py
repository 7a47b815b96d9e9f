"""What routers compute and what experts receive, seen by hooks of torch alone: the tap is not asked.

Axes: N tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moetrace.routers import RouterSite, find_routers

LOGITS = {"DbrxFFN": "router", "Gemma4TextRouter": "proj", "JambaSparseMoeBlock": "router", "ZayaRouter": "router_mlp"}
"""Router class -> the part of it that makes the logits, where the router does not return them."""

GROUPED = {"JetMoeTopKGating": "input_linear"}
"""Router class -> the module beside it that receives the tokens expert by expert: no ids, but how many of each. The
router's first output says from which of the N * K choices each comes, its third what it weighs."""


@dataclass
class RouterCall:
    """One router in one forward, and the experts behind it. After a backward, `.grad` of its tensors is there.

    Attributes:
        site: the router.
        hidden: what it received.
        logits: what it scores, `[..., E]`; None where that cannot be seen.
        shared: weights of the shared experts, where it makes those too.
        experts: tensors that the experts module received.
        sizes: how many tokens of each expert, where it received them so.
        places: from which of the N * K choices each of those comes.
        gates: their weights, in the same order.
    """

    site: RouterSite
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    experts: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    places: torch.Tensor | None = None
    gates: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the router's input: the model's."""
        assert self.hidden is not None
        return self.hidden.dtype

    @property
    def hidden_NH(self) -> torch.Tensor:
        """The router's input, float64."""
        assert self.hidden is not None
        return self.hidden.detach().double().reshape(-1, self.hidden.shape[-1])

    @property
    def logits_NE(self) -> torch.Tensor | None:
        """The logits, float64; None where they cannot be seen."""
        return None if self.logits is None else self.logits.detach().double().reshape(-1, self.site.num_experts)

    def received(self, ids_NK: torch.Tensor) -> bool | None:
        """Whether the experts received exactly these ids; None where they received none, nor inputs that tell.

        Llama 4 runs every expert on every token, on inputs that are zero unless it was chosen: no order to compare.
        """
        if self.places is not None:
            grouped = torch.arange(self.site.num_experts).repeat_interleave(torch.tensor(self.sizes))
            tokens = self.hidden_NH[self.places // self.site.top_k]
            same_tokens = torch.equal(self.experts[0].double(), tokens)
            return same_tokens and torch.equal(self._ungrouped(grouped, ids_NK), ids_NK)
        if self._is_dense:
            chosen_NE = self._dense_NE(self.experts[0].detach()) != 0
            return torch.equal(chosen_NE, torch.zeros_like(chosen_NE).scatter(1, ids_NK, True))
        ids = [value for value in self.experts if not value.is_floating_point()]
        return torch.equal(ids[-1].reshape(ids_NK.shape), ids_NK) if ids else None

    def weights_NK(self, ids_NK: torch.Tensor) -> torch.Tensor | None:
        """Weights of the experts `ids_NK` as they received them, then `shared`; None where they cannot be seen."""
        return self._weights(ids_NK, gradient=False)

    def gradients_NK(self, ids_NK: torch.Tensor) -> torch.Tensor | None:
        """Gradients of those weights."""
        return self._weights(ids_NK, gradient=True)

    def _weights(self, ids_NK: torch.Tensor, gradient: bool) -> torch.Tensor | None:
        def of(tensor: torch.Tensor) -> torch.Tensor:
            if not gradient:
                return tensor.detach()
            return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

        if self.gates is not None:
            return self._ungrouped(of(self.gates).double(), ids_NK)
        if self._is_dense:
            dense_NK = self._dense_NE(of(self.experts[0])).gather(1, ids_NK)
            return dense_NK if gradient else dense_NK / self.hidden_NH.square().sum(-1, keepdim=True)
        found = [v for v in self.experts[1:] if v.is_floating_point() and v.shape[-1] == self.site.top_k]
        if not found:
            return None
        weights = [found[-1], *([] if self.shared is None else [self.shared])]
        return torch.cat([of(value).reshape(len(ids_NK), -1) for value in weights], dim=1).double()

    def _ungrouped(self, values: torch.Tensor, like_NK: torch.Tensor) -> torch.Tensor:
        assert self.places is not None
        return torch.empty_like(values).index_copy(0, self.places, values).view_as(like_NK)

    @property
    def _is_dense(self) -> bool:
        return len(self.experts) == 1 and self.hidden is not None

    def _dense_NE(self, inputs: torch.Tensor) -> torch.Tensor:
        """Products of the hidden states h with the inputs of each expert: w h·h of inputs w h, dL/dw of dL/d(w h)."""
        hidden_NH = self.hidden_NH
        return torch.einsum("enh,nh->ne", inputs.double().view(-1, *hidden_NH.shape), hidden_NH)


@contextmanager
def spying(model: nn.Module) -> Iterator[list[RouterCall]]:
    """The routers' calls in the last forward inside the context, in layer order."""
    calls = [RouterCall(site) for site in find_routers(model)]
    hooks: list[Any] = []
    for call in calls:
        hooks += _hooks(model, call)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(model: nn.Module, call: RouterCall) -> Iterator[Any]:
    router, num_experts = call.site.module, call.site.num_experts

    def on_part(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call.logits = _kept(output)

    def on_router(module: nn.Module, args: tuple, output: Any) -> None:
        call.hidden = args[0]
        outputs = [v for v in (output if isinstance(output, tuple) else (output,)) if isinstance(v, torch.Tensor)]
        if type(module).__name__ not in LOGITS:
            wide = [value for value in outputs if value.is_floating_point() and value.shape[-1] == num_experts]
            call.logits = _kept(wide[-1]) if wide else None
        if type(module).__name__ in GROUPED:
            call.places, call.gates = output[0], _kept(output[2])
        call.shared = _kept(outputs[3]) if len(outputs) == 4 and hasattr(module, "n_shared_experts") else None

    def on_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call.experts = [_kept(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        call.sizes = next((value for value in args if isinstance(value, list)), [])

    yield router.register_forward_hook(on_router)
    if part := LOGITS.get(type(router).__name__):
        yield router.get_submodule(part).register_forward_hook(on_part)
    modules = dict(model.named_modules())
    block = call.site.name.rpartition(".")[0]
    for name in (f"{call.site.name}.experts", f"{block}.{GROUPED.get(type(router).__name__, 'experts')}"):
        if name in modules:
            yield modules[name].register_forward_pre_hook(on_experts, with_kwargs=True)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which will keep its gradient."""
    if tensor.requires_grad:
        tensor.retain_grad()
    return tensor
