"""A run comes to an end, whatever the plan and the engine, and calls nothing sound that it has not seen."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from moetrace.cli import main
from moetrace.conformance.suite import CASES, Ask, Bug, Plan, check_engine
from moetrace.conformance.suite.adapters import http, opening
from moetrace.conformance.suite.adapters.opening import open_subject
from moetrace.conformance.suite.adapters.process import EngineSubject
from moetrace.conformance.suite.mutants import trial_form
from moetrace.conformance.suite.oracle import Oracle
from moetrace.errors import CheckError

FORM = trial_form()
PLAN = Plan(requests=4, max_tokens=512, flood_tokens=512, pressure=2, pressure_tokens=16)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("requests", -1),
        ("in_flight", 0),
        ("max_tokens", 0),
        ("flood_tokens", -1),
        ("pressure", -1),
        ("pressure_tokens", 0),
        ("timeout", 0.0),
        ("timeout", float("nan")),
    ],
)
def test_a_plan_out_of_range_is_refused(
    knob: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckError, match=f"^{knob} is out of range: expected .*, got {value}"):
        replace(Plan(), **{knob: value})
    FORM.save(tmp_path)
    flag = f"--{knob.replace('_', '-')}={value}"
    assert main(["check", "http://127.0.0.1:9", "--dye", str(tmp_path), flag]) == 2
    assert f"{knob} is out of range" in capsys.readouterr().err


def test_checks_of_which_the_plan_asks_nothing_are_skipped() -> None:
    plan = replace(PLAN, requests=0, pressure=0)
    report = check_engine(Oracle(FORM), FORM, plan=plan)
    skipped = {check.name: check.reason for check in report.checks if check.status == "skipped"}
    assert skipped["concurrency"] == skipped["preemption"] == "the plan asks nothing of it"
    assert all(check.sequences for check in report.checks if check.status == "passed")
    assert report.verdict.startswith("sound: ")


def test_nothing_is_sound_of_which_no_row_was_examined() -> None:
    cases = [case for case in CASES if case.name in ("concurrency", "preemption")]
    for report in (
        check_engine(Oracle(FORM), FORM, plan=replace(PLAN, requests=0, pressure=0), cases=cases),
        check_engine(Oracle(FORM), FORM, plan=PLAN, cases=[case for case in CASES if case.name == "weight update"]),
        check_engine(Oracle(FORM), FORM, plan=PLAN, cases=[]),
    ):
        assert {check.status for check in report.checks} == {"skipped"}
        assert (report.exit_code, json.loads(report.json())["verdict"]) == (2, "not tested")
        assert report.verdict == "not tested: every check was skipped, and no row was examined"


class Updating(Oracle):
    """New weights never come."""

    async def update_weights(self, folder: str, version: str) -> None:
        await asyncio.Event().wait()


def test_an_update_of_weights_that_never_ends_is_a_finding(tmp_path: Path) -> None:
    for version in (0, 1):
        (tmp_path / str(version)).mkdir()
        replace(FORM, weight_version=version).save(tmp_path / str(version))
    cases = [case for case in CASES if case.name == "weight update"]
    plan = replace(PLAN, timeout=0.5)
    report = check_engine(Updating(FORM), tmp_path / "0", plan=plan, update_dye=tmp_path / "1", cases=cases)
    assert [finding.bug for finding in report.findings] == [Bug.ERROR]
    assert "not there in 0.5 seconds" in report.findings[0].detail


def test_what_an_engine_in_this_process_raises_is_not_the_end_of_the_run() -> None:
    class Engine:
        name, max_model_len = "an engine", 512

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

        def update_weights(self, folder: str, version: str) -> None:
            raise ZeroDivisionError

    subject = EngineSubject(Engine())  # type: ignore[arg-type]
    for asking in (subject.ask(Ask((1, 2), 3)), subject.update_weights("folder", "1")):
        with pytest.raises(CheckError, match=r"the engine failed: got ZeroDivisionError"):
            asyncio.run(asking)


@pytest.mark.parametrize("dialect", ["auto", "vllm"])
def test_a_server_that_takes_connections_and_says_nothing_is_not_waited_for(
    dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (http, opening):
        monkeypatch.setattr(module, "SECONDS_TO_TELL", 0.1)

    async def run(url: str) -> Any:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            return await asyncio.wait_for(open_subject(url, FORM, dialect, client=client), 30)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if dialect == "auto":
            with pytest.raises(CheckError, match="nobody answers"):
                asyncio.run(run(url))
        else:
            assert "unknown version" in asyncio.run(run(url)).name
