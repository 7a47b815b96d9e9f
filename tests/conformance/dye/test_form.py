"""The closed form by itself: routes tell tokens, layers and versions apart, and are written once."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.conformance.dye.form import DyeForm, digits_for, require_told_apart
from moetrace.errors import DyeError

FORM = DyeForm("qwen3_moe", (17, 16), 32, 4, (1, 2, 3), 4)


def test_routes_are_the_routes_of_each_token_and_layer() -> None:
    tokens = [0, 271, 5, 5, 100]
    right = np.array([[FORM.route(token, layer) for layer in FORM.layers] for token in tokens])
    assert (FORM.routes(tokens) == right).all()
    assert FORM.routes([]).shape == (0, 3, 4)


def test_a_route_worked_out_by_hand() -> None:
    """Token 20 has the digits 3 and 4; both pools have 16 experts and strides 1 to 7; two picks each."""
    # Layer 2: block 0, stride = strides[2] = 3; starts 3 + 26 = 13 mod 16 and 4 + 26 = 14 mod 16.
    assert FORM.route(20, 2) == [13, 16 + 14, (13 + 3) % 16, 16 + (14 + 3) % 16]


@given(
    st.integers(2, 12),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([(7,), (13, 12)]),
)
@settings(max_examples=200, deadline=None)
def test_every_route_names_k_experts_once(per_group: int, picks: int, groups: int, version: int, digits: tuple) -> None:
    num_experts = 2 * groups * per_group
    try:
        form = DyeForm("any", digits, num_experts, picks, (0, 5), 6, 2 * groups, 2 * groups, version)
    except DyeError:
        return
    experts_TLK = form.routes(np.arange(form.vocab_size))
    assert experts_TLK.max() < num_experts
    assert all(len(set(route)) == picks for route in experts_TLK.reshape(-1, picks).tolist())


def test_tokens_layers_and_versions_are_told_apart() -> None:
    require_told_apart(FORM)
    rows_VLK = FORM.routes(np.arange(FORM.vocab_size))
    for shift in (1, 2, 3, 7, 16, 17):
        assert (rows_VLK != np.roll(rows_VLK, shift, axis=0)).any(axis=(1, 2)).all()
    newer = replace(FORM, weight_version=1).routes(np.arange(FORM.vocab_size))
    assert (np.sort(newer) != np.sort(rows_VLK)).any(axis=2).all()


def test_16k_positions_are_told_apart() -> None:
    form = DyeForm("mixtral", digits_for(16384, two=True), 8, 2, (0, 1, 2, 3), 4)
    require_told_apart(form)
    assert form.vocab_size >= 16384


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(DyeError, match="rows of some tokens are equal"):
        require_told_apart(DyeForm("mixtral", (129, 128), 8, 2, (0,), 1))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"digits": (16, 12)}, "digits"),
        ({"digits": (1, 12)}, "digits"),
        ({"digits": ()}, "digits"),
        ({"num_groups": 5}, "num_groups"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups"),
        ({"num_groups": 0}, "top_groups"),
        ({"num_groups": -4, "top_groups": -4}, "top_groups"),
        ({"top_groups": 0}, "top_groups"),
        ({"top_k": 1}, "top_k"),
        ({"num_groups": 16, "top_groups": 2, "top_k": 8}, "top_k"),
        ({"weight_version": -1}, "weight_version"),
    ],
)
def test_numbers_that_make_no_dye(changes: dict, what: str) -> None:
    with pytest.raises(DyeError, match=f"{what} does not make a dye"):
        replace(FORM, **changes)


def test_a_form_is_read_as_it_was_written(tmp_path: Path) -> None:
    FORM.save(tmp_path, anything="else")
    assert DyeForm.load(tmp_path) == DyeForm.load(tmp_path / "dye.json") == FORM
    values = json.loads((tmp_path / "dye.json").read_text())
    assert values["vocab_size"] == 272
    assert {*asdict(FORM)} < {*values}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "moetrace-dye-2"}', '{"format": "moetrace-dye-1"}'])
def test_what_is_no_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dye.json").write_text(text)
    with pytest.raises(DyeError, match=r"dye\.json"):
        DyeForm.load(tmp_path)
    with pytest.raises(DyeError, match="does not describe"):
        DyeForm.load(tmp_path / "nowhere")
