"""The `moetrace` command."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moetrace import __version__
from moetrace.commands import check, dye
from moetrace.commands.files import add_commands
from moetrace.commands.knobs import add_knobs, knobs_of
from moetrace.commands.rollout import add_rollout
from moetrace.engines.config import EngineConfig
from moetrace.errors import MissingExtraError, MoetraceError
from moetrace.server import memory
from moetrace.server.config import ServerConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args))
    except (MoetraceError, OSError) as error:
        print(f"moetrace: {_explained(error)}", file=sys.stderr)
        return 2


_FIXES = {
    errno.ENOENT: "Check the path; a folder to write into must be there.",
    errno.EEXIST: "Name a folder, or a path where nothing is.",
    errno.ENOTDIR: "Name a path below a folder, not below a file.",
    errno.EISDIR: "Name a file in that folder.",
}


def _explained(error: MoetraceError | OSError) -> Exception:
    """What to print: of the operating system's error with a path, what to do about it."""
    if not isinstance(error, OSError) or error.filename is None:
        return error
    return MoetraceError(f"{error.filename} cannot be used", got=error.strerror, fix=_FIXES.get(error.errno or 0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetrace",
        description="Record the experts an MoE model chose at rollout, and replay them in training.",
    )
    parser.add_argument("--version", action="version", version=f"moetrace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_commands(commands)
    add_rollout(commands)
    dye.add_command(commands)
    check.add_command(commands)
    serve = commands.add_parser("serve", help="serve a model over HTTP, with the routes of every token on request")
    serve.set_defaults(run=_serve)
    serve.add_argument("model", help="checkpoint folder")
    add_knobs(serve, ServerConfig)
    add_knobs(serve, EngineConfig)
    return parser


def _serve(args: argparse.Namespace) -> int:
    memory.keep_level()
    try:
        from moetrace.engines.transformers import TransformersEngine
        from moetrace.server import create_app, serve
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "server") from error

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    args.served_model_name = args.served_model_name or Path(args.model).expanduser().resolve().name
    args.api_key = args.api_key or os.environ.get("MOETRACE_API_KEY") or None
    server_config = ServerConfig(**knobs_of(args, ServerConfig))
    config = EngineConfig(**knobs_of(args, EngineConfig))
    engine = TransformersEngine.load(args.model, config)
    if not engine.is_driver:  # under torchrun, rank 0 serves
        engine.close()
        return 0
    try:
        serve(create_app(engine, TransformersEngine.tokenizer(args.model), server_config), server_config)
    finally:
        engine.close()
    return 0
