"""Each dialect asks and reads rightly: against fake servers with encoders of their own, found by `auto`."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_engines import FakeEngine, FakeLightLLM, FakeSGLang, FakeVLLM

from moetrace.conformance.dye.form import DyeForm, digits_for
from moetrace.conformance.suite import Answer, Ask, Plan, Report, Rows, check_engine, run_suite
from moetrace.conformance.suite.adapters.http import HttpSubject
from moetrace.conformance.suite.adapters.opening import open_subject
from moetrace.conformance.suite.adapters.vllm import sampling_of
from moetrace.errors import CheckError, LackingError, RequestError

DIGITS = digits_for(1024, two=True)
FORM = DyeForm("qwen3_moe", DIGITS, 64, 4, (1, 2), 3, eos_token_id=math.prod(DIGITS) - 1)
PLAN = Plan(requests=12, max_tokens=520, flood_tokens=600, pressure=3, pressure_tokens=24)
ENGINES: dict[str, Callable[[DyeForm], FakeEngine]] = {
    "sglang": FakeSGLang,
    "vllm": lambda form: FakeVLLM(form, tokens_endpoint=True),
    "vllm completions": lambda form: FakeVLLM(form, tokens_endpoint=False),
    "lightllm": FakeLightLLM,
}
AT_END = "start at the prompt's end"
LACKS = {
    "sglang": {"scoring", "abort"},
    "vllm": {"scoring", AT_END},
    "vllm completions": {"scoring", "streamed", "start offset", AT_END, "abort"},
    "lightllm": {"scoring", "streamed", "start offset", AT_END, "abort"},
}


def checked(client: httpx.AsyncClient, dialect: str = "auto", **newer: tuple[str, DyeForm, str]) -> Report:
    async def run() -> Report:
        subject = await open_subject("http://engine", FORM, dialect, client=client)
        try:
            return await run_suite(subject, FORM, PLAN, newer=newer.get("newer"))
        finally:
            await subject.close()

    return asyncio.run(run())


@pytest.mark.parametrize("name", ENGINES)
def test_a_sound_engine_of_every_dialect_passes(name: str, tmp_path: Path) -> None:
    folders = []
    for version in (0, 1):
        (tmp_path / str(version)).mkdir()
        replace(FORM, weight_version=version).save(tmp_path / str(version))
        folders.append(str(tmp_path / str(version)))
    newer = (folders[1], DyeForm.load(folders[1]), folders[0])
    report = checked(ENGINES[name](FORM).client(), newer=newer)
    assert report.findings == [], report.text()
    assert report.dialect == name.split()[0]
    skipped = {check.name: check.reason for check in report.checks if check.status == "skipped"}
    lacks = {*LACKS[name], "dtype edges"} - {"abort"} | ({"weight update"} if name != "sglang" else set())
    assert set(skipped) - {"abort"} == lacks
    assert all(skipped.values())
    assert report.rows > 5000
    assert ("must be below P" in skipped.get(AT_END, "")) == (name == "vllm")


def test_vllm_aborts_by_the_name_that_its_server_gives_a_request() -> None:
    engine = FakeVLLM(FORM, tokens_endpoint=True)

    async def run() -> list[Answer]:
        subject = await open_subject("http://engine", FORM, client=engine.client())
        return list(await subject.ask(Ask((1, 2, 3), 6, abort_after=2)))

    [answer] = asyncio.run(run())
    assert answer.rows is not None
    assert len(answer.rows.ids_TLK) == 8
    [name] = engine.aborted
    assert name.startswith("generate-tokens-")
    assert name.removeprefix("generate-tokens-") in engine.names


def test_vllm_samples_part_though_it_takes_no_temperature_above_2() -> None:
    warm, hot = (sampling_of(Ask((1,), 4, n=2, temperature=degrees), FORM) for degrees in (1.5, 100.0))
    assert "allowed_token_ids" not in warm
    assert hot["temperature"] == 2
    assert 8 < len(hot["allowed_token_ids"]) < FORM.vocab_size / 8


def bent(engine: FakeEngine, bend: Callable[[dict], object]) -> httpx.AsyncClient:
    """A client that sees the engine's answers to /generate otherwise than they are."""

    def reply(request: httpx.Request) -> httpx.Response:
        response = engine.reply(request)
        if request.url.path == "/generate" and response.is_success:
            return httpx.Response(200, json=bend(response.json()))
        return response

    return httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(reply))


@pytest.mark.parametrize(
    ("bend", "what"),
    [
        (lambda answer: answer | {"routed_experts": None}, "returns no routes"),
        (lambda answer: answer | {"tokens": [{"id": 0}] * 8}, "tokens are not those of this checkpoint"),
        (lambda answer: {}, "has no finish_reason"),
        (lambda answer: answer | {"routed_experts": {"shape": [1]}}, "cannot be read"),
        (lambda answer: answer | {"routed_experts": "text"}, "cannot be read"),
    ],
)
def test_an_engine_that_cannot_be_tested(bend: Callable[[dict], object], what: str) -> None:
    report = checked(bent(FakeLightLLM(FORM), bend))
    assert report.exit_code == 2
    assert what in report.untestable
    assert report.checks == ()


def test_a_payload_that_says_wrong_things_of_right_ids_is_refused() -> None:
    report = checked(
        bent(FakeLightLLM(FORM), lambda answer: answer | {"routed_experts": _hashed(answer["routed_experts"])})
    )
    [failed] = [check for check in report.checks if check.status == "failed"]
    assert failed.name == "payloads"
    assert "recorded on other tokens" in failed.findings[0].detail


def _hashed(payload: object) -> object:
    if isinstance(payload, list):
        return [_hashed(one) for one in payload]
    assert isinstance(payload, dict)
    return payload | {"token_sha256": "0" * 64}


def test_nobody_at_home_and_strangers() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for transport, what in (
        (httpx.MockTransport(refuse), "nobody answers"),
        (httpx.MockTransport(lambda request: httpx.Response(404)), "does not say what it is"),
    ):
        client = httpx.AsyncClient(base_url="http://engine", transport=transport)
        with pytest.raises(CheckError, match=what):
            asyncio.run(open_subject("http://engine", FORM, client=client))


def test_what_is_no_url_is_refused_as_by_the_client() -> None:
    with pytest.raises(RequestError, match="expected http://HOST:PORT or https://HOST, got 'localhost:8000'"):
        asyncio.run(open_subject("localhost:8000", FORM))


@pytest.mark.parametrize("dialect", ["auto", "moetrace"])
def test_a_server_that_wants_a_key_says_so(dialect: str) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 401, json={"error": {"message": "who?"}})

    async def run() -> None:
        client = httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(reply))
        report = await run_suite(await open_subject("http://engine", FORM, dialect, client=client), FORM, PLAN)
        raise CheckError(report.untestable)

    with pytest.raises(CheckError, match=r"answers 401: who\?.* Pass the server's key as --api-key"):
        asyncio.run(run())


def test_a_checkpoint_that_does_not_know_the_tokens_is_another_one() -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/generate":
            return httpx.Response(400, json={"error": "token id 1000 is out of range"})
        return FakeLightLLM(FORM).reply(request)

    report = checked(httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(reply)))
    assert "a plain request is refused (/generate answers 400: token id" in report.untestable
    assert report.untestable.endswith("Serve the folder that --dye names.")


def test_a_key_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(CheckError, match="the API key cannot be sent"):
        asyncio.run(open_subject("http://engine", FORM, api_key="schlüssel"))


def test_whose_fault_an_error_is() -> None:
    states = iter([429, 429, 200, 400, 500])

    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(next(states), json={"error": {"message": "told"}})

    async def run() -> None:
        async with httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(reply)) as client:
            subject = HttpSubject(client, FORM)
            assert await subject.post("/path", {}) == {"error": {"message": "told"}}  # after two that were too early
            with pytest.raises(LackingError, match="/path answers 400: told"):
                await subject.post("/path", {})
            with pytest.raises(CheckError, match="/path answers 500: told") as caught:
                await subject.post("/path", {})
            assert not isinstance(caught.value, LackingError)

    asyncio.run(run())


def test_a_refusal_of_what_every_engine_must_do_is_a_finding() -> None:
    engine = FakeLightLLM(FORM)

    def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        if len(body.get("inputs", [])) == 1:
            return httpx.Response(400, json={"error": "one token is too few"})
        return engine.reply(request)

    report = checked(httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(reply)))
    [check] = [check for check in report.checks if check.name == "one-token prompt"]
    assert check.status == "failed"
    assert "one token is too few" in check.findings[0].line()


def test_functions_are_engines() -> None:
    def function(ask: Ask) -> list[Answer]:
        if ask.n > 1 or ask.stream or ask.abort_after is not None or ask.start or not ask.max_new_tokens:
            raise LackingError("not here")
        output = FORM.continuation(ask.prompt[-1], ask.max_new_tokens)
        if not ask.ignore_eos and FORM.eos_token_id in output:
            output = output[: output.index(FORM.eos_token_id) + 1]
        reason = "length" if len(output) == ask.max_new_tokens and output[-1] != FORM.eos_token_id else "stop"
        ids_TLK = FORM.routes([*ask.prompt, *output][:-1]).astype(np.int64)
        return [
            Answer(
                tuple(output), reason if not ask.ignore_eos else "length", Rows(ids_TLK, np.ones(len(ids_TLK), bool))
            )
        ]

    async def also(ask: Ask) -> list[Answer]:
        return function(ask)

    def failing(ask: Ask) -> list[Answer]:
        raise ZeroDivisionError

    for engine in (function, also):
        report = check_engine(engine, FORM, plan=PLAN)
        assert report.exit_code == 0, report.text()
        assert report.engine == engine.__name__
    assert "ZeroDivisionError" in check_engine(failing, FORM, plan=PLAN).untestable
    with pytest.raises(CheckError, match="cannot be asked"):
        check_engine(3, FORM)
