"""`moetrace rollout`. Exit codes: 0 all prompts are finished, 1 some failed, 2 it could not go on, 130 interrupted."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrace.commands.knobs import add_knobs, knobs_of
from moetrace.engines.requests import SamplingParams
from moetrace.errors import CaptureOffError, MissingExtraError
from moetrace.rollout.config import RolloutConfig


def add_rollout(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rollout` to the `moetrace` command."""
    text = "send a file of prompts to a server, and keep responses and routes"
    parser = commands.add_parser(
        "rollout",
        help=text,
        description=f"{text}. The same command goes on where it was interrupted. The key is $MOETRACE_API_KEY.",
    )
    parser.add_argument("prompts", type=Path, help='JSON lines: {"inputs": text or token ids, "id", "parameters"}')
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--out", type=Path, required=True, help="folder for rollout.jsonl and the log of traces")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_knobs(parser, SamplingParams)
    add_knobs(parser, RolloutConfig)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        import tqdm  # noqa: F401

        from moetrace.rollout.driver import Report
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "client") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)
    report, code = Report(), 130
    try:
        asyncio.run(_roll_out(args, report))
        code = 1 if report.failed else 0
    except KeyboardInterrupt:
        print("moetrace: interrupted; the same command goes on where this one was", file=sys.stderr)
    facts = asdict(report) | {"out": str(args.out)}
    lines = [
        f"{report.before + report.finished} of {report.prompts} prompts are finished, {report.finished} of them now: "
        f"{report.sequences:,} sequences, {report.tokens:,} tokens, {report.rows:,} rows",
    ]
    lines += [f"{report.failed} failed: see {args.out / 'errors.jsonl'}"] if report.failed else []
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return code


async def _roll_out(args: argparse.Namespace, report: Any) -> None:
    from tqdm import tqdm

    from moetrace.client import AsyncClient
    from moetrace.rollout.driver import roll_out
    from moetrace.rollout.journal import Journal
    from moetrace.rollout.prompts import PromptFile

    config, sampling = RolloutConfig(**knobs_of(args, RolloutConfig)), knobs_of(args, SamplingParams)
    prompts = PromptFile.read(args.prompts, sampling)
    lines = prompts.lines[: config.limit]
    key = os.environ.get("MOETRACE_API_KEY") or None
    async with AsyncClient(args.url, api_key=key, timeout=config.timeout, retries=config.retries) as client:
        model = await client.model()
        if model.layout is None:
            raise CaptureOffError(
                "the server does not record routes", fix="Start it with --enable-return-routed-experts."
            )
        settings = {
            "prompts_sha256": prompts.sha256,
            "parameters": sampling,
            "codec": config.codec,
            "model": model.fingerprint,
        }
        with Journal(args.out, settings) as journal:
            report.prompts, report.before = len(lines), sum(line.number in journal.done for line in lines)
            began = time.monotonic()
            with tqdm(total=len(lines), initial=report.before, unit="prompt", disable=None, file=sys.stderr) as bar:

                def progress() -> None:
                    facts = {"sequences": report.sequences, "rows": report.rows, "failed": report.failed}
                    bar.set_postfix(facts | {"tokens/s": round(report.tokens / (time.monotonic() - began))})
                    bar.update()

                await roll_out(client, lines, journal, config, report, progress)
