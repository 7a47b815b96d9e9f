"""Stop texts on top of continuous batching, which stops at tokens only."""

from __future__ import annotations

from typing import Any

_REACH = 8
"""Tokens looked at beyond the longest text's characters: some decode to nothing, some to part of a character."""


class StopTexts:
    """Where the first of some texts is completed in a growing sequence of tokens.

    Args:
        tokenizer: decodes.
        texts: what to look for; none of them empty.
    """

    def __init__(self, tokenizer: Any, texts: tuple[str, ...]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._reach = max(len(text) for text in texts) + _REACH
        self._seen = 0
        self.length: int | None = None
        """Tokens up to and with the one that completes a text; None until there is one."""

    def found(self, tokens: list[int]) -> bool:
        """Look at the tokens that came since the last call; True once a text is complete."""
        while self.length is None and self._seen < len(tokens):
            self._seen += 1
            recent = tokens[max(0, self._seen - self._reach) : self._seen]
            decoded = self._tokenizer.decode(recent, skip_special_tokens=True)
            if any(text in decoded for text in self._texts):
                self.length = self._seen
        return self.length is not None
