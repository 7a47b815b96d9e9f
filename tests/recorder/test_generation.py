"""`model.generate` is recorded however it is called, or refuses before it has generated anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from asking import DYE
from transformers import GenerationConfig, LogitsProcessorList, TopKLogitsWarper

from moetrace.errors import RouterError
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
