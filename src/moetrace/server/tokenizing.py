"""Where tokenizers work: on few threads, since each thread that ever tokenised keeps words for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from moetrace.server.schemas import Prompt
from moetrace.server.texts import Tokenizer, prompt_tokens

Result = TypeVar("Result")

THREADS = 2
"""With more than one, a long text does not hold up all others."""


class TokenizerThreads:
    """Threads of one application that do nothing else.

    tokenizers (0.23) remembers the tokens of 10,000 words of at most 256 bytes (BPE), forgets none of them, and does so
    for each thread by itself until that thread ends: 4 MB a thread for words of 10 bytes, and up to 80 where a whole
    text is one word. asyncio's own workers are up to 32, and what they remember would look like a leak for days.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "moetrace-tokenize")

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which asks a tokenizer for the tokens of a text."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def prompt_tokens(
        self, prompts: Sequence[Prompt], add_special_tokens: bool, tokenizer: Tokenizer | None
    ) -> list[list[int]]:
        """Token ids of each prompt; prompts of ids do not wait for anybody's text. See `texts.prompt_tokens`."""
        work = partial(prompt_tokens, prompts, add_special_tokens, tokenizer)
        return await self.run(work) if any(isinstance(prompt, str) for prompt in prompts) else work()
