"""Write the table of mutants in docs/conformance.md: each broken engine, which checks catch it, and what they call it.

python scripts/conformance.py                  # `make conformance`
python scripts/conformance.py --check          # exit 1 if the table is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moetrace.conformance.suite.broken import Mutant
from moetrace.conformance.suite.bugs import Bug
from moetrace.conformance.suite.mutants import MUTANTS, trial
from moetrace.conformance.suite.report import Report

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"
BEGIN, END = "<!-- Written by `make conformance`: mutants -->\n", "<!-- end of mutants -->\n"
BUGS_BEGIN, BUGS_END = "<!-- Written by `make conformance`: classes -->\n", "<!-- end of classes -->\n"
_ALL = 8
"""More checks than that are not listed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = render(PAGE.read_text(), [(mutant, trial(mutant)) for mutant in MUTANTS])
    if args.check:
        if PAGE.read_text() == page:
            return 0
        print(f"{PAGE} is stale: run `make conformance`", file=sys.stderr)
        return 1
    PAGE.write_text(page)
    return 0


def render(page: str, reports: list[tuple[Mutant, Report]]) -> str:
    """The page with new tables."""
    mutants = "| mutant | caught by | named as | for example |\n|---|---|---|---|\n"
    mutants += "".join(_row(mutant, report) for mutant, report in reports)
    bugs = "| looks like | means |\n|---|---|\n" + "".join(f"| {bug.value} | {bug.about} |\n" for bug in Bug)
    return _replaced(_replaced(page, BEGIN, END, mutants), BUGS_BEGIN, BUGS_END, bugs)


def _row(mutant: Mutant, report: Report) -> str:
    failed = [check for check in report.checks if check.status == "failed"]
    caught = ", ".join(check.name for check in failed) if len(failed) <= _ALL else f"{len(failed)} checks"
    bug = next(iter(report.bugs), None)
    found = [finding for finding in report.findings if finding.bug is bug]
    example = max(found, key=lambda finding: (finding.rows > 1, bool(finding.detail or finding.place)), default=None)
    told = "" if example is None else ", ".join(part for part in (example.detail, example.place) if part)
    return f"| {mutant.name} | {caught or 'NOTHING'} | {bug.value if bug else 'NOTHING'} | {told} |\n"


def _replaced(page: str, begin: str, end: str, text: str) -> str:
    before, _, rest = page.partition(begin)
    return before + begin + text + end + rest.partition(end)[2]


if __name__ == "__main__":
    sys.exit(main())
