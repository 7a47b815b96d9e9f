"""Between text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moetrace.engines.requests import GenerateResult
from moetrace.errors import RequestError
from moetrace.server.schemas import Prompt


class Tokenizer(Protocol):
    """What the server needs of a transformers tokenizer."""

    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


def prompt_tokens(prompts: Sequence[Prompt], add_special_tokens: bool, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        RequestError: there is text, and it is not valid or there is no tokenizer.
    """
    return [_tokens_of(prompt, add_special_tokens, tokenizer) for prompt in prompts]


def _tokens_of(prompt: Prompt, add_special_tokens: bool, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    if tokenizer is None:
        raise RequestError(
            "this checkpoint has no tokenizer",
            expected="inputs as a list of token ids",
            got="text",
            fix="Send token ids.",
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "inputs is not valid Unicode", expected="text that UTF-8 can hold", got=str(error)
        ) from error
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


class TextStream:
    """The text of a growing sequence of tokens, piece by piece; pieces are never parts of a character.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._shown: list[int] = []  # context of the next piece: some tokenizers join what they decode together
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._held.append(token)
        piece = self._piece()
        return "" if piece.endswith("\ufffd") and len(self._held) < _LONGEST_CHARACTER else self._show(piece)

    def rest(self) -> str:
        """What is still held back."""
        return self._show(self._piece()) if self._held else ""

    def _piece(self) -> str:
        shown = self._decode(self._shown)
        return self._decode(self._shown + self._held)[len(shown) :]

    def _show(self, piece: str) -> str:
        self._shown, self._held = (self._held if piece else self._shown), []  # what shows nothing is no context
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


_LONGEST_CHARACTER = 8
"""Tokens after which what ends in the middle of a character is shown as it is: UTF-8 needs 4 at most."""


class ShownText:
    """The text of a growing sequence as far as it is shown: a stop text, and all after it, is not.

    What may be the beginning of a stop text is held back until it is clear.

    Args:
        tokenizer: decodes.
        skip_special_tokens: leave special tokens out.
        stop: texts that end a sequence.
        fewest: tokens before which they do not.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, stop: Sequence[str], fewest: int = 0) -> None:
        self._stream = TextStream(tokenizer, skip_special_tokens)
        self._stop, self._fewest = stop, fewest
        self._held, self._stopped = "", False
        self.length = 0
        """Characters shown so far."""
        self.offsets: list[int] = []
        """Where the text of each token begins."""

    def add(self, token: int) -> str:
        """The text that this token lets be shown."""
        self.offsets.append(self.length + len(self._held))
        return self._show(self._stream.add(token))

    def rest(self) -> str:
        """What is still held back: no token follows."""
        text = self._show(self._stream.rest())
        held, self._held = self._held, ""
        self.length += len(held)
        return text + held

    def _show(self, piece: str) -> str:
        if self._stopped:
            return ""
        text = self._held + piece
        if len(self.offsets) >= self._fewest:  # what the held text holds as a whole came too early to count
            found = [text.find(stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stop]
            ends = [at for at in found if at >= 0]
            if ends:
                self._stopped, self._held = True, ""
                self.length += min(ends)
                return text[: min(ends)]
        begun = [size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        shown = len(text) - max(begun, default=0)
        self._held = text[shown:]
        self.length += shown
        return text[:shown]


def ended_by(result: GenerateResult, stop: Sequence[str], tokenizer: Tokenizer | None) -> str | int | None:
    """What ended a sequence: one of the texts in `stop`, a token id (its last), or None where neither did."""
    if result.finish_reason != "stop":
        return None
    if stop and tokenizer is not None:
        _, places = _completed(result.output_tokens, stop, tokenizer, True)
        if places:
            return min(places, key=places.__getitem__)
    return result.output_tokens[-1]


def shown_text(
    result: GenerateResult, end: str | int | None, tokenizer: Tokenizer, skip_special_tokens: bool = True
) -> str:
    """The text of a finished sequence without what ended it: what `ShownText` would have shown of it."""
    if isinstance(end, str):
        text, places = _completed(result.output_tokens, [end], tokenizer, skip_special_tokens)
        return text[: places.get(end)]
    tokens = result.output_tokens[:-1] if end is not None else result.output_tokens
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)


def _completed(
    tokens: list[int], stop: Sequence[str], tokenizer: Tokenizer, skip_special_tokens: bool
) -> tuple[str, dict[str, int]]:
    """The text of `tokens`, and where in it those stop texts begin that the last token completes."""
    text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    before = tokenizer.decode(tokens[:-1], skip_special_tokens=skip_special_tokens).rstrip("\ufffd")
    found = {each: text.find(each, max(0, len(before) - len(each) + 1)) for each in stop}
    return text, {each: at for each, at in found.items() if at >= 0}
