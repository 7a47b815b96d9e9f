"""Stop texts that are not shown: the same text whole and piece by piece, and as an obvious twin says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.engines.requests import FinishReason, GenerateResult
from moetrace.server.texts import ShownText, TextStream, ended_by, shown_text

PIECES = ["a", "b", "ab", "aba", "bb", "", "c"]


class Words:
    """A tokenizer whose tokens are pieces of text; token 6 is special."""

    def __init__(self) -> None:
        self.all_special_ids = [6]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(PIECES[token] for token in token_ids if not (skip_special_tokens and token == 6))


def result_of(tokens: list[int], reason: FinishReason) -> GenerateResult:
    return GenerateResult([0], tokens, [0.0] * len(tokens), reason, "0")


def twin(tokens: list[int], stop: list[str], fewest: int) -> tuple[int, str, str | None]:
    """How many tokens come before the sequence ends, what is shown of them, and the text that ended it."""
    for count in range(1, len(tokens) + 1):
        before, text = ("".join(PIECES[token] for token in tokens[:end]) for end in (count - 1, count))
        new = [
            (at, number)
            for number, each in enumerate(stop)
            for at in range(len(text))
            if text.startswith(each, at) and at + len(each) > len(before)
        ]
        if new and count >= fewest:
            return count, text[: min(new)[0]], stop[min(new)[1]]
    return len(tokens), text if tokens else "", None


@given(
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
    st.integers(0, 6),
)
@settings(max_examples=400, deadline=None)
def test_what_is_shown_ends_where_the_first_stop_text_begins(tokens: list[int], stop: list[str], fewest: int) -> None:
    count, text, matched = twin(tokens, stop, fewest)
    result = result_of(tokens[:count], "length" if matched is None else "stop")
    assert ended_by(result, stop, Words()) == matched
    assert shown_text(result, matched, Words()) == text
    shown = ShownText(Words(), True, stop, fewest)
    pieces = [shown.add(token) for token in result.output_tokens]
    assert "".join(pieces) + shown.rest() == text
    assert shown.length == len(text)
    starts = ["".join(PIECES[token] for token in tokens[:number]) for number in range(count)]
    assert shown.offsets == [len(start) for start in starts]


class Sentences(Words):
    """As Llama's: a word begins with its space, which the first word of a text loses."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        words = "".join(
            " the cat"[4 * (token % 2) :][:4] for token in token_ids if not (skip_special_tokens and token == 6)
        )
        return words.removeprefix(" ")


@pytest.mark.parametrize("tokens", [[0, 6, 1], [6, 0, 1], [0, 6, 6, 6, 1, 0], [6], [0, 1]])
def test_a_special_token_takes_no_space_with_it(tokens: list[int]) -> None:
    stream = TextStream(Sentences(), True)
    assert "".join(map(stream.add, tokens)) + stream.rest() == Sentences().decode(tokens, skip_special_tokens=True)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    shown = ShownText(Words(), True, ["abc", "bb"])
    assert [shown.add(token) for token in [0, 0, 1, 0, 6, 1]] == ["", "a", "", "ab", "", ""]  # a a b a (special) b
    assert shown.rest() == "ab"


@pytest.mark.parametrize(
    ("tokens", "reason", "end", "text"),
    [
        ([0, 1, 6], "stop", 6, "ab"),
        ([0, 1, 1], "stop", 1, "ab"),  # a stop token, not a text
        ([6], "stop", 6, ""),
        ([0, 1], "length", None, "ab"),
        ([], "abort", None, ""),
    ],
)
def test_a_token_that_ended_a_sequence_is_not_shown(tokens, reason, end, text) -> None:
    result = result_of(tokens, reason)
    assert ended_by(result, ["zz"], Words()) == end
    assert shown_text(result, end, Words()) == text
