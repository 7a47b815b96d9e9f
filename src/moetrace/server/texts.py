"""Between text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
        self._shown, self._held = self._held, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


_LONGEST_CHARACTER = 8
"""Tokens after which what ends in the middle of a character is shown as it is: UTF-8 needs 4 at most."""
