"""The conformance suite: a live engine with a dye checkpoint is asked, and every row it returns is judged."""

from moetrace.conformance.suite.asking import Answer, Ask, Rows, Subject
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.cases import CASES, Case
from moetrace.conformance.suite.report import CheckResult, Report
from moetrace.conformance.suite.run import check_engine, run_suite
from moetrace.conformance.suite.session import Plan

__all__ = [
    "CASES", "Answer", "Ask", "Bug", "Case", "CheckResult", "Finding", "Plan", "Report", "Rows", "Subject",
    "check_engine", "run_suite",
]  # fmt: skip
