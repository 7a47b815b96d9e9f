"""Which routers of a Megatron-Core model choose experts for decoder layers, and what they cannot be replayed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import get_model_config
from torch import nn

from moetrace.errors import LayoutMismatchError, NotMoeError, UnsupportedRouterError
from moetrace.layout import MoeLayout


@dataclass(frozen=True)
class LocalRouter:
    """A router of a decoder layer that is on this rank.

    Attributes:
        name: qualified module name in its chunk.
        layer: absolute number of its decoder layer from 0 on; Megatron-Core's `layer_number` is one more.
        place: number of its layer among those of its block on this rank.
        module: the router.
    """

    name: str
    layer: int
    place: int
    module: TopKRouter

    @property
    def recomputed(self) -> bool:
        """Whether backward passes recompute it."""
        config = self.module.config
        if config.recompute_granularity == "full":
            return config.recompute_method != "block" or self.place < config.recompute_num_layers
        return config.recompute_granularity == "selective" and "moe" in config.recompute_modules


@dataclass(frozen=True)
class LocalRouters:
    """The decoder routers of a rank, in the order of the chunks (virtual pipeline stages) and layers.

    Attributes:
        chunks: the model's chunks.
        of_chunk: the routers of each chunk; a stage of dense layers has none.
        dense: absolute numbers of the decoder layers on this rank that do not route.
        num_experts: E.
        top_k: K.
    """

    chunks: tuple[nn.Module, ...]
    of_chunk: tuple[tuple[LocalRouter, ...], ...]
    dense: frozenset[int]
    num_experts: int
    top_k: int

    @property
    def all(self) -> tuple[LocalRouter, ...]:
        """The routers of all chunks."""
        return tuple(router for routers in self.of_chunk for router in routers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute numbers of the MoE layers on this rank, ascending."""
        return tuple(sorted(router.layer for router in self.all))

    def require_layers(self, layout: MoeLayout) -> None:
        """Raise `LayoutMismatchError` unless routes of that layout can be replayed here."""
        numbers = (layout.num_experts, layout.top_k)
        if numbers != (self.num_experts, self.top_k):
            raise LayoutMismatchError(
                "the routes are of another model",
                expected=f"{self.num_experts} experts, {self.top_k} per token",
                got=f"{layout.num_experts} experts, {layout.top_k} per token",
            )
        lacking = sorted(set(self.layers) - set(layout.layers))
        dense = sorted(self.dense & set(layout.layers))
        if lacking or dense:
            raise LayoutMismatchError(
                f"the routes have {'no rows' if lacking else 'rows'} of this rank's decoder layers {lacking or dense}",
                expected=f"MoE layers {list(self.layers)}, and none of the dense layers {sorted(self.dense)}",
                got=f"layers {list(layout.layers)}",
                fix="Layers are absolute decoder-layer numbers from 0 on, one less than Megatron-Core's layer_number.",
            )


def find_routers(model: nn.Module | Sequence[nn.Module]) -> LocalRouters:
    """The decoder routers of a model, or of its chunks on this rank.

    Routers of draft heads (`MultiTokenPredictionLayer`) are left out: an engine's routes do not have them.

    Raises:
        NotMoeError: the model is dense.
        UnsupportedRouterError: a router selects experts in a way that routes cannot be supplied to.
    """
    chunks = (model,) if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList) else tuple(model)
    if not chunks:
        raise NotMoeError("there is no model", expected="a Megatron-Core model, or the list of its chunks")
    config = get_model_config(chunks[0])
    if not config.num_moe_experts:
        raise NotMoeError("the model is dense: its configuration has no num_moe_experts")
    _require_replayable(config)
    of_chunk = tuple(tuple(_routers_of(chunk)) for chunk in chunks)
    layers = [router.layer for routers in of_chunk for router in routers]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UnsupportedRouterError(
            f"several routers have decoder layers {twice}",
            expected="one router for each layer number",
            got=[router.name for routers in of_chunk for router in routers if router.layer in twice],
            fix="Pass the language model alone, and each of its chunks once.",
        )
    dense = {layer for chunk, routers in zip(chunks, of_chunk, strict=True) for layer in _layers_beside(chunk, routers)}
    return LocalRouters(
        chunks, of_chunk, frozenset(dense - set(layers)), config.num_moe_experts, config.moe_router_topk
    )


def _routers_of(chunk: nn.Module) -> Iterator[LocalRouter]:
    drafts = tuple(
        f"{name}." for name, module in chunk.named_modules() if isinstance(module, MultiTokenPredictionLayer)
    )
    for name, moe in chunk.named_modules():
        if not isinstance(moe, BaseMoELayer) or name.startswith(drafts):
            continue
        router = moe.router
        if not isinstance(router, TopKRouter):
            raise UnsupportedRouterError(
                f"router {name}.router is not one that takes routes",
                expected="Megatron-Core's TopKRouter",
                got=type(router).__name__,
            )
        if router.layer_number is None:
            raise UnsupportedRouterError(
                f"router {name}.router does not know which decoder layer it is of",
                expected="a layer_number, as a TransformerLayer sets it",
                got=None,
                fix="Call set_layer_number of the MoE layer: the absolute number of its decoder layer from 1 on.",
            )
        _require_replayable(router.config)
        yield LocalRouter(f"{name}.router", router.layer_number - 1, _place_in_block(chunk, name), router)


def _block_of(chunk: nn.Module, name: str) -> tuple[nn.ModuleList, str] | None:
    """The innermost list of layers that a module is in, and the module's path from there."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        block = chunk.get_submodule(".".join(parts[:length]))
        if isinstance(block, nn.ModuleList):
            return block, parts[length]
    return None


def _place_in_block(chunk: nn.Module, name: str) -> int:
    found = _block_of(chunk, name)
    return int(found[1]) if found else 0


def _layers_beside(chunk: nn.Module, routers: Sequence[LocalRouter]) -> Iterator[int]:
    """Numbers of all layers in the blocks that these routers are in."""
    for router in routers:
        found = _block_of(chunk, router.name)
        for layer in found[0] if found else ():
            if isinstance(number := getattr(layer, "layer_number", None), int):
                yield number - 1


def _graphed_router(config: Any) -> bool:
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return False
    parts = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or ()
    names = {getattr(part, "name", part) for part in (parts if isinstance(parts, list | tuple) else [parts])}
    return not names or bool(names & {"moe", "moe_router", "full_iteration", "full"})


_REFUSALS: tuple[tuple[Callable[[Any], Any], str, str], ...] = (
    (
        lambda config: config.moe_router_fusion,
        "the fused router selects experts by itself and ignores routes without a word",
        "Set moe_router_fusion=False.",
    ),
    (
        lambda config: {"sinkhorn", "quantile_balancing"} & set(_as_list(config.moe_router_load_balancing_type)),
        "sinkhorn and quantile balancing select experts outside the top-k that routes can be supplied to",
        "Set moe_router_load_balancing_type to an auxiliary loss or 'none'.",
    ),
    (
        lambda config: config.moe_expert_capacity_factor is not None,
        "a capacity factor drops experts of a route again",
        "Set moe_expert_capacity_factor=None.",
    ),
    (
        lambda config: (
            config.moe_router_force_load_balancing or getattr(config, "moe_router_force_biased", None) is not None
        ),
        "forced load balancing weighs experts by random logits",
        "Switch off moe_router_force_load_balancing and moe_router_force_biased: they are for benchmarks.",
    ),
    (
        _graphed_router,
        "a CUDA graph repeats the routes that it was captured with",
        "Leave routers out of CUDA graphs (cuda_graph_scope or cuda_graph_modules, for example attn).",
    ),
    (
        lambda config: getattr(config, "overlap_moe_expert_parallel_comm", False),
        "the combined forward and backward of two microbatches does not call the model, so routes cannot follow it",
        "Set overlap_moe_expert_parallel_comm=False.",
    ),
)
"""What a configuration has, why it cannot be replayed, and what to do."""


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _require_replayable(config: Any) -> None:
    for has, why, fix in _REFUSALS:
        if has(config):
            raise UnsupportedRouterError(f"the model's routers cannot be replayed: {why}", fix=fix)
