"""`moetrace dye`: write a checkpoint whose routes and next tokens are known."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields

from moetrace.conformance.dye.families import FAMILIES
from moetrace.conformance.dye.options import DyeOptions
from moetrace.errors import MissingExtraError


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add it to the `moetrace` command."""
    summary = "write a dye checkpoint: a real architecture whose routes and next tokens are known in closed form"
    parser = commands.add_parser("dye", help=summary, description=f"{summary}.")
    parser.set_defaults(run=_dye)
    parser.add_argument("--arch", required=True, choices=FAMILIES, help="architecture, by the model_type of its config")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--json", action="store_true", help="print the form as one JSON object")
    for knob in fields(DyeOptions):
        name = f"--{knob.name.replace('_', '-')}"
        about = f"{knob.metadata['help']} (%(default)s)"
        if isinstance(knob.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=knob.default, help=about)
        else:
            parser.add_argument(name, type=type(knob.default), default=knob.default, help=about)


def _dye(args: argparse.Namespace) -> int:
    try:
        from moetrace.conformance.dye.checkpoint import write_dye
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "transformers") from error
    options = DyeOptions(**{knob.name: getattr(args, knob.name) for knob in fields(DyeOptions)})
    form = write_dye(args.out, args.arch, options)
    if args.json:
        print(json.dumps(asdict(form)))
    else:
        print(f"{args.out}: {form.words}")
    return 0
