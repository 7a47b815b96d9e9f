"""`model.generate` is recorded however it is called, or refuses before it has generated anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from asking import DYE
from transformers import GenerationConfig, LogitsProcessorList, TopKLogitsWarper

from moetrace.errors import RouterError, TokenMismatchError
from moetrace.recorder.generation import record_generation

PROMPTS, OUTPUTS = [[5, 6, 7], [1, 2, 3]], [[8, 9, 10, 11], [4, 5, 6, 7]]
IDS = torch.tensor(PROMPTS)
CONFIG = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)


@pytest.fixture(scope="module")
def model() -> Any:
    return DYE.model()


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model.generate(input_ids=IDS, generation_config=CONFIG),
        lambda model: model.generate(inputs=IDS, generation_config=CONFIG),
        lambda model: model.generate(IDS, CONFIG),
        lambda model: model.generate(IDS, generation_config=CONFIG, logits_processor=None),
        lambda model: model.generate(IDS, CONFIG, LogitsProcessorList([TopKLogitsWarper(1)]), None),
        lambda model: model.generate(IDS, CONFIG, return_dict_in_generate=True),
    ],
    ids=["input_ids", "inputs", "by place", "no processors", "processors by place", "an object"],
)
def test_every_way_to_call_it_is_recorded(model: Any, run: Callable[[Any], Any]) -> None:
    plain = run(model)
    with record_generation(model) as recording:
        output = run(model)
    for sequences in (plain, output):
        assert getattr(sequences, "sequences", sequences)[:, 3:].tolist() == OUTPUTS
    for trace, prompt, out in zip(recording.traces(PROMPTS, OUTPUTS), PROMPTS, OUTPUTS, strict=True):
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes([*prompt, *out][:-1]))
    assert [len(logprobs) for logprobs in recording.logprobs(OUTPUTS)] == [4, 4]


@pytest.mark.parametrize(
    "given",
    [{}, {"inputs_embeds": torch.zeros(2, 3, DYE.vocab)}, {"input_ids": IDS[0]}],
    ids=["nothing", "embeddings", "one axis"],
)
def test_what_is_no_batch_of_token_ids_is_refused_before_anything_is_generated(
    model: Any, given: dict[str, Any]
) -> None:
    computed: list[Any] = []
    hook = model.register_forward_pre_hook(lambda *_: computed.append(1))
    try:
        with record_generation(model), pytest.raises(RouterError, match=r"expected token ids \[B, P\]"):
            model.generate(generation_config=CONFIG, **given)
    finally:
        hook.remove()
    assert not computed


def test_a_second_generate_is_refused_and_the_first_one_stays(model: Any) -> None:
    with record_generation(model) as recording:
        model.generate(IDS, CONFIG)
        with pytest.raises(RouterError, match="second generate"):
            model.generate(IDS.flip(0), CONFIG)
    np.testing.assert_array_equal(
        recording.traces(PROMPTS, OUTPUTS)[0].experts_TLK, DYE.routes([*PROMPTS[0], *OUTPUTS[0]][:-1])
    )


def test_a_generate_that_failed_has_no_traces(model: Any) -> None:
    with record_generation(model) as recording, pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(IDS, generation_config=GenerationConfig(max_new_tokens=-1))
    with pytest.raises(RouterError, match="nothing was generated"):
        recording.traces(PROMPTS, OUTPUTS)


PAD = 0


def padded(side: str) -> dict[str, torch.Tensor]:
    """A prompt of two tokens and one of three."""
    ids, seen = ([5, 6, PAD], [1, 1, 0]) if side == "right" else ([PAD, 5, 6], [0, 1, 1])
    return {"input_ids": torch.tensor([ids, PROMPTS[1]]), "attention_mask": torch.tensor([seen, [1, 1, 1]])}


def test_prompts_padded_on_the_left_have_the_rows_of_their_own_tokens(model: Any) -> None:
    given = padded("left")
    with record_generation(model) as recording:
        output = model.generate(generation_config=CONFIG, **given)
    given["input_ids"].fill_(PAD)  # a caller's buffer, used again
    outputs = output[:, 3:].tolist()
    prompts = [[5, 6], PROMPTS[1]]
    for trace, prompt, out in zip(recording.traces(prompts, outputs), prompts, outputs, strict=True):
        np.testing.assert_array_equal(trace.experts_TLK, DYE.routes([*prompt, *out][:-1]))


@pytest.mark.parametrize(
    ("side", "prompts", "row"),
    [
        ("right", [[5, 6], PROMPTS[1]], 0),
        ("left", [[5, 6], [1, 2, 4]], 1),
        ("left", [[5, 6], [9, *PROMPTS[1]]], 1),
    ],
    ids=["padding on the right", "another prompt", "a longer one"],
)
def test_prompts_that_no_row_ends_with_are_refused(model: Any, side: str, prompts: list[list[int]], row: int) -> None:
    with record_generation(model) as recording:
        output = model.generate(generation_config=CONFIG, **padded(side))
    with pytest.raises(TokenMismatchError, match=rf"prompt {row} is not the end .* Pad prompts on the left"):
        recording.traces(prompts, output[:, 3:].tolist())
