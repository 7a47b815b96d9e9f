"""Which modules of a model are routers, and the `MoeLayout` that follows from them.

In transformers >= 5.17 a router is a small module with integer attributes `top_k` and `num_experts` and a weight of at
least `num_experts` rows, called once a forward, which returns (logits, weights, indices); what deviates has a row in
`families.py`. The layout is read from those modules; the config, whose names for the same numbers differ from family
to family, is only a cross-check. Vision and audio towers are not looked at: a trace is of text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from moetrace.errors import LayoutMismatchError, NotMoeError, RouterError, UnsupportedRouterError
from moetrace.layout import MoeLayout, fingerprint_from
from moetrace.routers.families import COMMON, TRAITS, RouterTraits

EXPERT_COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
_FSDP1 = "FullyShardedDataParallel"
_TRAINS_A_COPY = "ModulesToSaveWrapper"
"""PEFT's: it holds a module twice, and passes for it by its attributes."""
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio|image)", re.IGNORECASE)


@dataclass(frozen=True)
class RouterSite:
    """One router of a model.

    Attributes:
        index: its place among the model's routers, 0..L-1.
        layer: absolute number of its decoder layer.
        name: qualified module name.
        module: the router.
        num_experts: E.
        top_k: K.
    """

    index: int
    layer: int
    name: str
    module: nn.Module
    num_experts: int
    top_k: int


def find_routers(model: nn.Module) -> tuple[RouterSite, ...]:
    """The model's routers in layer order; those of one layer in the order of its modules.

    Raises:
        RouterError: it is no model.
        NotMoeError: the model has no experts at all.
        UnsupportedRouterError: it has experts, but a router is missing, of a second layer of the same number (as
            draft heads may have), or unlike the others; or FSDP1 hides them, or PEFT trains copies of them.
    """
    model = unwrapped(model)
    for module in model.modules():
        _refuse_fsdp1(module)
    modules = [(name, module) for name, module in model.named_modules() if not _NOT_TEXT.search(name)]
    experts = [name for name, module in modules if _is_experts(module)]
    found = [(name, module) for name, module in modules if _is_router(module)]
    for name, module in found:
        if traits_of(module).refusal:
            raise UnsupportedRouterError(
                f"router {name} ({type(module).__name__}) cannot be replayed: {traits_of(module).refusal}",
                fix="docs/families.md lists what can.",
            )
    _refuse_copies(modules, [name for name, _ in found])
    settled = {_block_of(name) for name, _ in found} | {name for name, _ in found}
    found = [(name, module) for name, module in found if not traits_of(module).fixed]
    if not found and not experts and not _config_numbers(model)[0]:
        raise NotMoeError(
            f"{type(model).__name__} is a dense model: it has no routers",
            expected="a Mixture-of-Experts model",
            fix="Start without routed-expert capture, or pass a MoE model.",
        )
    lacking = {_block_of(name) for name in experts if not any(block in settled for block in _ancestors(name))}
    if not found or lacking:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has experts without a router that moetrace recognises",
            expected="a module with top_k, num_experts and a weight beside each experts module",
            got=", ".join(sorted(lacking)[:3]) or "no router at all",
        )
    sites: list[tuple[int, str, Any]] = sorted(
        ((_layer_number(name), name, module) for name, module in found), key=lambda site: site[0]
    )
    for (layer, name, _), (next_layer, next_name, _) in pairwise(sites):
        if layer == next_layer and _stack(name) != _stack(next_name):
            raise UnsupportedRouterError(
                f"{type(model).__name__} has several decoder layers of one number",
                expected=f"every router of number {layer} in one of them",
                got=[name, next_name],
            )
    sizes = {sizes_of(module) for _, _, module in sites}
    if len(sizes) > 1:
        raise UnsupportedRouterError(
            f"{type(model).__name__}'s layers differ in experts or top-k",
            expected="one (num_experts, top_k) for all layers",
            got=sorted(sizes),
        )
    ((num_experts, top_k),) = sizes
    return tuple(
        RouterSite(index, layer, name, module, num_experts, top_k) for index, (layer, name, module) in enumerate(sites)
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hold it as `module`: DistributedDataParallel's, DeepSpeed's.

    Raises:
        RouterError: it is no model.
        UnsupportedRouterError: a wrapper is FSDP1's.
    """
    if not isinstance(model, nn.Module):
        raise RouterError(
            "this is no model",
            expected="a torch.nn.Module",
            got=repr(model).partition("\n")[0],
            fix="Load it, as by AutoModelForCausalLM.from_pretrained; moetrace.routers.config_layout reads a config.",
        )
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        _refuse_fsdp1(model)
        model = inner
    return model


def _refuse_fsdp1(module: nn.Module) -> None:
    if type(module).__name__ == _FSDP1:
        raise UnsupportedRouterError(
            "a model under FSDP1 has no routers to be found: it flattens the weights by which they are known",
            expected="fully_shard (FSDP2)",
            got=_FSDP1,
            fix="Shard with torch.distributed.fsdp.fully_shard; with accelerate, fsdp_version=2.",
        )


def _refuse_copies(modules: list[tuple[str, nn.Module]], routers: list[str]) -> None:
    wrappers = {name for name, module in modules if _TRAINS_A_COPY in (kind.__name__ for kind in type(module).__mro__)}
    for router in routers if wrappers else ():
        for name in wrappers.intersection((router, *_ancestors(router))):
            raise UnsupportedRouterError(
                f"router {router} is in the model twice: PEFT's modules_to_save trains a copy of it",
                expected="routers that PEFT leaves as they are",
                got=f"modules_to_save with {name}",
                fix="Leave routers, and blocks that have one, out of modules_to_save; target_modules may have others.",
            )


def layout_of(model: nn.Module) -> MoeLayout:
    """The `MoeLayout` of a model, read from its modules and checked against its config.

    Works on the meta device too, so a checkpoint can be judged before its weights are loaded.

    Raises:
        RouterError: see `find_routers`.
        LayoutMismatchError: the config states other numbers than the modules have.
    """
    sites = find_routers(model)
    layout = MoeLayout(tuple(site.layer for site in sites), sites[0].num_experts, sites[0].top_k)
    stated = _config_numbers(model)
    experts = stated[0] if traits_of(sites[0].module).num_experts == COMMON.num_experts else []  # else: it adds some
    for what, values, number in (("experts", experts, layout.num_experts), ("top-k", stated[1], layout.top_k)):
        if values and number not in values:
            raise LayoutMismatchError(
                f"the config states other {what} than the routers have", expected=number, got=values
            )
    return layout


def config_layout(config: Any) -> MoeLayout:
    """The `MoeLayout` of a transformers config, without any weights: the model is built on the meta device.

    Raises:
        NotMoeError, UnsupportedRouterError, LayoutMismatchError: see `layout_of`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return layout_of(AutoModelForCausalLM.from_config(config))


def fingerprint_of(model: nn.Module, sites: Sequence[RouterSite] | None = None) -> str:
    """SHA-256 (hex) of what makes routes of one model meaningless in another: its routers, depth and vocabulary.

    Weights do not count (training changes them), nor do dtype, device or wrappers such as LoRA. `sites` spares finding
    the routers again.
    """
    sites = find_routers(model) if sites is None else sites
    config = _text_config(model)
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return fingerprint_from(
        [[site.layer, site.num_experts, site.top_k] for site in sites],
        **{name: getattr(config, name, None) for name in names},
    )


def traits_of(module: nn.Module) -> RouterTraits:
    """How a router differs from the common shape."""
    # by its ancestors too: FSDP2 replaces a module's class by a subclass of another name
    names = (kind.__name__ for kind in type(module).__mro__)
    traits = next((TRAITS[name] for name in names if name in TRAITS), COMMON)
    return traits if callable(getattr(module, traits.method, None)) else COMMON


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(E, K) of a router; (0, 0) if it does not state them."""
    traits = traits_of(module)
    num_experts, top_k = _attribute(module, traits.num_experts), _attribute(module, traits.top_k)
    return (num_experts, top_k) if _is_count(num_experts) and _is_count(top_k) else (0, 0)


def _attribute(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing


def _is_router(module: nn.Module) -> bool:
    if traits_of(module) is not COMMON:
        return True
    num_experts, _ = sizes_of(module)
    if not num_experts or any(_is_experts(below) for below in module.modules()):
        return False
    return any(weight.ndim == 2 and weight.shape[0] >= num_experts for weight in module.parameters())


def _is_experts(module: nn.Module) -> bool:
    parameters = module.parameters(recurse=False)
    return _is_count(getattr(module, "num_experts", None)) and any(parameter.ndim == 3 for parameter in parameters)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _block_of(name: str) -> str:
    """The MoE block a router or experts module belongs to: its parent module."""
    return name.rpartition(".")[0]


def _ancestors(name: str) -> Iterator[str]:
    """A module's parents, nearest first; an adapter (LoRA on experts) puts some between experts and their block."""
    while name:
        name = _block_of(name)
        yield name


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)(?=\.)", f".{name}")
    if len(numbers) != 1:
        raise UnsupportedRouterError(
            f"the decoder layer of router {name!r} is not evident", expected="one number in its name", got=numbers
        )
    return int(numbers[0])


def _stack(name: str) -> str:
    """What numbers the decoder layer of a router: its name up to the number."""
    return re.split(r"(?<=\.)\d+(?=\.)", f".{name}")[0]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config_numbers(model: nn.Module) -> tuple[list[int], list[int]]:
    """Expert counts above 1 and top-k values that the config states, under whatever names."""
    config = _text_config(model)

    def stated(names: tuple[str, ...]) -> list[int]:
        values: list[Any] = [getattr(config, name, None) for name in names]
        return sorted({value for value in values if _is_count(value)})

    return [count for count in stated(EXPERT_COUNT_NAMES) if count > 1], stated(TOP_K_NAMES)
