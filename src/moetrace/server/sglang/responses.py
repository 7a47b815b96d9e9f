"""What `/sglang/generate` answers, whole or so far, with SGLang's names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrace.dialects import sglang_ids
from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.errors import MissingRowError
from moetrace.server.bodies import Base64
from moetrace.server.sglang.schemas import SGLangRequest
from moetrace.server.texts import ShownText, Tokenizer, ended_by, shown_text
from moetrace.trace import RoutingTrace


@dataclass(frozen=True)
class Writer:
    """Writes the sequences of one request.

    Attributes:
        request, sampling: what was asked for.
        request_id: its id; the prompts of a list have `ID_0`, `ID_1`, ...
        tokenizer: the checkpoint's; without one there is no `text`.
        num_layers: decoder layers of the model.
        began: seconds of the performance counter.
    """

    request: SGLangRequest
    sampling: SamplingParams
    request_id: str
    tokenizer: Tokenizer | None
    num_layers: int
    began: float = field(default_factory=time.perf_counter)

    @property
    def skips_special(self) -> bool:
        """Whether special tokens are left out of the text."""
        return self.request.sampling_params_given.skip_special_tokens is not False

    def whole(self, number: int, result: GenerateResult) -> dict[str, Any]:
        """A finished sequence: `number` is that of its prompt.

        Raises:
            MissingRowError: routes were asked for, and a sequence that was not aborted has not got all.
        """
        end = ended_by(result, self.sampling.stop, self.tokenizer)
        facts: dict[str, Any] = {"output_ids": result.output_tokens}
        if self.tokenizer is not None:
            shown = None if self.request.sampling_params_given.no_stop_trim else end
            facts = {"text": shown_text(result, shown, self.tokenizer, self.skips_special), **facts}
        facts["meta_info"] = {
            **self._meta(number, len(result.prompt_tokens), result.output_tokens, result.logprobs),
            "finish_reason": _reason(result, end),
            "weight_version": result.weight_version,
            "e2e_latency": time.perf_counter() - self.began,
            **(self._routes(result) if self.request.return_routed_experts else {}),
            **({"input_token_logprobs": self._of_prompt(result)} if self.request.return_logprob else {}),
        }
        return facts

    def part(
        self, number: int, prompt_length: int, text: str, tokens: list[int], logprobs: list[float], version: str
    ) -> dict[str, Any]:
        """A sequence so far. As in SGLang, all of it each time."""
        facts: dict[str, Any] = {"output_ids": tokens}
        if self.tokenizer is not None:
            facts = {"text": text, **facts}
        meta = self._meta(number, prompt_length, tokens, logprobs)
        return {**facts, "meta_info": {**meta, "finish_reason": None, "weight_version": version}}

    def text(self) -> ShownText | None:
        """The text of a growing sequence."""
        if self.tokenizer is None:
            return None
        stop = () if self.request.sampling_params_given.no_stop_trim else self.sampling.stop
        return ShownText(self.tokenizer, self.skips_special, stop, self.sampling.min_new_tokens)

    def _meta(self, number: int, prompt_length: int, tokens: list[int], logprobs: Sequence[float]) -> dict[str, Any]:
        many = len(self.request.prompts) > 1
        meta: dict[str, Any] = {
            "id": f"{self.request_id}_{number}" if many else self.request_id,
            "prompt_tokens": prompt_length,
            "completion_tokens": len(tokens),
        }
        if self.request.return_logprob:
            pairs = zip(tokens, logprobs, strict=True)
            meta["output_token_logprobs"] = [[logprob, token, self._text_of(token)] for token, logprob in pairs]
        return meta

    def _of_prompt(self, result: GenerateResult) -> list[list[Any]]:
        """Log-probability, id and text of the prompt's tokens from `logprob_start_len` on; the first has null."""
        first = self.request.first_logprob
        if first is None or result.prompt_logprobs is None:
            return []
        pairs = list(zip(result.prompt_logprobs, result.prompt_tokens, strict=True))[first:]
        return [[logprob, token, self._text_of(token)] for logprob, token in pairs]

    def _text_of(self, token: int) -> str | None:
        if self.tokenizer is None or not self.request.return_text_in_logprobs:
            return None
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _routes(self, result: GenerateResult) -> dict[str, Any]:
        """The rows asked for; null for an aborted sequence that was ended before all were computed."""
        trace, start = result.trace, self.request.routed_experts_start_len
        assert trace is not None
        stop = min(trace.stop, trace.num_tokens - 1)  # SGLang has no row of the last token, of a scored prompt neither
        rows = trace.slice(min(start, stop), stop)
        return {"routed_experts": self._payload(rows, result), "routed_experts_start_len": start}

    def _payload(self, rows: RoutingTrace, result: GenerateResult) -> Base64 | None:
        try:
            return Base64(sglang_ids(rows, self.num_layers))
        except MissingRowError:
            if result.finish_reason != "abort":
                raise
            return None


def _reason(result: GenerateResult, end: str | int | None) -> dict[str, Any]:
    if result.finish_reason == "abort":
        return {"type": "abort", "message": "The request was aborted."}
    if result.finish_reason == "length":
        return {"type": "length", "length": len(result.output_tokens)}
    return {"type": "stop", "matched": end}
