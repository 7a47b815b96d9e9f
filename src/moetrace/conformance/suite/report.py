"""What a run came to: as text, JSON, and JUnit's XML."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal
from xml.etree import ElementTree

from moetrace.conformance.suite.bugs import Bug, Finding

Status = Literal["passed", "failed", "skipped"]
_EXAMPLES = 3


@dataclass(frozen=True)
class CheckResult:
    """One check.

    Attributes:
        name, why: which, and what it is for.
        status: "skipped" has a `reason`.
        sequences, rows, missing: answers and rows that were examined, and rows that the engine marked missing.
        findings: what is wrong.
        notes: what a reader should know of a check that passed.
        seconds: how long it took.
    """

    name: str
    why: str
    status: Status
    sequences: int = 0
    rows: int = 0
    missing: int = 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All checks of one engine.

    Attributes:
        engine, dialect: who was tested, and in which dialect.
        checkpoint: the dye that answers were judged by, in words. Few dialects tell whether it is that one, or one of
            another architecture and the same sizes.
        seed: of the prompts.
        checks: in the order they ran.
        untestable: why nothing could be tested, or "".
    """

    engine: str
    dialect: str
    checkpoint: str
    seed: int
    checks: tuple[CheckResult, ...] = ()
    untestable: str = ""

    @property
    def findings(self) -> list[Finding]:
        """Of all checks."""
        return [finding for check in self.checks for finding in check.findings]

    @property
    def rows(self) -> int:
        """Rows that were examined against the closed form."""
        return sum(check.rows for check in self.checks if check.name != PAYLOADS)

    @property
    def exit_code(self) -> int:
        """0 sound, 1 convicted, 2 not tested."""
        return 2 if self.untestable else 1 if self.findings else 0

    @property
    def verdict(self) -> str:
        """One line."""
        if self.untestable:
            return f"not tested: {self.untestable}"
        skipped = sum(check.status == "skipped" for check in self.checks)
        ran = f"{len(self.checks) - skipped} checks, {skipped} skipped, {self.rows} rows"
        if not self.findings:
            return f"sound: {ran}, every one right"
        return f"convicted: {ran}; {', '.join(bug.value for bug in self.bugs)}"

    @property
    def bugs(self) -> dict[Bug, int]:
        """How many findings look like each bug, most first."""
        counts: dict[Bug, int] = defaultdict(int)
        for finding in self.findings:
            counts[finding.bug] += 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def text(self) -> str:
        """For people."""
        lines = [f"{self.engine} ({self.dialect}) against {self.checkpoint}, seed {self.seed}", ""]
        if self.checks:
            width = max(len(check.name) for check in self.checks)
            lines.append(f"{'check':{width}}  {'':7}  {'sequences':>9}  {'rows':>9}  findings")
        for check in self.checks:
            counts = f"{check.sequences:9}  {check.rows:9}  {len(check.findings) or '':>8}"
            told = "; ".join([check.reason] if check.reason else check.notes)
            lines.append(f"{check.name:{width}}  {check.status:7}  {counts}  {told}".rstrip())
        for group in _groups(self.findings):
            first = group[0]
            rows = sum(finding.rows for finding in group)
            many = f"{len(group)} finding{'s' * (len(group) > 1)}" + (f", {rows} rows" if rows else "")
            lines += ["", f"{first.bug.value}, in check '{first.check}': {many}", f"  {first.bug.about}"]
            lines += [f"  - {finding.line()}" for finding in group[:_EXAMPLES]]
            if len(group) > _EXAMPLES:
                lines.append(f"  - and {len(group) - _EXAMPLES} more")
        return "\n".join([*lines, "", self.verdict])

    def json(self) -> str:
        """For programs: everything, with every finding."""
        facts = {
            "engine": self.engine,
            "dialect": self.dialect,
            "checkpoint": self.checkpoint,
            "seed": self.seed,
            "verdict": ("sound", "convicted", "not tested")[self.exit_code],
            "untestable": self.untestable or None,
            "rows": self.rows,
            "checks": [_facts(check) for check in self.checks],
        }
        return json.dumps(facts, indent=1)

    def junit(self) -> str:
        """For CI: one test case for each check."""
        suite = ElementTree.Element("testsuite", name=f"moetrace check: {self.engine} ({self.dialect})")
        for check in self.checks:
            case = ElementTree.SubElement(
                suite, "testcase", classname="moetrace.check", name=check.name, time=f"{check.seconds:.3f}"
            )
            if check.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=_printable(check.reason))
            if check.findings:
                bugs = ", ".join(dict.fromkeys(finding.bug.value for finding in check.findings))
                failure = ElementTree.SubElement(case, "failure", type=bugs, message=f"{len(check.findings)}: {bugs}")
                failure.text = _printable("\n".join(finding.line() for finding in check.findings))
        if self.untestable:
            case = ElementTree.SubElement(
                suite, "testcase", classname="moetrace.check", name="the engine can be tested"
            )
            ElementTree.SubElement(case, "error", message=_printable(self.untestable))
        for name, status in (("failures", "failed"), ("skipped", "skipped")):
            suite.set(name, str(sum(check.status == status for check in self.checks)))
        suite.set("errors", str(int(bool(self.untestable))))
        suite.set("tests", str(len(suite)))
        suite.set("time", f"{math.fsum(check.seconds for check in self.checks):.3f}")
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


PAYLOADS = "payloads"
"""The check that all payloads of a run are read by the dialect's strict reader."""


def _groups(findings: list[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[str, Bug], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.check, finding.bug].append(finding)
    return list(groups.values())


def _facts(check: CheckResult) -> dict[str, Any]:
    facts = {key: value for key, value in vars(check).items() if key != "findings"}
    return facts | {"notes": list(check.notes), "findings": [_finding(finding) for finding in check.findings]}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        key: value.value if isinstance(value, Enum) else value
        for key, value in vars(finding).items()
        if value is not None and key != "check"
    } | {"line": finding.line()}


def _printable(text: str) -> str:
    """Without what XML cannot hold: an engine's error message may have anything in it."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
