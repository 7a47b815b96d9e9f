"""Errors travel between processes as they are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

from moetrace import errors
from moetrace.errors import MoetraceError, OverloadedError, RequestError


def kinds(of: type[MoetraceError] = MoetraceError) -> Iterator[type[MoetraceError]]:
    yield of
    for kind in of.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize("kind", sorted(kinds(), key=str))
def test_an_error_comes_back_from_a_pickle_as_it_was(kind: type[MoetraceError]) -> None:
    assert getattr(errors, kind.__name__, kind) is kind
    error = kind("it is wrong", expected=[1, 2], got={"a": 3}, fix="Do this.")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error) == "it is wrong: expected [1, 2], got {'a': 3}. Do this."
        assert vars(again) == vars(error)


def test_what_a_kind_of_error_has_besides_comes_back_too() -> None:
    error = pickle.loads(pickle.dumps(OverloadedError("too many", got=65, param="n")))
    assert isinstance(error, RequestError)
    assert (error.what, error.got, error.param) == ("too many", 65, "n")
