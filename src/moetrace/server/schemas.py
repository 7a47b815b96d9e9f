"""What clients send, with LightLLM's names. Ranges are checked by `SamplingParams`, so that they are written once."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moetrace.engines.base import SamplingParams
from moetrace.errors import RequestError

_SAMPLING = SamplingParams()

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_new_tokens": (0, 1),
    "stop_sequences": (None, []),
    "allowed_token_ids": (None, []),
    "skip_special_tokens": (True,),
    "seed": (None, -1),
}
"""LightLLM parameters that this server does not have yet, and the values under which that makes no difference."""


class GenerateParameters(BaseModel):
    """How one request is generated, and what it returns beside the text."""

    model_config = ConfigDict(extra="allow", strict=True)

    max_new_tokens: int = Field(_SAMPLING.max_new_tokens, description="most tokens to generate, at least 1")
    do_sample: bool = Field(_SAMPLING.do_sample, description="sample; false takes the most likely token each time")
    temperature: float = Field(_SAMPLING.temperature, description="divides the logits, above 0")
    top_p: float = Field(_SAMPLING.top_p, description="nucleus, in (0, 1]")
    top_k: int = Field(_SAMPLING.top_k, description="most likely tokens to draw from; -1 means all")
    ignore_eos: bool = Field(_SAMPLING.ignore_eos, description="go on after an end-of-sequence token")
    add_special_tokens: bool = Field(True, description="let the tokenizer add its special tokens to a text prompt")
    return_details: bool = Field(False, description="return `tokens`: id, text and log-probability of each")
    return_routed_experts: bool = Field(False, description="return `routed_experts`")

    def sampling(self) -> SamplingParams:
        """The sampling part, range-checked.

        Raises:
            RequestError: a value is out of range, or a parameter is unknown or not supported.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _NEUTRAL:
                raise RequestError(
                    f"parameter {name!r} is unknown",
                    expected=", ".join(sorted({*type(self).model_fields, *_NEUTRAL})),
                    got=name,
                )
            if value not in _NEUTRAL[name]:
                raise RequestError(
                    f"parameter {name!r} is not supported by this server yet",
                    expected=f"it absent, or {_NEUTRAL[name][0]!r}",
                    got=repr(value),
                    fix="For several samples of one prompt send several requests."
                    if name in ("n", "best_of")
                    else None,
                )
        names = {item.name for item in fields(SamplingParams)} & set(type(self).model_fields)
        return SamplingParams(**{name: getattr(self, name) for name in names})


class GenerateRequest(BaseModel):
    """One prompt, as text or as token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str | list[int] = Field(description="the prompt: text, or token ids")
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters())
