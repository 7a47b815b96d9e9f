"""Which routers a model has, and the layout and fingerprint that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, NAMES, ONE_OF_EACH, build, config_of, routers_of
from torch import nn
from traces import refused
from transformers import AutoModelForCausalLM, LlamaConfig

from moetrace import record, replay
from moetrace.errors import LayoutMismatchError, NotMoeError, RouterError, UnsupportedRouterError
from moetrace.layout import MoeLayout
from moetrace.routers import config_layout, find_routers, fingerprint_of, layout_of, tap_model
from moetrace.routers.families import TRAITS
from moetrace.routers.find import traits_of


def layout_stated(name: str) -> MoeLayout:
    family = FAMILIES[name]
    return MoeLayout(family.layers, family.num_experts, family.top_k)


def dense_config() -> LlamaConfig:
    return LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_has_absolute_layer_numbers_and_the_sizes_of_the_model(name: str) -> None:
    assert layout_of(build(name)) == layout_stated(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_known_from_the_config_alone(name: str) -> None:
    assert config_layout(config_of(name)) == layout_stated(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_known_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert layout_of(model) == layout_stated(name)


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, (0, 2)),
        ("qwen3_moe", {"mlp_only_layers": [2]}, (0, 1)),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2, "num_hidden_layers": 4}, (1, 3)),
        ("deepseek_v3", {"first_k_dense_replace": 2}, (2,)),
        ("deepseek_v2", {"first_k_dense_replace": 0}, (0, 1, 2)),
        ("mixtral", {"num_hidden_layers": 12}, tuple(range(12))),  # 10 after 9, not after 1
    ],
)
def test_dense_layers_never_shift_the_layer_numbers(
    name: str, changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    model = build(name, **changes)
    assert layout_of(model).layers == layers
    assert [site.name for site in find_routers(model)] == [f"model.layers.{layer}.mlp.gate" for layer in layers]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_site_names_its_router(name: str) -> None:
    model = build(name)
    sites = find_routers(model)
    assert [site.module for site in sites] == routers_of(model, name)
    assert [site.index for site in sites] == list(range(len(FAMILIES[name].layers)))


def test_a_dense_model_is_refused_as_dense() -> None:
    model = AutoModelForCausalLM.from_config(dense_config())
    with pytest.raises(NotMoeError, match="LlamaForCausalLM is a dense model"):
        layout_of(model)
    with pytest.raises(NotMoeError), record(model):
        pass
    with pytest.raises(NotMoeError):
        config_layout(dense_config())


@pytest.mark.parametrize("use", [layout_of, fingerprint_of, tap_model], ids=lambda use: use.__name__)
@pytest.mark.parametrize("model", ["path/to/model", dense_config(), None], ids=lambda model: type(model).__name__)
def test_what_is_no_model_is_refused(use: Any, model: Any) -> None:
    with refused(RouterError, "this is no model", expected="torch.nn.Module", got=repr(model).split()[0]):
        use(model)


def test_a_module_without_a_config_is_refused_as_dense() -> None:
    with pytest.raises(NotMoeError):
        layout_of(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(("what", "value"), [("num_experts_per_tok", 3), ("experts", 12)])
def test_a_config_that_contradicts_the_modules_is_refused(name: str, what: str, value: int) -> None:
    model = build(name)
    config = model.config
    if what == "experts":
        what = next(key for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in config.to_dict())
    setattr(config, what, value)
    with pytest.raises(LayoutMismatchError, match=f"got \\[{value}\\]"):
        layout_of(model)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_experts_without_a_recognised_router_are_refused_not_skipped(layers: tuple[int, ...]) -> None:
    model = build("mixtral")
    for layer in layers:
        del model.model.layers[layer].mlp.gate.top_k
    with pytest.raises(UnsupportedRouterError, match="experts without a router") as refused:
        layout_of(model)
    assert f"model.layers.{layers[0]}.mlp" in str(refused.value)


@pytest.mark.parametrize("broken", [True, 0, None, "2"])
def test_a_top_k_that_is_not_a_count_is_no_router(broken: Any) -> None:
    model = build("mixtral")
    model.model.layers[2].mlp.gate.top_k = broken
    with pytest.raises(UnsupportedRouterError, match="experts without a router"):
        layout_of(model)


def test_layers_of_two_sizes_are_refused() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.gate.top_k = 3
    with pytest.raises(UnsupportedRouterError, match="differ in experts or top-k"):
        layout_of(model)
    model = build("mixtral")
    model.model.layers[1].mlp = build("mixtral_16").model.layers[1].mlp
    with pytest.raises(UnsupportedRouterError, match="differ in experts or top-k"):
        layout_of(model)


def test_a_layer_with_two_routers_is_named_twice() -> None:
    model = build("mixtral")
    model.model.layers[1].second = build("mixtral").model.layers[1].mlp
    assert layout_of(model).layers == (0, 1, 1, 2)
    assert [site.name for site in find_routers(model)][1:3] == ["model.layers.1.mlp.gate", "model.layers.1.second.gate"]
    model.model.layers[1].second.gate.top_k = 3
    with pytest.raises(UnsupportedRouterError, match="differ in experts or top-k"):
        layout_of(model)


def test_two_layers_of_one_number_are_refused() -> None:
    model = build("mixtral")
    model.draft = nn.ModuleList([build("mixtral").model.layers[0]])
    with pytest.raises(UnsupportedRouterError, match="several decoder layers of one number") as refused:
        layout_of(model)
    assert "draft.0.mlp.gate" in str(refused.value)


def test_a_router_whose_layer_is_not_evident_is_refused() -> None:
    with pytest.raises(UnsupportedRouterError, match="not evident"):
        layout_of(nn.ModuleList([build("mixtral")]))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_fingerprint_survives_dtype_training_and_wrappers(name: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base_model, self.config = model, model.config

    fingerprint = fingerprint_of(build(name, seed=0))
    assert fingerprint == fingerprint_of(build(name, seed=1))
    assert fingerprint == fingerprint_of(build(name, dtype=torch.bfloat16))
    assert fingerprint == fingerprint_of(build(name, experts="grouped_mm"))
    assert fingerprint == fingerprint_of(Wrapper(build(name)))
    assert len(fingerprint) == 64


def test_a_fingerprint_tells_models_apart_whose_routes_mean_other_things() -> None:
    models = {name: build(name) for name in ONE_OF_EACH}
    models["vocabulary"] = build("qwen3_moe", vocab_size=65)
    models["depth"] = build("qwen3_moe", num_hidden_layers=4)
    models["depth, same routers"] = build("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 3])
    models["experts"] = build("qwen3_moe", num_local_experts=9)
    models["top-k"] = build("qwen3_moe", num_experts_per_tok=3)
    models["hidden size"] = build("qwen3_moe", hidden_size=64)
    models["dense layer elsewhere"] = build("qwen3_moe", mlp_only_layers=[2])
    fingerprints = {what: fingerprint_of(model) for what, model in models.items()}
    assert len(set(fingerprints.values())) == len(models), fingerprints


class Wrapper(nn.Module):
    """What DistributedDataParallel is to a reader of modules: something without a config that holds the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapped_model_has_the_layout_fingerprint_and_routers_of_the_model_inside(depth: int) -> None:
    model = build("qwen3_moe")
    wrapped: nn.Module = model
    for _ in range(depth):
        wrapped = Wrapper(wrapped)
    assert layout_of(wrapped) == layout_of(model)
    assert fingerprint_of(wrapped) == fingerprint_of(model)
    assert find_routers(wrapped) == find_routers(model)


def test_a_record_and_a_replay_may_overlap_through_a_wrapper_and_the_model_inside() -> None:
    model, tokens = build("qwen3_moe"), torch.arange(12)[None]
    wrapped = Wrapper(model)
    with torch.no_grad(), record(model) as recording, record(wrapped) as other:
        model(tokens, use_cache=False)
    assert torch.equal(recording.experts_LNK, other.experts_LNK)
    with torch.no_grad(), replay(wrapped, recording.traces(tokens), input_ids=tokens) as session, record(model):
        wrapped.module(tokens, use_cache=False)
    assert session.stats().overlap == 1.0


@pytest.mark.parametrize("name", [name for name, traits in TRAITS.items() if not traits.refusal])
def test_a_router_whose_class_fsdp2_replaced_is_known_by_the_class_it_had(name: str) -> None:
    """`fully_shard` makes the class of a module a subclass FSDP*, of FSDPModule and the class it was."""
    traits = TRAITS[name]
    kind = type(name, (nn.Module,), {traits.method: lambda *_: None})
    sharded = type(f"FSDP{name}", (type("FSDPModule", (), {}), kind), {})
    assert traits_of(sharded()) is traits
