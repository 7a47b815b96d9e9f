"""`moetrace check`: run the conformance suite against a live server of a dye checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from moetrace.commands.knobs import add_knobs, knobs_of
from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.cases import CASES
from moetrace.conformance.suite.report import Report
from moetrace.conformance.suite.run import load_forms, run_suite
from moetrace.conformance.suite.session import Plan
from moetrace.errors import CheckError, DyeError, MissingExtraError
from moetrace.files import write_whole

DIALECTS = ("auto", "moetrace", "lightllm", "sglang", "vllm")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add it to the `moetrace` command."""
    summary = "ask a live server of a dye checkpoint for routes in every way, and judge every row of them"
    parser = commands.add_parser(
        "check", help=summary, description=f"{summary}. Exit code 0: sound; 1: convicted; 2: could not be tested."
    )
    parser.set_defaults(run=_check)
    parser.add_argument("url", help="address of the server, such as http://localhost:8000")
    parser.add_argument("--dye", required=True, help="folder of the checkpoint that it serves, or its dye.json")
    parser.add_argument("--update-dye", help="folder of a second one, of other --weight-version, to update to and back")
    parser.add_argument("--dialect", choices=DIALECTS, default="auto", help="what the server speaks (%(default)s)")
    parser.add_argument("--api-key", help="key of the server; default: $MOETRACE_API_KEY, or none")
    parser.add_argument("--quick", action="store_true", help="about a tenth of the requests, and no long prompts")
    add_knobs(parser, Plan)
    parser.set_defaults(**{knob.name: None for knob in fields(Plan)})  # by --quick and the checkpoint's window
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML too")


def _check(args: argparse.Namespace) -> int:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    form, newer = load_forms(args.dye, args.update_dye)
    report = asyncio.run(_run(args, form, newer, plan_of(args)))
    print(report.json() if args.json else report.text())
    if args.junit:
        write_whole(Path(args.junit), report.junit().encode())
    return report.exit_code


def plan_of(args: argparse.Namespace) -> Plan:
    """How much is asked: by default or `--quick`, within the checkpoint's window, and as further flags say."""
    plan = Plan.quick() if args.quick else Plan()
    config = Path(args.dye) / "config.json"
    if config.is_file():
        try:
            window = json.loads(config.read_text()).get("max_position_embeddings", plan.max_tokens)
            plan = replace(plan, max_tokens=min(plan.max_tokens, window))
        except (ValueError, AttributeError, TypeError) as error:
            raise DyeError(f"{config} is not that of a checkpoint", got=repr(error)) from error
    return replace(plan, **{name: value for name, value in knobs_of(args, Plan).items() if value is not None})


async def _run(args: argparse.Namespace, form: DyeForm, newer: tuple[str, DyeForm, str] | None, plan: Plan) -> Report:
    try:
        from tqdm import tqdm

        from moetrace.conformance.suite.adapters.opening import open_subject
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "client") from error
    key = args.api_key or os.environ.get("MOETRACE_API_KEY") or None
    try:
        subject = await open_subject(args.url, form, args.dialect, key)
    except CheckError as error:
        return Report(args.url, args.dialect, form.words, plan.seed, untestable=str(error))
    names = [case.name for case in CASES]
    try:
        with tqdm(total=len(names), unit="check", file=sys.stderr, disable=None, leave=False) as bar:
            answers = 0

            def progress(check: str) -> None:
                nonlocal answers
                answers += 1
                bar.n = names.index(check) if check in names else 0
                bar.set_postfix_str(f"{check}, {answers} answers")

            return await run_suite(subject, form, plan, newer=newer, progress=progress)
    finally:
        await subject.close()
