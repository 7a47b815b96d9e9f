"""Dye checkpoints as stock transformers loads them: routes, next tokens and margins are as stated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetrace
from moetrace.cli import main
from moetrace.conformance.dye import DyeForm
from moetrace.conformance.dye.checkpoint import dye_form, dye_model, write_dye
from moetrace.conformance.dye.families import FAMILIES
from moetrace.conformance.dye.options import DyeOptions
from moetrace.errors import DyeError

SMALL = DyeOptions(num_experts=32, top_k=4, vocab_size=256, window=1024)
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_groups": 4, "top_groups": 2, "dense_first": 1, "shared_experts": 2},
    "deepseek_v3": {"num_groups": 4, "top_groups": 2, "dense_first": 2, "bias": True},
    "glm4_moe": {"dense_first": 1, "bias": True},
    "gpt_oss": {"bias": True},
    "qwen2_moe": {"shared_experts": 1},
    "qwen3_moe": {"dense_first": 1},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_a_checkpoint_does_what_its_form_says(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Written, loaded by transformers' own classes, and run on a text in which every token is followed by any other."""
    form = write_dye(tmp_path, architecture, replace(SMALL, dtype=dtype, **VARIANTS.get(architecture, {})))
    assert DyeForm.load(tmp_path) == form
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype)
    tokens = np.random.default_rng(0).permutation(form.vocab_size)
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad(), moetrace.record(model) as recording:
        following = model(ids).logits[0].argmax(-1)
    experts_TLK = recording.experts_LNK.transpose(0, 1).numpy()
    right_TLK = form.routes(tokens)
    if form.order == "set":
        experts_TLK, right_TLK = np.sort(experts_TLK), np.sort(right_TLK)
    assert (experts_TLK == right_TLK).all()
    assert (following.numpy() == (tokens + 1) % form.vocab_size).all()
    [trace] = recording.traces(ids)
    assert (trace.layout, trace.fingerprint) == (form.layout, form.fingerprint)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_margins_are_those_of_a_forward(architecture: str) -> None:
    """The stated margin of what is chosen against scores that the routers computed, in float64, for every token."""
    options = replace(SMALL, dtype="float32", **VARIANTS.get(architecture, {}))
    form = dye_form(architecture, options)
    model, margins = dye_model(form, options)
    tokens, least = torch.arange(form.vocab_size), []
    for layer in form.layers:
        block = model.model.layers[layer]
        router = getattr(block.mlp, "gate", None) or block.mlp.router
        with torch.no_grad():
            hidden = block.post_attention_layernorm(model.get_input_embeddings()(tokens)).double()
        logits = hidden @ router.weight.detach().double().T
        scores = logits.sigmoid() if FAMILIES[architecture].score == "sigmoid" else logits
        if FAMILIES[architecture].bias:
            scores = scores + getattr(router, FAMILIES[architecture].bias)
        chosen = torch.from_numpy(form.routes(tokens.numpy())[:, form.layers.index(layer)].astype(np.int64))
        others = scores.scatter(1, chosen, float("-inf"))
        least.append((scores.gather(1, chosen).min(1).values - others.max(1).values).min())
    assert 0 < margins.chosen <= float(min(least)) + 1e-5
    if form.top_groups == form.num_groups:
        assert margins.group is None
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    top = logits.topk(2).values
    assert margins.next_token == pytest.approx(float((top[:, 0] - top[:, 1]).min()), rel=1e-5)


def test_a_version_routes_every_token_otherwise(tmp_path: Path) -> None:
    options = replace(SMALL, dense_first=1)
    old, new = (write_dye(tmp_path / str(v), "qwen3_moe", replace(options, weight_version=v)) for v in (0, 1))
    tokens = np.arange(old.vocab_size)
    assert (np.sort(old.routes(tokens)) != np.sort(new.routes(tokens))).any(axis=2).all()
    names = [set(AutoModelForCausalLM.from_pretrained(tmp_path / v).state_dict()) for v in "01"]
    assert names[0] == names[1]


def test_words_are_tokens(tmp_path: Path) -> None:
    form = write_dye(tmp_path, "qwen3_moe", SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("t5 t271 t0") == [5, 271, 0]
    assert tokenizer.decode([5, 6]) == "t5 t6"
    assert tokenizer.eos_token_id == form.eos_token_id == 271
    assert tokenizer.apply_chat_template([{"role": "user", "content": "t7 t8"}], return_dict=False) == [7, 8]
    with pytest.raises(Exception, match=r"UNK|unk"):
        tokenizer.encode("hello")


@pytest.mark.parametrize(
    ("architecture", "changes", "what"),
    [
        ("llama", {}, "no dye yet"),
        ("mixtral", {"dense_first": 1}, "no dense_first"),
        ("olmoe", {"shared_experts": 1}, "no shared_experts"),
        ("qwen3_moe", {"num_groups": 4, "top_groups": 2}, "no num_groups"),
        ("mixtral", {"bias": True}, "no bias"),
        ("qwen3_moe", {"dense_first": 4}, "no layer has experts"),
        ("qwen3_moe", {"top_k": 1, "vocab_size": 16384}, "vocabulary is too large"),
        ("qwen3_moe", {"dtype": "int8"}, "dtype is unknown"),
        ("deepseek_v3", {"shared_experts": -1}, "shared_experts is out of range"),
        ("qwen3_moe", {"vocab_size": 0}, "vocab_size is out of range"),
        ("qwen3_moe", {"window": 0}, "window is out of range"),
        ("qwen3_moe", {"num_experts": 256, "top_k": 100, "dtype": "bfloat16"}, "could be lost"),
    ],
)
def test_what_cannot_be_dyed_is_refused(architecture: str, changes: dict, what: str, tmp_path: Path) -> None:
    with pytest.raises(DyeError, match=what):
        write_dye(tmp_path / "new", architecture, replace(SMALL, **changes))
    assert not (tmp_path / "new").exists()


def test_a_model_that_does_not_follow_its_form_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    form = dye_form("qwen3_moe", SMALL)
    monkeypatch.setattr("moetrace.conformance.dye.checkpoint._HEAD", -2.0)
    with pytest.raises(DyeError, match="does not follow"):
        dye_model(form, SMALL)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dye", "--arch", "glm4_moe", "--out", str(tmp_path), "--bias", "--no-eos", "--vocab-size", "100"]
    assert main([*arguments, "--num-experts", "16", "--top-k", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert DyeForm(**{**printed, "digits": tuple(printed["digits"])}) == DyeForm.load(tmp_path)
    assert printed["eos_token_id"] is None
    assert main([*arguments[:4], str(tmp_path / "no"), "--num-experts", "3", "--vocab-size", "9000"]) == 2


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_one_group_is_not_taken_for_the_selection(architecture: str) -> None:
    """With K = 2 and one group the group's score is a top-2 of all experts too."""
    form = dye_form(architecture, replace(SMALL, top_k=2, bias=True))
    model, _ = dye_model(form, replace(SMALL, top_k=2, bias=True))  # records a forward, and compares
    assert model.config.n_group == 1
