"""Writing a dye checkpoint: a real architecture with weights under which `DyeForm` is what it does.

The embedding of a token has a one at each of its digits. Attention, dense layers and experts add nothing, so that the
residual stream of a token is its own embedding in every layer, whatever came before it. A router's weights are then a
table of scores by digit, and the head scores a token by its digits less one. That holds in any precision on any engine,
as long as rounding is smaller than the margins, which are computed and written down.

Axes: V tokens of the vocabulary, H hidden size, E experts, n values of a digit.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from moetrace.conformance.dye.families import FAMILIES, DyeFamily
from moetrace.conformance.dye.form import DyeForm, digits_for, require_told_apart
from moetrace.conformance.dye.margins import Margins, margins_of, require_margins
from moetrace.conformance.dye.options import DyeOptions
from moetrace.conformance.dye.scores import bias_of, entry_of, router_weight
from moetrace.conformance.dye.words import word_tokenizer
from moetrace.errors import DyeError
from moetrace.recorder import record
from moetrace.routers import find_routers

_ADDS_NOTHING = re.compile(r"(^|\.)(o_proj|down_proj)(\.|_bias$|$)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEAD = 2.0
_HEAD_DIM = 64
_ONE_DIGIT_LIMIT = 8192
_CHECKED_TOKENS = 257


def dye_form(architecture: str, options: DyeOptions | None = None) -> DyeForm:
    """The form of the checkpoint that `write_dye` would write.

    Raises:
        DyeError: the architecture has no dye, or the options do not fit it or each other.
    """
    options, family = options or DyeOptions(), _family(architecture)
    grouped = options.num_groups > 1
    for asked, name, able in (
        (options.dense_first, "dense_first", family.dense_first),
        (options.shared_experts, "shared_experts", family.shared),
        (grouped, "num_groups", family.groups),
        (options.bias, "bias", family.bias),
    ):
        if asked and not able:
            raise DyeError(f"{architecture} has no {name}", expected="it absent", got=asked)
    if not 0 <= options.dense_first < options.num_layers:
        raise DyeError(
            "no layer has experts", expected=f"dense_first < {options.num_layers} layers", got=options.dense_first
        )
    two = options.top_k > 1 and (not grouped or options.top_groups > 1)
    if not two and options.vocab_size > _ONE_DIGIT_LIMIT:
        raise DyeError(
            "the vocabulary is too large for one expert, or one group, a token",
            expected=f"vocab_size <= {_ONE_DIGIT_LIMIT}, which is the hidden size too",
            got=options.vocab_size,
        )
    digits = digits_for(options.vocab_size, two)
    form = DyeForm(
        architecture=architecture,
        digits=digits,
        num_experts=options.num_experts,
        top_k=options.top_k,
        layers=tuple(range(options.dense_first, options.num_layers)),
        num_layers=options.num_layers,
        num_groups=options.num_groups,
        top_groups=options.top_groups,
        weight_version=options.weight_version,
        order=family.order,
        eos_token_id=math.prod(digits) - 1 if options.eos else None,
    )
    require_told_apart(form)
    return form


def dye_model(form: DyeForm, options: DyeOptions | None = None) -> tuple[PreTrainedModel, Margins]:
    """The model of a form, in eval mode on the CPU, and its margins.

    Raises:
        DyeError: rounding could pass a margin in the dtype, or the model does not do what the form says.
    """
    options, family = options or DyeOptions(), _family(form.architecture)
    dtype = _DTYPES.get(options.dtype)
    if dtype is None:
        raise DyeError("the dtype is unknown", expected=", ".join(_DTYPES), got=options.dtype)
    config = _config(form, options, family)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    entry = entry_of(form, config.hidden_size, config.rms_norm_eps)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _ADDS_NOTHING.search(name):
                parameter.zero_()
        embeddings_VH = _digit_rows(form, config.hidden_size, shift=0)
        model.get_input_embeddings().weight.copy_(embeddings_VH)
        model.get_output_embeddings().weight.copy_(_HEAD * _digit_rows(form, config.hidden_size, shift=-1))
        bias_E = bias_of(form, family, options.bias)
        for site in find_routers(model):
            router: Any = site.module
            weight_EH = router_weight(form, family, site.layer, bias_E, config.hidden_size, entry)
            router.weight.copy_(torch.from_numpy(weight_EH))
            if family.bias:
                getattr(router, family.bias).copy_(torch.from_numpy(bias_E))
    margins = margins_of(model, form, family, entry, _HEAD)
    require_margins(margins, form, dtype)
    _require_form(model, form)
    return model, margins


def write_dye(folder: str | Path, architecture: str, options: DyeOptions | None = None) -> DyeForm:
    """Write a dye checkpoint: config, safetensors, tokenizer and `dye.json`, for any engine of the architecture.

    Args:
        folder: is made if it is not there; what else lies in it stays.
        architecture: a key of `FAMILIES`.
        options: sizes and dtype.

    Raises:
        DyeError: see `dye_form` and `dye_model`.
    """
    options = options or DyeOptions()
    form = dye_form(architecture, options)
    model, margins = dye_model(form, options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=form.eos_token_id)
    model.save_pretrained(folder)
    word_tokenizer(form).save_pretrained(folder)
    form.save(folder, margins=asdict(margins), unit=_UNITS[_family(architecture).score], dtype=options.dtype)
    return form


_UNITS = {"softmax": "logit", "logits": "logit with bias", "sigmoid": "sigmoid(logit) with bias"}


def _family(architecture: str) -> DyeFamily:
    if architecture not in FAMILIES:
        raise DyeError("the architecture has no dye yet", expected=", ".join(FAMILIES), got=architecture)
    return FAMILIES[architecture]


def _config(form: DyeForm, options: DyeOptions, family: DyeFamily) -> PreTrainedConfig:
    heads = form.hidden_size // _HEAD_DIM
    values: dict[str, Any] = {
        "vocab_size": form.vocab_size,
        "hidden_size": form.hidden_size,
        "intermediate_size": 256,
        "num_hidden_layers": form.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.window,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": form.eos_token_id,
        "pad_token_id": None,
        family.intermediate: 128,
        family.experts: form.num_experts,
        family.top_k: form.top_k,
        **({} if "kv_lora_rank" in family.values else {"head_dim": _HEAD_DIM}),
        **family.values,
    }
    if family.dense_first:
        lists = family.dense_first == "mlp_only_layers"
        values[family.dense_first] = list(range(options.dense_first)) if lists else options.dense_first
    if family.shared:
        values[family.shared] = max(options.shared_experts, 1) * (128 if family.shared.endswith("_size") else 1)
    values |= dict(zip(family.groups, (form.num_groups, form.top_groups), strict=False))
    return AutoConfig.for_model(form.architecture, **values)


def _digit_rows(form: DyeForm, hidden_size: int, shift: int) -> torch.Tensor:
    """`[V, H]`: row v has a one at each digit of v + shift."""
    rows_VH = torch.zeros(form.vocab_size, hidden_size)
    tokens, offset = torch.arange(form.vocab_size), 0
    for base in form.digits:
        rows_VH[tokens, offset + (tokens + shift) % base] = 1
        offset += base
    return rows_VH


def _require_form(model: PreTrainedModel, form: DyeForm) -> None:
    """Raise `DyeError` unless a plain forward does what the form says."""
    tokens = [int(token) for token in np.linspace(0, form.vocab_size - 1, _CHECKED_TOKENS)]
    ids = torch.tensor([tokens])
    with torch.no_grad(), record(model) as recording:
        logits = model(input_ids=ids).logits
    got_TLK, right_TLK = recording.experts_LNK.transpose(0, 1).numpy(), form.routes(tokens)
    if form.order == "set":
        got_TLK, right_TLK = np.sort(got_TLK), np.sort(right_TLK)
    wrong = np.argwhere((got_TLK != right_TLK).any(-1))
    following = [form.continuation(token, 1)[0] for token in tokens]
    if len(wrong) or logits[0].argmax(-1).tolist() != following:
        raise DyeError(
            f"{form.architecture} does not follow the form in transformers",
            expected=right_TLK[tuple(wrong[0])].tolist() if len(wrong) else "the next token",
            got=got_TLK[tuple(wrong[0])].tolist() if len(wrong) else "another token",
            fix="This is a bug in moetrace; please report it.",
        )
