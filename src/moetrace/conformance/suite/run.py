"""Running the suite: `run_suite` over any subject, `check_engine` for engines in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.adapters.process import subject_of
from moetrace.conformance.suite.asking import Ask, Subject
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.cases import CASES, Case
from moetrace.conformance.suite.report import PAYLOADS, CheckResult, Report
from moetrace.conformance.suite.session import Plan, Session, Tally, name_renumbered
from moetrace.errors import CheckError, DyeError, LackingError

Progress = Callable[[str], None]
"""Told of every answer: the name of its check."""

_LEAST_TOKENS = 512
_SERVE = "Serve the folder that --dye names."
_PAYLOADS_WHY = (
    "Every payload is read by the dialect's strict reader: its shape, type, marks and hashes are what they say."
)


def check_engine(
    engine: Any,
    dye: str | Path | DyeForm,
    *,
    plan: Plan | None = None,
    update_dye: str | Path | None = None,
    cases: Sequence[Case] = CASES,
) -> Report:
    """Run the suite on an engine in this process that has loaded a dye checkpoint.

    Args:
        engine: an engine as `moetrace.engines.base.Engine` describes it; or a function, plain or async, from an `Ask`
            to its `Answer`s, which raises `LackingError` for what it cannot do; or a `Subject`.
        dye: folder of the checkpoint, or its form.
        plan: how much is asked; by default all of it.
        update_dye: folder of a second checkpoint of other `weight_version`, to test an update of weights.
        cases: which checks.

    Raises:
        DyeError: a folder is no dye checkpoint, or the second one is not of the same shape.
        CheckError: called from a running event loop.
    """
    form, newer = load_forms(dye, update_dye)
    subject = subject_of(engine)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run_suite(subject, form, plan or Plan(), newer=newer, cases=cases))
    raise CheckError("check_engine was called from a running event loop", fix="Await run_suite, or use a thread.")


def load_forms(
    dye: str | Path | DyeForm, update_dye: str | Path | None
) -> tuple[DyeForm, tuple[str, DyeForm, str] | None]:
    """The form of a checkpoint, and what a session needs of a second one; raises `DyeError` as `check_engine`."""
    form = dye if isinstance(dye, DyeForm) else DyeForm.load(dye)
    if update_dye is None:
        return form, None
    newer = DyeForm.load(update_dye)
    if isinstance(dye, DyeForm) or newer == form or replace(newer, weight_version=form.weight_version) != form:
        raise DyeError(
            "the second checkpoint is not another weight version of the first",
            expected="two folders of one shape, written with different --weight-version",
            got=f"{newer}",
        )
    return form, (str(Path(update_dye).resolve()), newer, str(Path(dye).resolve()))


async def run_suite(
    subject: Subject,
    form: DyeForm,
    plan: Plan,
    *,
    newer: tuple[str, DyeForm, str] | None = None,
    cases: Sequence[Case] = CASES,
    progress: Progress = lambda check: None,
) -> Report:
    """Run the suite; the subject is left open.

    Args:
        subject: the engine.
        form: the dye checkpoint that it serves.
        plan: how much is asked.
        newer: folder and form of a second checkpoint, and folder of the first.
        cases: which checks.
        progress: told of every answer, by the name of its check.
    """
    session = Session(subject, form, plan, newer, progress)
    report = Report(subject.name, subject.dialect, form.words, plan.seed)
    try:
        await _probe(session)
    except CheckError as error:
        return replace(report, untestable=str(error))
    tallies: list[Tally] = []
    for case in cases:
        session.begin(case.name)
        tallies.append(session.tally)
        began = time.perf_counter()
        try:
            await case.run(session)
        except LackingError as error:
            session.tally.reason = str(error)
        except CheckError as error:
            session.find(Finding("", Bug.ERROR, str(error)))
        if not (session.tally.sequences or session.tally.findings or session.tally.reason):
            session.tally.reason = "the plan asks nothing of it"
        session.tally.seconds = time.perf_counter() - began
    name_renumbered(tallies, form.num_experts)
    results = [_result(case.name, case.why, tally) for case, tally in zip(cases, tallies, strict=True)]
    if not session.payloads.sequences:
        session.payloads.reason = "there are arrays here, and no payloads that a strict reader knows"
    report = replace(report, checks=(*results, _result(PAYLOADS, _PAYLOADS_WHY, session.payloads)))
    if not report.findings and not report.rows:
        return replace(report, untestable="every check was skipped, and no row was examined")
    return report


def _result(name: str, why: str, tally: Tally) -> CheckResult:
    return CheckResult(
        name=name,
        why=why,
        status="failed" if tally.findings else "skipped" if tally.reason else "passed",
        sequences=tally.sequences,
        rows=tally.rows,
        missing=tally.missing,
        findings=tuple(tally.findings),
        notes=tuple(tally.notes),
        reason=tally.reason,
        seconds=tally.seconds,
    )


async def _probe(session: Session) -> None:
    """Raise `CheckError` where testing would say nothing: no answers, no routes, or another model."""
    if session.max_tokens < _LEAST_TOKENS:
        raise CheckError(
            "the longest sequence is too short to test with",
            expected=f"at least {_LEAST_TOKENS} tokens",
            got=session.max_tokens,
            fix="Write a dye with a longer --window, or raise --max-tokens.",
        )
    session.begin("probe")
    try:
        answers = await session.one(Ask(session.tokens(8), 8), optional=True)
    except LackingError as error:
        raise CheckError(
            f"a plain request is refused ({error.what})", got=error.got, fix=error.fix or _SERVE
        ) from error
    if not answers:
        raise CheckError(f"a plain request failed ({session.tally.findings[0].detail})")
    if any(finding.bug is Bug.TOKENS for finding in session.tally.findings):
        raise CheckError(
            "the engine's tokens are not those of this checkpoint",
            expected="the next token of v is v + 1",
            got=list(answers[0].output),
            fix=f"{_SERVE} If it does, its logits are wrong, and its routes mean nothing.",
        )
    if answers[0].rows is None:
        raise CheckError(
            "the engine returns no routes", fix="Start it with its flag, such as --enable-return-routed-experts."
        )
