"""The suite convicts engines that are broken in a known way and calls each by its name; a sound one passes, always."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moetrace.conformance.suite.broken import Mutant
from moetrace.conformance.suite.mutants import MUTANTS, trial
from moetrace.conformance.suite.report import Report

ROOT = Path(__file__).resolve().parents[3]


@functools.cache
def tried(number: int) -> Report:
    return trial(MUTANTS[number])


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_is_caught_and_named(number: int) -> None:
    mutant, report = MUTANTS[number], tried(number)
    assert report.exit_code == 1
    assert next(iter(report.bugs)) is mutant.bug
    assert set(report.bugs) <= {mutant.bug} | mutant.also, report.text()
    assert any(mutant.place in finding.place for finding in report.findings if finding.bug is mutant.bug)


def test_every_bug_is_another_mutants() -> None:
    assert len(MUTANTS) >= 15
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_engine_passes_with_every_seed(seed: int) -> None:
    report = trial(seed=seed)
    assert report.exit_code == 0, report.text()
    assert {check.name for check in report.checks if check.status == "skipped"} == {"dtype edges", "payloads"}
    assert report.rows > 20000


def test_the_table_in_the_documentation_is_what_happens() -> None:
    spec: Any = importlib.util.spec_from_file_location("conformance_script", ROOT / "scripts" / "conformance.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    reports: list[tuple[Mutant, Report]] = [(mutant, tried(number)) for number, mutant in enumerate(MUTANTS)]
    page = script.PAGE.read_text()
    assert script.render(page, reports) == page, "run `make conformance`"
