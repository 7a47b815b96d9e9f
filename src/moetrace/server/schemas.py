"""What clients send, with LightLLM's names. Ranges are checked by `SamplingParams`, so that they are written once."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from moetrace.dialects import AxisOrder, IdType
from moetrace.engines.requests import SamplingParams
from moetrace.errors import RequestError
from moetrace.server.parameters import close, is_neutral

_SAMPLING = SamplingParams()

T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True)]
"""A list, of which only the first wrong element is told: an error for each can take a hundred times its memory."""
TokenIds = Listed[int]
Prompt = str | TokenIds
Prompts = Listed[Prompt]
Codec = Literal["raw", "bits", "set", "auto", "raw+zstd", "bits+zstd", "set+zstd", "auto+zstd"]


def prompts_in(inputs: Prompt | Prompts) -> list[Prompt]:
    """The prompts one by one, of one prompt or a list of them."""
    if isinstance(inputs, list) and inputs and not isinstance(inputs[0], int):  # no mixed list has this type
        return inputs
    return [inputs]  # type: ignore[list-item]


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "allowed_token_ids": (None, []),
}
"""LightLLM parameters that this server does not have, and the values under which that makes no difference."""

_WITHOUT_PENALTIES = "Leave it out: a step begins before the tokens of the last one are known, which it would penalise."

_UNSEEDED = -1


class GenerateParameters(BaseModel):
    """How one request is generated, and what it returns beside the text."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=lambda schema: close(schema, _NEUTRAL))

    max_new_tokens: int = Field(_SAMPLING.max_new_tokens, description="most tokens to generate; 0 scores the prompt")
    min_new_tokens: int = Field(_SAMPLING.min_new_tokens, description="fewest tokens to generate")
    do_sample: bool = Field(_SAMPLING.do_sample, description="sample; false takes the most likely token each time")
    temperature: float = Field(_SAMPLING.temperature, description="divides the logits, 0.001 to 1000000")
    top_p: float = Field(_SAMPLING.top_p, description="nucleus, in (0, 1]")
    top_k: int = Field(_SAMPLING.top_k, description="most likely tokens to draw from; -1 means all")
    seed: int | None = Field(_SAMPLING.seed, description="what is drawn, by 64 bits; null or -1: by chance")
    n: int = Field(_SAMPLING.n, description="sequences to generate from each prompt")
    best_of: int | None = Field(None, description="must equal n")
    ignore_eos: bool = Field(_SAMPLING.ignore_eos, description="go on after an end-of-sequence token")
    stop_sequences: str | Listed[str | TokenIds] | None = Field(
        None, description="what ends a sequence: a text, or a list of texts and of lists of token ids"
    )
    add_special_tokens: bool = Field(True, description="let the tokenizer add its special tokens to a text prompt")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of generated_text")
    return_details: bool = Field(False, description="return `tokens`: id, text and log-probability of each")
    return_prompt_logprobs: bool = Field(False, description="return `prompt_logprobs`")
    return_routed_experts: bool | Literal["reference"] = Field(
        False, description="return `routed_experts`, or where the server keeps them"
    )
    routed_experts_start: int = Field(0, description="position of the first row to return, at most the prompt's length")
    routed_experts_layout: AxisOrder = Field("LTK", description="order of the axes: LTK or TLK")
    routed_experts_dtype: IdType = Field("int32", description="type of the expert ids")
    routed_experts_codec: Codec | None = Field(
        None, description="return them as a container: how their ids are packed; null: as an array of ids"
    )
    routed_experts_every: int = Field(
        0, description="in a stream: new rows every so many tokens; 0: all at the end", ge=0
    )

    def sampling(self) -> SamplingParams:
        """The sampling part, range-checked.

        Raises:
            RequestError: a value is out of range, or a parameter is unknown, not supported or contradicts another.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _NEUTRAL:
                raise RequestError(
                    f"parameter {name!r} is unknown",
                    expected=", ".join(sorted({*type(self).model_fields, *_NEUTRAL})),
                    got=name,
                )
            if not is_neutral(value, _NEUTRAL[name]):
                raise RequestError(
                    f"parameter {name!r} is not supported by this server",
                    expected=f"it absent, or {_NEUTRAL[name][0]!r}",
                    got=repr(value),
                    fix=_WITHOUT_PENALTIES if name.endswith("_penalty") else "Leave it out.",
                )
        if self.best_of not in (None, self.n):
            raise RequestError(
                "best_of is not n, and this server ranks no sequences",
                expected=f"best_of absent, or {self.n}",
                got=self.best_of,
                fix="Ask for n sequences with return_details and rank them by their log-probabilities.",
            )
        changed = [
            name
            for name, field in sorted(type(self).model_fields.items())
            if name.startswith("routed_experts_") and getattr(self, name) != field.default
        ]
        if changed and not self.return_routed_experts:
            raise RequestError(f"{changed[0]} says how to return routes that were not asked for", fix=_ASK)
        self._check_routing_form()
        stops = [self.stop_sequences] if isinstance(self.stop_sequences, str) else self.stop_sequences or []
        runs = [tuple(stop) for stop in stops if not isinstance(stop, str)]
        names = {item.name for item in fields(SamplingParams)} & set(type(self).model_fields) - {"stop_sequences"}
        values = {name: getattr(self, name) for name in names}
        return SamplingParams(
            **values | {"seed": None if self.seed == _UNSEEDED else self.seed},
            stop=tuple(stop for stop in stops if isinstance(stop, str)),
            stop_token_ids=tuple(run[0] for run in runs if len(run) == 1),
            stop_sequences=tuple(run for run in runs if len(run) != 1),
        )

    def _check_routing_form(self) -> None:
        """Raise `RequestError` where routes are to be a container and an array at the same time."""
        if self.routed_experts_codec is None and self.return_routed_experts != "reference":
            return
        given = [name for name in ("routed_experts_dtype", "routed_experts_layout") if name in self.model_fields_set]
        if given and (given != ["routed_experts_layout"] or self.routed_experts_layout != "TLK"):
            raise RequestError(
                "routes by codec or by reference are a container, which has a type and an order (TLK) of its own",
                expected="routed_experts_dtype and routed_experts_layout absent",
                got=", ".join(given),
                fix="Leave them out, or ask for an array of ids: no codec, and no reference.",
            )


_ASK = 'Send "return_routed_experts": true with it.'


class GenerateRequest(BaseModel):
    """One prompt or several, as text or as token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Prompt | Prompts = Field(description="the prompt: text, or token ids; or a list of prompts")
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters())

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts one by one."""
        return prompts_in(self.inputs)

    @property
    def is_batch(self) -> bool:
        """Whether `inputs` is a list of prompts, and the response a list too."""
        return isinstance(self.inputs, list) and self.inputs != [] and not isinstance(self.inputs[0], int)
