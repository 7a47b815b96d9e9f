"""Every autoregressive MoE architecture of the installed transformers release, as tiny random models.

Architectures are found in the code of transformers, not in a list kept here: what its auto mappings can load, and what
else can generate in the same modules. Whether a class is a MoE is decided by the modules that it builds on the meta
device. An architecture that has experts but no router that anybody knows is found too: nothing is skipped in silence.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from moetrace.conformance.zoo_configs import SIZES, SPREADS, parts_of, path_to, tiny_config
from moetrace.errors import RouterError

_MAPPING = re.compile(r"MODEL_(FOR_|WITH_)?(?P<task>\w+?)_(MAPPING_)?NAMES")
_EXPERT_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?experts$")
_TEXT_TOWERS = ("text_config", "decoder", "generator")
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio|encoder|image|speech)", re.IGNORECASE)
CORRECTION_BIAS = re.compile(r"(correction|expert|balancing)_bias(es)?$")
_GAIN = re.compile(r"(^|\.)weight$|norm|scale")


@dataclass(frozen=True)
class Architecture:
    """A model class that generates text with routed experts.

    Attributes:
        name: `model_type` of its config; the key of the census.
        model_class: the transformers class.
        config_class: its config.
        text_tower: where its text config lies in its config, such as "text_config"; empty for a text model.
        experts: class names of its experts modules; empty if it states experts but none were recognised.
    """

    name: str
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    text_tower: str
    experts: tuple[str, ...]

    def config(self, **changes: Any) -> PreTrainedConfig:
        """The config of a tiny model, with changes to the part that describes its text decoder."""
        return tiny_config(self.config_class, **changes)


@dataclass(frozen=True)
class Excluded:
    """A class of transformers that has to do with experts and is no architecture of the census.

    Attributes:
        name: `model_type` of its config.
        class_name: its class.
        reason: the rule that it falls under.
    """

    name: str
    class_name: str
    reason: str


def architectures() -> tuple[Architecture, ...]:
    """Every architecture of the census in the installed transformers release, by name."""
    return _census()[0]


def excluded() -> tuple[Excluded, ...]:
    """Every class that was looked at and left out, with the reason."""
    return _census()[1]


def architecture(name: str) -> Architecture:
    """The architecture of a name.

    Raises:
        RouterError: the installed transformers release has none of that name.
    """
    for candidate in architectures():
        if candidate.name == name:
            return candidate
    raise RouterError(
        f"transformers {transformers.__version__} has no MoE architecture of this name",
        expected=", ".join(candidate.name for candidate in architectures()),
        got=name,
    )


def tiny(
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts_implementation: str = "eager",
    **changes: Any,
) -> PreTrainedModel:
    """A tiny random model in eval mode whose weights spread its tokens over all experts.

    The weights depend on the seed alone: the same numbers, rounded, in every dtype. What transformers keeps in float32
    when it loads a checkpoint (correction biases, say) stays in float32.

    Args:
        architecture: one of `architectures()`.
        seed: of the weights.
        dtype: of the model.
        experts_implementation: "eager", "batched_mm" or "grouped_mm"; without effect on families that have only one.
        changes: attributes of the text decoder's config that shall be other than in `zoo_configs`.
    """
    model_class: Any = architecture.model_class
    with _quiet(), torch.random.fork_rng(devices=[]):  # its own initialisation is drawn over below
        model = model_class._from_config(
            architecture.config(**changes), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    for part in model.modules():  # each by itself: vision towers refuse what text towers know
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation(experts_implementation)
    kept = [pattern for pattern in model._keep_in_fp32_modules_strict or () if dtype != torch.float32]
    for name, tensor in _tensors(model):
        if any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in kept):
            tensor.data = tensor.data.float()
    _draw(model, seed)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning about the sizes and token ids of its own defaults, and of tiny models."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


@cache
@_quiet()
def _census() -> tuple[tuple[Architecture, ...], tuple[Excluded, ...]]:
    found: dict[str, Architecture] = {}
    left_out: list[Excluded] = []
    for model_class, tasks in sorted(_candidates().items(), key=lambda item: item[0].__name__):
        config_class: Any = model_class.config_class
        name = config_class.model_type or config_class.__name__
        reason = _rule_against(model_class, tasks)
        if reason is None:
            text_tower, experts, reason = _experts_of(model_class, config_class)
        if reason is not None:
            left_out.append(Excluded(name, model_class.__name__, reason))
            continue
        if name in found:
            name = f"{name}:{model_class.__name__}"
        found[name] = Architecture(name, model_class, config_class, text_tower, experts)
    return (
        tuple(found[name] for name in sorted(found)),
        tuple(sorted(left_out, key=lambda item: (item.name, item.class_name))),
    )


def _candidates() -> dict[type[PreTrainedModel], tuple[str, ...]]:
    """Classes in whose package, or in that of a sub-config, the word "expert" occurs -> tasks they are mapped to."""
    tasks: dict[type[PreTrainedModel], list[str]] = {}
    for model_type, class_name, task in _mapped():
        if not _mentions_experts(model_type):
            continue
        model_class = getattr(transformers, class_name, None)
        if not (inspect.isclass(model_class) and issubclass(model_class, PreTrainedModel)):
            continue
        tasks.setdefault(model_class, []).append(task)
        for _, other in inspect.getmembers(sys.modules[model_class.__module__], inspect.isclass):
            if other.__module__ != model_class.__module__ or not issubclass(other, PreTrainedModel):
                continue
            if issubclass(other, GenerationMixin) and other.config_class is not None:
                tasks.setdefault(other, [])
    return {model_class: tuple(dict.fromkeys(names)) for model_class, names in tasks.items()}


def _mapped() -> Iterator[tuple[str, str, str]]:
    """(model type, class name, task) of every auto mapping except that of headless models."""
    for variable, mapping in vars(modeling_auto).items():
        match = _MAPPING.fullmatch(variable)
        if match is None or match["task"] == "MAPPING" or variable == "MODEL_MAPPING_NAMES":
            continue
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                yield model_type, name, match["task"].lower().replace("_", " ")


@cache
def _mentions_experts(model_type: str) -> bool:
    if model_type not in CONFIG_MAPPING:
        return False
    return any("expert" in _source_of(package) for package in _packages(CONFIG_MAPPING[model_type]))


def _packages(config_class: Any) -> set[str]:
    """The packages of a config and, where it has a text tower, of all that its default holds."""
    own = config_class.__module__.rpartition(".")[0]
    declared = config_class.sub_configs
    if not any(name in _TEXT_TOWERS or getattr(part, "sub_configs", None) for name, part in declared.items()):
        return {own}  # not built: the default of a vision backbone may ask the hub
    try:
        waiting: list[PreTrainedConfig] = [config_class()]
    except Exception:  # a composite without a default: its own package can still be read
        return {own}
    packages = set()
    while waiting:
        config = waiting.pop()
        packages.add(type(config).__module__.rpartition(".")[0])
        waiting += [part for _, part in parts_of(config)]
    return packages


@cache
def _source_of(package: str) -> str:
    folder = Path(import_module(package).__path__[0])
    return "".join(path.read_text(encoding="utf-8").lower() for path in sorted(folder.glob("modeling_*.py")))


def _rule_against(model_class: type[PreTrainedModel], tasks: tuple[str, ...]) -> str | None:
    """Why a class is no autoregressive decoder, or None."""
    if not model_class.can_generate():
        return f"does not generate: {', '.join(tasks)}"
    if not tasks:
        return "is a part of another model: no auto mapping loads it"
    if not issubclass(model_class, GenerationMixin):
        generate: Any = getattr(model_class, "generate", None)
        return f"does not generate token by token: {getattr(generate, '__qualname__', 'generate')} is its own"
    if "input_ids" not in inspect.signature(model_class.forward).parameters:
        return "has no forward over token ids: it joins models that are in the census by themselves"
    return None


def _experts_of(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> tuple[str, tuple[str, ...], str | None]:
    """Path of the text config, class names of the experts modules, and the reason if it is no MoE decoder."""
    config, holders, failure = config_class(), {}, None
    try:
        config = tiny_config(config_class)
        with torch.device("meta"):
            holders = dict(_holders(model_class(config)))
    except Exception as error:  # a newcomer that zoo_configs does not fit yet: its config decides
        failure = f"cannot be built on the meta device: {type(error).__name__}: {error}"
    text = config.get_text_config(decoder=True)
    in_text = sorted({kind for name, kind in holders.items() if not _NOT_TEXT.search(name)})
    if in_text or (not holders and _states_experts(text)):
        return path_to(config, text), tuple(in_text), None
    if holders:
        return "", (), "has experts outside its text decoder only"
    return "", (), failure or "mentions experts but builds none"


def _holders(model: nn.Module, path: str = "") -> Iterator[tuple[str, str]]:
    """(name, class name) of the outermost modules that hold routed experts."""
    kind, own_name = type(model).__name__, path.rpartition(".")[2]
    if "Expert" in kind and "shared" not in own_name:
        yield path, kind
        return
    below = [
        holder for name, child in model.named_children() for holder in _holders(child, f"{path}.{name}".lstrip("."))
    ]
    yield from below
    if not below and kind.lower().endswith("moe") and _states_experts(model):
        yield path, kind


def _states_experts(thing: Any) -> bool:
    """Whether a config or module has an attribute that counts more than one expert."""
    return any(
        _EXPERT_COUNT.search(name) and isinstance(value, int) and value > 1 for name, value in vars(thing).items()
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Fill a model with random numbers: gains near 1, correction biases that matter, all else wide enough to route."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _tensors(model):
        noise = torch.randn(tensor.shape, generator=generator)
        if CORRECTION_BIAS.search(name):
            tensor.add_(0.1 * noise)
        elif isinstance(tensor, nn.Parameter):
            if tensor.ndim > 1:
                tensor.copy_(next(spread for part, spread in SPREADS if part in name) * noise)
            else:
                tensor.copy_(0.1 * noise + (1 if _GAIN.search(name) else 0))
        elif name.endswith("tid2eid"):  # a hash router's table: distinct experts for each token id
            rows = torch.rand(len(tensor), int(SIZES["num_experts"]), generator=generator)
            tensor.copy_(rows.argsort(-1)[:, : tensor.shape[1]])


__all__ = ["Architecture", "Excluded", "architecture", "architectures", "excluded", "tiny", "tiny_config"]
