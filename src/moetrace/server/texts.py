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
