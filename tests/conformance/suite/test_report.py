"""Reports as text, JSON and JUnit, and the command around them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moetrace.cli import main
from moetrace.commands.check import add_command, plan_of
from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.mutants import MUTANTS, trial, trial_form
from moetrace.conformance.suite.report import CheckResult, Report
from moetrace.conformance.suite.run import check_engine, load_forms
from moetrace.conformance.suite.session import Plan
from moetrace.errors import DyeError

FINDING = Finding("second", Bug.ZEROS, rows=3, sequence=4, lengths=(5, 6), position=7, layer=1, expected=[1], got=[0])
REPORT = Report(
    "an engine 1.0",
    "lightllm",
    "a dye",
    7,
    (
        CheckResult("first", "why", "passed", 2, 30, notes=("a note",), seconds=0.5),
        CheckResult("second", "why", "failed", 1, 10, findings=(FINDING,) * 5, seconds=0.25),
        CheckResult("third", "why", "skipped", reason="has no such thing"),
    ),
)


def test_text_has_a_table_findings_in_groups_and_a_verdict() -> None:
    lines = REPORT.text().splitlines()
    assert lines[0] == "an engine 1.0 (lightllm) against a dye, seed 7"
    assert lines[3].split() == ["first", "passed", "2", "30", "a", "note"]
    assert lines[5].split()[:2] == ["third", "skipped"]
    assert lines[5].endswith("has no such thing")
    assert "zeros, in check 'second': 5 findings, 15 rows" in lines
    assert lines.count("  - sequence 4, P 5 + O 6, position 7, layer 1: expected [1], got [0]: looks like zeros") == 3
    assert "  - and 2 more" in lines
    assert lines[-1] == "convicted: 2 checks, 1 skipped, 40 rows; zeros"


def test_exit_codes_are_verdicts() -> None:
    sound = replace(REPORT, checks=REPORT.checks[::2])
    assert (sound.exit_code, REPORT.exit_code, replace(REPORT, untestable="why").exit_code) == (0, 1, 2)
    assert sound.verdict == "sound: 1 checks, 1 skipped, 30 rows, every one right"


def test_json_has_every_finding() -> None:
    facts = json.loads(REPORT.json())
    assert facts["verdict"] == "convicted"
    assert [len(check["findings"]) for check in facts["checks"]] == [0, 5, 0]
    found = facts["checks"][1]["findings"][0]
    assert (found["bug"], found["position"], found["expected"]) == ("zeros", 7, [1])


def test_junit_is_read_by_an_xml_parser_whatever_the_engine_said() -> None:
    odd = replace(REPORT.checks[1], findings=(replace(FINDING, detail="\x00\x1b[1m<&>]]>"),))
    suite = ElementTree.fromstring(replace(REPORT, checks=(odd, *REPORT.checks), untestable="nobody").junit())
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "5",
        "failures": "2",
        "skipped": "1",
        "errors": "1",
    }
    assert [case.get("name") for case in suite] == ["second", "first", "second", "third", "the engine can be tested"]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "zeros"


def test_a_whole_report_of_a_broken_engine_is_written_in_all_forms() -> None:
    report = trial(MUTANTS[0])
    assert json.loads(report.json())["verdict"] == "convicted"
    assert len(ElementTree.fromstring(report.junit())) == len(report.checks)


def test_nobody_at_the_address_is_exit_code_2_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trial_form().save(tmp_path)
    junit = tmp_path / "junit.xml"
    code = main(["check", "http://127.0.0.1:9", "--dye", str(tmp_path), "--junit", str(junit)])
    assert code == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("not tested: nobody answers at http://127.0.0.1:9")
    assert ElementTree.parse(junit).getroot().get("errors") == "1"


def test_a_folder_that_is_no_dye_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "http://127.0.0.1:9", "--dye", str(tmp_path)]) == 2
    assert "does not describe a dye checkpoint" in capsys.readouterr().err


def test_the_plan_follows_flags_and_the_checkpoints_window(tmp_path: Path) -> None:
    def plan(*flags: str) -> Plan:
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers())
        return plan_of(parser.parse_args(["check", "URL", "--dye", str(tmp_path), *flags]))

    assert plan() == Plan()
    assert plan("--quick", "--requests", "9", "--seed", "3") == Plan.quick(requests=9, seed=3)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 700}')
    assert plan().max_tokens == 700
    assert plan("--max-tokens", "600").max_tokens == 600
    for broken in ("{", "[]", '{"max_position_embeddings": "700"}'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(DyeError, match=r"config\.json is not that of a checkpoint"):
            plan()


def test_a_second_checkpoint_must_be_another_version_of_the_first(tmp_path: Path) -> None:
    form = trial_form()
    forms = {
        "first": form,
        "second": replace(form, weight_version=1),
        "other": replace(form, top_k=6, weight_version=1),
    }
    for name, one in forms.items():
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    loaded, newer = load_forms(tmp_path / "first", tmp_path / "second")
    assert newer is not None
    assert (loaded, newer[1]) == (form, forms["second"])
    for name in ("first", "other"):
        with pytest.raises(DyeError, match="not another weight version"):
            load_forms(tmp_path / "first", tmp_path / name)


def test_too_short_a_window_says_so() -> None:
    report = check_engine(
        lambda ask: [], DyeForm("qwen3_moe", (17, 16), 32, 4, (1, 2, 3), 4), plan=Plan(max_tokens=100)
    )
    assert "too short to test" in report.untestable
