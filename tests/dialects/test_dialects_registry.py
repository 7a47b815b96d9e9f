"""Every dialect by its name, with one signature for all: what a program uses that does not know its engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from traces import make_trace, refused

from moetrace.dialects import DIALECTS, dialect_of
from moetrace.errors import FormatError, MissingRowError
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

LAYOUT = MoeLayout((1, 3), 16, 2)
TOKENS = [5, 6, 7, 8, 9]
WHOLE = make_trace(TOKENS, LAYOUT)


def routes(trace: RoutingTrace) -> tuple[Any, ...]:
    return trace.experts_TLK.tolist(), trace.valid_T.tolist(), trace.start, trace.layout, trace.token_sha256


def test_these_dialects_are_known() -> None:
    assert list(DIALECTS) == ["lightllm", "sglang", "vllm", "vllm-http", "trtllm", "megatron", "megatron-http"]
    assert all(dialect_of(name).name == name for name in DIALECTS)


def test_another_name_is_refused() -> None:
    with refused(FormatError, "the dialect is unknown", expected="lightllm, sglang, vllm", got="tgi"):
        dialect_of("tgi")


@pytest.mark.parametrize("name", DIALECTS)
def test_what_a_dialect_writes_it_reads(name: str) -> None:
    payload = DIALECTS[name].write(WHOLE, 5)
    assert routes(DIALECTS[name].read(payload, TOKENS, LAYOUT, 5)) == routes(WHOLE)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_missing_row_is_said_or_refused(name: str) -> None:
    holed = make_trace(TOKENS, LAYOUT, valid=[True, False, True, True])
    if DIALECTS[name].says_missing:
        assert routes(DIALECTS[name].read(DIALECTS[name].write(holed, 5), TOKENS, LAYOUT, 5)) == routes(holed)
    else:
        with pytest.raises(MissingRowError):
            DIALECTS[name].write(holed, 5)


@pytest.mark.parametrize("name", DIALECTS)
def test_a_start_is_read_where_the_dialect_has_one(name: str) -> None:
    later, dialect = WHOLE.slice(2, 4), DIALECTS[name]
    if dialect.has_start:
        assert routes(dialect.read(dialect.write(later, 5), TOKENS, LAYOUT, 5, start=2)) == routes(later)
    else:
        with refused(FormatError, f"{name} payloads begin at the first token", got=2):
            dialect.read(dialect.write(WHOLE, 5), TOKENS, LAYOUT, 5, start=2)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_refuses_a_token_more_or_less(name: str) -> None:
    payload = DIALECTS[name].write(WHOLE, 5)
    if name == "lightllm":  # ours is bound to its tokens by their hash: LightLLM's own has three keys
        payload = {key: payload[key] for key in ("shape", "dtype", "data")}
    for tokens in (TOKENS[:-1], [*TOKENS, 1]):
        with pytest.raises(FormatError):
            DIALECTS[name].read(payload, tokens, LAYOUT, 5)


@pytest.mark.parametrize("name", [name for name, dialect in DIALECTS.items() if dialect.every_layer])
def test_dialects_of_every_layer_refuse_another_number_of_layers(name: str) -> None:
    with pytest.raises(FormatError):
        DIALECTS[name].read(DIALECTS[name].write(WHOLE, 5), TOKENS, LAYOUT, 6)


def test_a_dialect_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DIALECTS["vllm"].has_start = False  # type: ignore[misc]


@pytest.mark.parametrize("name", DIALECTS)
def test_numpy_tokens_are_as_good_as_a_list(name: str) -> None:
    payload = DIALECTS[name].write(WHOLE, 5)
    assert routes(DIALECTS[name].read(payload, np.array(TOKENS), LAYOUT, 5)) == routes(WHOLE)
