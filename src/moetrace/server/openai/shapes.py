"""OpenAI's responses and chunks. What a sequence's client sees of it: text without what ended it, and its tokens."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moetrace.engines.requests import FinishReason, GenerateResult
from moetrace.server.texts import ShownText, Tokenizer, ended_by, shown_text

_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "abort": "length"}
"""OpenAI has no word for an aborted sequence; "length" is what it says of a text that was cut."""


@dataclass(frozen=True)
class Token:
    """An output token: its text by itself, its log-probability, and where it begins in the sequence's text."""

    text: str
    logprob: float
    offset: int


class Choice:
    """A sequence, token by token.

    Args:
        tokenizer: decodes.
        stop: texts that end a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._shown = ShownText(tokenizer, True, stop)
        self.seen = 0
        """Tokens that were taken."""
        self._waiting: list[Token] = []

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[str, list[Token]]:
        """The sequence has these tokens now: the text that is new, and the tokens it shows."""
        text = self._take(tokens, logprobs)
        return text, self._tokens()

    def end(self, result: GenerateResult) -> tuple[str, list[Token]]:
        """The sequence is over: the rest. The token or text that ended it is not shown."""
        shown = len(result.output_tokens) - isinstance(ended_by(result, self._stop, self._tokenizer), int)
        text = self._take(result.output_tokens[:shown], result.logprobs[:shown]) + self._shown.rest()
        return text, self._tokens()

    def _take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        text = ""
        for token, logprob in zip(tokens[self.seen :], logprobs[self.seen :], strict=True):
            text += self._shown.add(token)
            alone = self._tokenizer.decode([token], skip_special_tokens=False)
            self._waiting.append(Token(alone, logprob, self._shown.offsets[-1]))
        self.seen = max(self.seen, len(tokens))
        return text

    def _tokens(self) -> list[Token]:
        """Tokens whose text has begun to show: those of a stop text never do."""
        count = sum(token.offset < self._shown.length for token in self._waiting)
        tokens, self._waiting = self._waiting[:count], self._waiting[count:]
        return tokens


class Shape(Protocol):
    """What the two endpoints' responses differ in."""

    prefix: str
    whole: str
    part: str

    def choice(self, index: int, text: str, tokens: list[Token] | None, reason: str) -> dict[str, Any]:
        """A whole choice."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a chunk says of a choice before its text."""
        ...

    def delta(self, index: int, text: str, tokens: list[Token] | None, reason: str | None) -> dict[str, Any]:
        """What a chunk says of a choice."""
        ...


class CompletionShape:
    """`/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, tokens: list[Token] | None, reason: str | None) -> dict[str, Any]:
        """See `Shape`."""
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    delta = choice

    def opening(self, index: int) -> None:
        """See `Shape`."""

    def _logprobs(self, tokens: list[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "text_offset": [token.offset for token in tokens],
            "top_logprobs": None,
        }


class ChatShape:
    """`/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, tokens: list[Token] | None, reason: str) -> dict[str, Any]:
        """See `Shape`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any]:
        """See `Shape`."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, tokens: list[Token] | None, reason: str | None) -> dict[str, Any]:
        """See `Shape`."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: list[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {"content": [self._logprob(token) for token in tokens], "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        whole = "\ufffd" not in token.text  # else a part of a character: the tokenizer does not tell which bytes
        facts = {"token": token.text, "bytes": list(token.text.encode()) if whole else None}
        return facts | {"logprob": token.logprob, "top_logprobs": []}


@dataclass(frozen=True)
class Response:
    """What all chunks of a response have in common."""

    shape: Shape
    model: str
    tokenizer: Tokenizer
    stop: tuple[str, ...]
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, results: Sequence[Sequence[GenerateResult]]) -> dict[str, Any]:
        """The response to a request that does not stream."""
        sequences = [sequence for of_prompt in results for sequence in of_prompt]
        choices = [self._choice(index, sequence) for index, sequence in enumerate(sequences)]
        return self._facts(self.shape.whole, choices) | {"usage": usage_of(results)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        return self._facts(self.shape.part, choices)

    def _facts(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        facts = {"id": f"{self.shape.prefix}-{self.key}", "object": kind, "created": self.created, "model": self.model}
        return {**facts, "choices": choices, "system_fingerprint": None}

    def _choice(self, index: int, result: GenerateResult) -> dict[str, Any]:
        reason = reason_of(result)
        if self.logprobs:
            return self.shape.choice(index, *Choice(self.tokenizer, self.stop).end(result), reason)
        text = shown_text(result, ended_by(result, self.stop, self.tokenizer), self.tokenizer)
        return self.shape.choice(index, text, None, reason)


def reason_of(result: GenerateResult) -> str:
    """OpenAI's word for how a sequence ended."""
    return _REASONS[result.finish_reason]


def usage_of(results: Sequence[Sequence[GenerateResult]]) -> dict[str, int]:
    """Tokens of a request: those of each prompt once, and those of all sequences."""
    prompts = sum(len(of_prompt[0].prompt_tokens) for of_prompt in results)
    outputs = sum(len(sequence.output_tokens) for of_prompt in results for sequence in of_prompt)
    return {"prompt_tokens": prompts, "completion_tokens": outputs, "total_tokens": prompts + outputs}
