"""What cannot be sent is refused here, by name, and not tried again and again."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from asking import Asker
from traces import refused

from moetrace import AsyncClient, Client
from moetrace.errors import RequestError

URL = "http://localhost:9"


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["ключ", "secret\n", "secret ", "a\nb", "a\0b", "\x7f", ""], ids=ascii)
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(kind: Any, key: str) -> None:
    with refused(RequestError, "the header 'Authorization' cannot be sent", fix="newline"):
        kind(URL, api_key=key)
    with pytest.raises(RequestError) as error:
        kind(URL, api_key=f"secret{key}\n")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "headers", [{"X": "é"}, {"X": "a\r\nY: b"}, {"é": "x"}, {"a b": "x"}, {"": "x"}, {"X": 5}], ids=ascii
)
def test_other_headers_that_cannot_be_sent_are_refused(headers: Any) -> None:
    for kind in (Client, AsyncClient):
        with refused(RequestError, f"the header {next(iter(headers))!r} cannot be sent", expected="printable ASCII"):
            kind(URL, headers=headers)


def test_what_a_header_can_have_is_sent_as_it_is() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"aborted": ["é"]})

    headers = {"X-One": "a b\tc~!", "X-Empty": ""}
    with Client(URL, api_key="a b+/=", headers=headers, transport=httpx.MockTransport(answer)) as client:
        assert client.abort("é") == ["é"]
        client.health()
    sent, other = seen
    assert sent.headers["authorization"] == "Bearer a b+/="
    assert {name: sent.headers[name] for name in headers} == headers
    assert (sent.headers["content-type"], sent.content) == ("application/json", '{"request_ids":["é"]}'.encode())
    assert "content-type" not in other.headers


@pytest.mark.parametrize(
    ("call", "argument"),
    [("generate", "half a \ud83d pair"), ("abort", np.float32(0.5)), ("abort", "\udcff"), ("delete", "a\nb")],
)
def test_a_request_that_cannot_be_written_down_is_refused(ask: Asker, call: str, argument: Any) -> None:
    with refused(RequestError, "cannot be sent"):
        ask(URL, call, argument)
