"""The sequences of one generation with their routes, turn by turn.

P tokens of the first prompt, then O tokens that were generated or came from tools. B sequences, S columns of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrace.errors import ReplayError
from moetrace.trace import RoutingTrace


@dataclass(frozen=True)
class Rollout:
    """One sequence as it was generated. It travels in TRL's batch, in the list of its kind.

    Attributes:
        num_prompt_tokens: P.
        trace: its routes, which know its tokens. TRL may have cut the sequence's end since.
        logprobs: float32, of each token after the prompt by the distribution it was drawn from; NaN where that is not
            known, or where the token was not drawn.
        drawn: bool, of each token after the prompt; False for those of tools and environments.
    """

    num_prompt_tokens: int
    trace: RoutingTrace
    logprobs: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of_turn(
        cls,
        prompt: Sequence[int],
        output: Sequence[int],
        trace: RoutingTrace | None,
        logprobs: Sequence[float | None] | None,
        drawn: Sequence[int] | None = None,
    ) -> Rollout:
        """A sequence of one turn. `drawn` is 0 for tokens that came from elsewhere; None: all were drawn.

        Raises:
            ReplayError: it has no routes, or log-probabilities of other tokens.
            TokenMismatchError: its routes are of other tokens.
        """
        if trace is None:
            raise ReplayError(
                "a sequence was generated without routes",
                expected="a RoutingTrace of each sequence",
                fix="Start the engine with --enable-return-routed-experts, and ask for routes.",
            )
        tokens = [*prompt, *output]
        trace.require_tokens(tokens, "the generated sequence")
        if trace.num_tokens != len(tokens) or (logprobs is not None and len(logprobs) != len(output)):
            raise ReplayError(
                "the routes and log-probabilities are not of the generated sequence",
                expected=f"{len(tokens)} tokens, {len(output)} log-probabilities",
                got=f"{trace.num_tokens} and {len(output if logprobs is None else logprobs)}",
            )
        known = [np.nan if value is None else value for value in logprobs or [None] * len(output)]
        drawn_O = np.ones(len(output), bool) if drawn is None else np.array(drawn, bool)
        logprobs_O = np.where(drawn_O, np.array(known, np.float32), np.float32(np.nan))
        return cls(len(prompt), trace.with_tokens(tokens), logprobs_O, drawn_O)

    def then(self, turn: Rollout) -> Rollout:
        """This sequence continued: rows that exist stay, since its tokens were drawn from them; `turn` has the rest."""
        given = turn.num_prompt_tokens - self.trace.num_tokens
        return Rollout(
            self.num_prompt_tokens,
            self.trace.concat(turn.trace.slice(self.trace.stop, turn.trace.stop)),
            np.concatenate([self.logprobs, np.full(given, np.nan, np.float32), turn.logprobs]),
            np.concatenate([self.drawn, np.zeros(given, bool), turn.drawn]),
        )


def response_mask(rollouts: Sequence[Rollout], mask_BS: np.ndarray) -> np.ndarray:
    """`[B, S]` bool: the tokens that were drawn, where attention sees them."""
    response_BS = np.zeros(mask_BS.shape, bool)
    for rollout, mask_S, response_S in zip(rollouts, mask_BS.astype(bool), response_BS, strict=True):
        tokens = np.flatnonzero(mask_S)[rollout.num_prompt_tokens :]
        response_S[tokens] = rollout.drawn[: len(tokens)]
    return response_BS


class Rollouts:
    """The turns of one generation. Which sequence a turn is of is known when all are whole: samples of one prompt may
    be equal for some turns, and TRL then leaves one as it is and goes on with another.
    """

    def __init__(self) -> None:
        self._turns: list[list[Rollout]] = []

    def add(self, turn: Sequence[Rollout]) -> None:
        """The first turn of all sequences, or a later one of some."""
        self._turns.append(list(turn))

    def joined(self, whole: Sequence[Sequence[int]]) -> list[Rollout]:
        """The sequences, in the order of their prompts.

        Args:
            whole: token ids of each, as TRL has them in the end; it may have cut the last turn.

        Raises:
            ReplayError: a later turn continues none of them.
        """
        first, *later = self._turns or [[]]
        sequences = list(first)
        for rollout in (rollout for turn in later for rollout in turn):
            pairs = enumerate(zip(sequences, whole, strict=False))  # the trainer counts them
            index = next((i for i, (earlier, tokens) in pairs if _continues(rollout, earlier, tokens)), None)
            if index is None:
                raise ReplayError(
                    "a later turn continues no sequence of this generation",
                    expected="a prompt that begins with the prompt and completion of an earlier turn",
                    got=f"{rollout.num_prompt_tokens} prompt tokens",
                )
            sequences[index] = sequences[index].then(rollout)
        return sequences


def _continues(later: Rollout, earlier: Rollout, whole: Sequence[int]) -> bool:
    """Whether a turn goes on where a sequence is so far, on the way to what that is in the end."""
    assert later.trace.tokens is not None
    assert earlier.trace.tokens is not None
    so_far, end = earlier.trace.num_tokens, min(later.trace.num_tokens, len(whole))
    return (
        so_far <= later.num_prompt_tokens
        and so_far < len(whole)
        and np.array_equal(later.trace.tokens[:so_far], earlier.trace.tokens)
        and np.array_equal(later.trace.tokens[:end], whole[:end])
    )
