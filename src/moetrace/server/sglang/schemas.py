"""What SGLang's clients send. What makes no difference is accepted; what is not supported is refused by name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moetrace.engines.requests import SamplingParams
from moetrace.errors import RequestError
from moetrace.server.parameters import by_temperature, close, require_neutral
from moetrace.server.schemas import Listed, Prompt, TokenIds, prompts_in

_NO_TEMPERATURE = 1e-6
"""Below this SGLang takes the most likely token."""

_SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "custom_params": (None, {}),
    "ebnf": (None,),
    "frequency_penalty": (None, 0),
    "json_schema": (None,),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "regex": (None,),
    "repetition_penalty": (None, 1),
    "stop_regex": (None, [], ""),
    "structural_tag": (None,),
}
_SAMPLING_IGNORED = ("spaces_between_special_tokens",)  # tokenizers of transformers have no say in it

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio_data": (None, []),
    "bootstrap_host": (None,),
    "bootstrap_port": (None,),
    "bootstrap_room": (None,),
    "custom_logit_processor": (None,),
    "image_data": (None, []),
    "input_embeds": (None,),
    "lora_path": (None,),
    "max_thinking_tokens": (None,),
    "mm_hashes": (None,),
    "require_reasoning": (None, False),
    "return_bytes": (None, False),
    "return_entropy": (None, False),
    "return_flat_raw_top_logprobs": (None, False),
    "return_hidden_states": (None, False),
    "return_indexer_topk": (None, False),
    "return_prompt_token_ids": (None, False),
    "return_sampling_mask": (None, False),
    "session_params": (None,),
    "token_ids_logprob": (None, []),
    "top_logprobs_num": (None, 0),
    "video_data": (None, []),
}
_IGNORED = (
    "background",
    "cache_salt",
    "conversation_id",
    "custom_labels",
    "data_parallel_rank",
    "extra_key",
    "log_metrics",
    "modalities",
    "no_logs",
    "priority",
    "routed_dp_rank",
    "routing_key",
    "session_id",
)
"""Who serves a request when, and what is noted of it: there is one engine here, first come first served."""


class SGLangSampling(BaseModel):
    """How to generate. Null is the default, as in SGLang."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra=lambda schema: close(schema, _SAMPLING_NEUTRAL, _SAMPLING_IGNORED),
    )

    max_new_tokens: int | None = Field(
        128, description="most tokens to generate; null: the rest of the window; 0 scores the prompt"
    )
    min_new_tokens: int | None = Field(0, description="fewest tokens to generate")
    temperature: float | None = Field(1.0, description="divides the logits; 0 is greedy")
    top_p: float | None = Field(1.0, description="nucleus, in (0, 1]")
    top_k: int | None = Field(-1, description="most likely tokens to draw from; -1 means all")
    n: int | None = Field(1, description="sequences to generate from each prompt")
    sampling_seed: int | None = Field(None, description="what is drawn; null: by chance")
    stop: str | Listed[str] | None = Field(None, description="texts that end a sequence")
    stop_token_ids: TokenIds | None = Field(None, description="tokens that end a sequence")
    ignore_eos: bool | None = Field(False, description="go on after an end-of-sequence token")
    skip_special_tokens: bool | None = Field(True, description="leave special tokens out of the text")
    no_stop_trim: bool | None = Field(False, description="leave in the text what ended it")
    stream_interval: int | None = Field(1, description="tokens from one event of a stream to the next", ge=1)


class SGLangRequest(BaseModel):
    """One prompt or several, as text or as token ids."""

    model_config = ConfigDict(
        extra="allow", strict=True, json_schema_extra=lambda schema: close(schema, _NEUTRAL, _IGNORED)
    )

    text: str | Listed[str] | None = Field(None, description="the prompt, or a list of prompts")
    input_ids: TokenIds | Listed[TokenIds] | None = Field(None, description="the prompt's token ids, or a list of such")
    sampling_params: SGLangSampling | None = Field(None, description="how to generate")
    return_logprob: bool | None = Field(False, description="return meta_info.output_token_logprobs")
    logprob_start_len: int | None = Field(
        -1, description="position of the first prompt token in meta_info.input_token_logprobs; -1: none"
    )
    return_text_in_logprobs: bool = Field(False, description="with the text of each token")
    stream: bool = Field(False, description="answer with server-sent events")
    rid: str | None = Field(None, description="the request's id, to abort it by; default: its X-Request-Id")
    return_routed_experts: bool = Field(False, description="return meta_info.routed_experts")
    routed_experts_start_len: int = Field(0, description="position of the first row, at most the prompt's length")

    @property
    def sampling_params_given(self) -> SGLangSampling:
        """The sampling part, or its defaults."""
        return self.sampling_params or SGLangSampling.model_construct()

    @property
    def first_logprob(self) -> int | None:
        """Position of the first prompt token whose log-probability is wanted."""
        return None if self.logprob_start_len == -1 or not self.return_logprob else self.logprob_start_len

    @property
    def is_list(self) -> bool:
        """Whether the response is a list."""
        inputs = self.text if self.input_ids is None else self.input_ids
        return self.n > 1 or (isinstance(inputs, list) and any(not isinstance(item, int) for item in inputs))

    @property
    def n(self) -> int:
        """Sequences from each prompt."""
        n = self.sampling_params_given.n
        return 1 if n is None else n

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts one by one."""
        inputs = self.text if self.input_ids is None else self.input_ids
        return prompts_in(inputs)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise `RequestError` for what is unknown, not supported or contradicts itself."""
        require_neutral(self.model_extra or {}, _NEUTRAL, type(self).model_fields, _IGNORED)
        sampling = self.sampling_params_given
        require_neutral(sampling.model_extra or {}, _SAMPLING_NEUTRAL, type(sampling).model_fields, _SAMPLING_IGNORED)
        if (self.text is None) == (self.input_ids is None):
            raise RequestError(
                "it is not clear what the prompt is",
                expected="either text or input_ids",
                got="neither" if self.text is None else "both",
            )
        if self.routed_experts_start_len and not self.return_routed_experts:
            raise RequestError(
                "routed_experts_start_len says how to return routes that were not asked for",
                fix='Send "return_routed_experts": true with it.',
            )

    def sampling(self, room: int) -> SamplingParams:
        """How to generate; `room` is the rest of the window after the longest prompt.

        Raises:
            RequestError: a value is out of range.
        """
        given = self.sampling_params_given
        temperature = 1.0 if given.temperature is None else given.temperature
        return SamplingParams(
            max_new_tokens=max(room, 1) if given.max_new_tokens is None else given.max_new_tokens,
            min_new_tokens=given.min_new_tokens or 0,
            top_p=1.0 if given.top_p is None else given.top_p,
            top_k=-1 if given.top_k is None else given.top_k,
            n=self.n,
            seed=given.sampling_seed,
            stop=(given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ()),
            stop_token_ids=tuple(given.stop_token_ids or ()),
            ignore_eos=bool(given.ignore_eos),
            **by_temperature(0 if 0 <= temperature < _NO_TEMPERATURE else temperature),
        )
