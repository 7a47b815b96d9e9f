"""Stop texts are found where the whole text first holds them, however many tokens a character takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrace.engines.requests import SamplingParams
from moetrace.engines.transformers.stopping import Stops
from moetrace.errors import RequestError


class Bytes:
    """A tokenizer of which each byte of UTF-8 is a token."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


TEXTS = st.text(st.sampled_from("ab \néß回答到此结束\N{PILE OF POO}"), min_size=1, max_size=24)


def stops_of(*texts: str) -> Stops:
    return Stops(Bytes(), SamplingParams(512, stop=texts))


@given(before=TEXTS, stop=st.lists(TEXTS, min_size=1, max_size=3), after=TEXTS)
def test_a_stop_text_is_found_at_the_token_that_completes_it(before: str, stop: list[str], after: str) -> None:
    tokens, stops = list((before + stop[0] + after).encode()), stops_of(*stop)
    decoded = [bytes(tokens[:length]).decode(errors="replace") for length in range(len(tokens) + 1)]
    expected = next(length for length, text in enumerate(decoded) if any(each in text for each in stop))
    found = [stops.found(tokens[:length]) for length in range(1, len(tokens) + 1)]
    assert stops.length == expected
    assert found.index(True) + 1 == expected


def test_a_stop_text_that_utf_8_cannot_hold_stops_nothing() -> None:
    assert not stops_of("\ud800").found(list("回答到此结束".encode()))


def test_a_tokenizer_that_cannot_decode_says_so_in_our_words() -> None:
    with pytest.raises(RequestError, match=r"does not decode.*got ValueError.*stop_token_ids"):
        stops_of("a").found([256])
