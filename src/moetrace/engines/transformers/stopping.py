"""Stop texts and stop runs on top of continuous batching, which stops at single tokens only."""

from __future__ import annotations

from typing import Any

from moetrace.engines.requests import SamplingParams
from moetrace.errors import RequestError

_REACH = 8
"""Tokens looked at beyond the longest text's bytes: some decode to nothing."""


class Stops:
    """Where a growing sequence of tokens first completes something that ends it.

    Args:
        tokenizer: decodes; needed for texts only.
        sampling: what to look for, and from which length on.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        self._tokenizer, self._texts, self._fewest = tokenizer, sampling.stop, sampling.min_new_tokens
        self._runs = [list(run) for run in sampling.stop_sequences]
        if self._fewest > 1:  # the engine itself knows no fewest
            self._runs += [[token] for token in sampling.stop_token_ids]
        # a tokenizer of bytes needs a token for each, and JSON can hold text that UTF-8 cannot
        sizes = [len(text.encode("utf-8", "surrogatepass")) for text in self._texts]
        self._reach = max([len(run) for run in self._runs] + [size + _REACH for size in sizes], default=0)
        self._seen = 0
        self.length: int | None = None
        """Tokens up to and with the one that completes something; None until there is one."""

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._texts or self._runs)

    def found(self, tokens: list[int]) -> bool:
        """Look at the tokens that came since the last call; True once something is complete.

        Raises:
            RequestError: the tokenizer cannot decode them.
        """
        if not self:
            return False
        while self.length is None and self._seen < len(tokens):
            self._seen += 1
            recent = tokens[max(0, self._seen - self._reach) : self._seen]
            if self._seen >= self._fewest and self._ends(recent):
                self.length = self._seen
        return self.length is not None

    def _ends(self, recent: list[int]) -> bool:
        if any(recent[-len(run) :] == run for run in self._runs):
            return True
        if not self._texts:
            return False
        decoded, before = self._decode(recent), self._decode(recent[:-1]) if self._fewest > 1 else ""
        return any(decoded.count(text) > before.count(text) for text in self._texts)

    def _decode(self, tokens: list[int]) -> str:
        try:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)
        except BaseException as error:  # tokenizers have no common error: ValueError, TypeError, Rust's panic
            raise RequestError(
                "stop texts cannot be looked for: the tokenizer does not decode what the model generated",
                expected="a tokenizer with a text for each token of the model",
                got=repr(error),
                fix="Pass stop_token_ids.",
            ) from error
