"""Whatever breaks between client and server, a request is delivered once, and none runs twice at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from asking import Asker
from faulty import Faulty, failing
from traces import make_trace, refused

from moetrace.client import TraceReference, steps
from moetrace.container import BytesSource, Container
from moetrace.dialects import to_lightllm
from moetrace.errors import EngineError, FormatError, StoreError, TokenMismatchError, UnreachableError
from moetrace.format import save


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.Patience, "wait", lambda self, times: 0.001 * times)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["inputs"]
    return {
        "generated_text": ["x"],
        "finish_reason": "length",
        "prompt_token_ids": prompt,
        "output_token_ids": [prompt[-1] + 1],
        "routed_experts": to_lightllm(make_trace([*prompt, prompt[-1] + 1])),
    }


@pytest.mark.parametrize(
    ("plan", "generated"),
    [
        ([], 1),
        (["unread"], 1),
        (["unread", "unread", "unread"], 1),
        ([429, 429, 429], 1),
        (["unread", 429, "unread"], 1),
        # What was generated here was for nobody: its client had gone.
        (["unanswered"], 2),
        (["halfway"], 2),
        (["halfway", 429, "unanswered", "unread"], 3),
        (["lingering"], 2),
    ],
)
def test_a_request_is_delivered_once(ask: Asker, plan: list[Any], generated: int) -> None:
    with failing(answer, plan) as (url, faulty):
        (completion,) = ask(url, "generate", [1, 2], request_id="me")
        assert completion.trace == make_trace([1, 2, 3])
        assert faulty.plan == []
        assert faulty.delivered == ["me"]
        assert faulty.generated == ["me"] * generated
        assert set(faulty.asked) == {"me"}


def test_an_id_that_is_taken_still_is_waited_for(ask: Asker) -> None:
    with failing(answer, ["lingering"]) as (url, faulty):
        ask(url, "generate", [1, 2], request_id="me")
        assert len(faulty.asked) == 4  # lost, refused twice, served


def test_every_call_has_an_id_of_its_own(ask: Asker) -> None:
    with failing(answer, ["unanswered", "ok", "ok"]) as (url, faulty):
        first, second = (ask(url, "generate", [1, 2])[0].request_id for _ in range(2))
        assert faulty.asked == [first, first, second]
        assert first != second


def test_a_stream_that_has_begun_is_not_begun_again(ask: Asker) -> None:
    with failing(answer, ["unanswered", "halfway"]) as (url, faulty):
        with refused(UnreachableError, "gave no whole answer at POST /generate_stream"):
            ask(url, "stream", [1, 2], request_id="me")
        assert faulty.generated == ["me", "me"]  # the first time nothing of it had come


@pytest.mark.parametrize("fate", ["unanswered", "halfway", "unread"])
def test_a_lost_request_is_not_repeated_where_ids_mean_nothing(ask: Asker, fate: str) -> None:
    with failing(answer, [fate], knows_ids=False) as (url, faulty):
        with refused(UnreachableError, "may be generating still"):
            ask(url, "generate", [1, 2])
        assert faulty.generated == faulty.asked
        assert len(faulty.asked) == (fate != "unread")


@pytest.mark.parametrize("method", ["pause", "resume", "start_routing", "stop_routing"])
def test_a_lost_command_is_not_repeated(ask: Asker, method: str) -> None:
    with failing(answer, ["unread"]) as (url, faulty):
        with refused(UnreachableError, "gave no whole answer"):
            ask(url, method)
        assert faulty.plan == []
        assert faulty.asked == []


def test_retries_end(ask: Asker) -> None:
    with failing(answer, ["unanswered"] * 9) as (url, faulty):
        with refused(UnreachableError, "gave no whole answer at POST /generate"):
            ask(url, "generate", [1, 2], client={"retries": 3})
        assert len(faulty.generated) == 4
    with failing(answer, [503]) as (url, faulty):
        with refused(EngineError, "no"):
            ask(url, "generate", [1, 2])
        assert len(faulty.asked) == 1


# --- routes by reference ---


TRACE = make_trace(range(3000))
DATA = save(TRACE, codec="bits")
DIGEST = Container(BytesSource(DATA)).digest
PATH = f"/routing/traces/{DIGEST}"
REFERENCE = TraceReference(DIGEST, PATH, len(DATA), "bits", TRACE.token_sha256)


def keeping(faulty: Faulty, data: bytes = DATA, cuts: Sequence[int] = ()) -> None:
    faulty.blobs[PATH], faulty.tags[PATH], faulty.cuts = data, DIGEST, list(cuts)


def test_a_download_that_breaks_off_goes_on_where_it_was(ask: Asker) -> None:
    with failing(answer, []) as (url, faulty):
        keeping(faulty)
        assert ask(url, "fetch", REFERENCE) == ask(url, "fetch", DIGEST) == TRACE
        assert faulty.ranges == [None, None]
        keeping(faulty, cuts=[100, 1, 0, 0, 5000])
        faulty.ranges.clear()
        assert ask(url, "fetch", REFERENCE) == TRACE
        assert faulty.ranges == [None, "bytes=100-", "bytes=101-", "bytes=101-", "bytes=101-", "bytes=5101-"]


def test_pieces_that_bring_something_are_no_failures_and_others_are_bounded(ask: Asker) -> None:
    with failing(answer, []) as (url, faulty):
        keeping(faulty, cuts=[100] * 20)
        assert ask(url, "fetch", REFERENCE, client={"retries": 1}) == TRACE
        keeping(faulty, cuts=[100, 0, 0, 0, 0])
        with refused(UnreachableError, "gave no whole answer"):
            ask(url, "fetch", REFERENCE, client={"retries": 2})
        assert faulty.cuts == [0]


def test_a_server_that_has_something_else_by_now_is_read_from_the_beginning(ask: Asker) -> None:
    with failing(answer, []) as (url, faulty):
        keeping(faulty, cuts=[100])
        faulty.tags[PATH] = "another"
        assert ask(url, "fetch", REFERENCE) == TRACE


@pytest.mark.parametrize(
    ("data", "kind", "what"),
    [
        (save(make_trace(range(2999)), codec="bits"), FormatError, "another trace than was asked for"),
        (save([TRACE, TRACE], codec="bits"), FormatError, "larger than its reference says"),
        (DATA[:-1], FormatError, ""),
        (DATA[:-1] + bytes([DATA[-1] ^ 1]), FormatError, ""),
        (b"", FormatError, ""),
    ],
)
def test_what_is_not_what_was_referred_to_is_refused(ask: Asker, data: bytes, kind: Any, what: str) -> None:
    with failing(answer, []) as (url, faulty):
        keeping(faulty, data)
        with refused(kind, what):
            ask(url, "fetch", REFERENCE)


def test_a_trace_of_other_tokens_and_a_trace_that_is_gone(ask: Asker) -> None:
    with failing(answer, []) as (url, faulty):
        keeping(faulty)
        with refused(TokenMismatchError, "other tokens", expected="0" * 64):
            ask(url, "fetch", replace(REFERENCE, token_sha256="0" * 64))
        faulty.blobs.clear()
        with refused(StoreError, "no"):
            ask(url, "fetch", REFERENCE)
