"""Command-line options out of the fields of a dataclass: names, types, defaults and help are written there once."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

T = TypeVar("T")
_TYPES = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str, "str | None": str}


def add_knobs(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Add an option for each field of a dataclass; a field that is neither a number nor a text is given as JSON."""
    for knob in fields(kind):
        # LightLLM spells its flags with underscores; both spellings work.
        names = [f"--{knob.name.replace('_', '-')}"]
        names += [f"--{knob.name}"] if "_" in knob.name else []
        default = knob.default_factory() if knob.default_factory is not MISSING else knob.default
        text = _help(kind, knob)
        if knob.type == "bool":
            action = argparse.BooleanOptionalAction if default else "store_true"
            parser.add_argument(*names, action=action, default=default, help=text)
        elif knob.type in _TYPES:
            parser.add_argument(*names, type=_TYPES[str(knob.type)], default=default, help=text)
        else:
            parser.add_argument(*names, type=_json, default=default, metavar="JSON", help=f"{text} (as JSON)")


def knobs_of(args: argparse.Namespace, kind: type[T]) -> dict[str, Any]:
    """The values of those options by the names of the fields."""
    return {knob.name: getattr(args, knob.name) for knob in fields(kind)}  # type: ignore[arg-type]


def _json(text: str) -> Any:
    return json.loads(text)


def _help(kind: type[Any], knob: Field[Any]) -> str:
    """What is said of a field in its metadata, or else in the Attributes of the class's docstring."""
    if "help" in knob.metadata:
        return str(knob.metadata["help"])
    _, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.search(rf"^    {knob.name}: (.*(?:\n     +.*)*)", listed, re.MULTILINE)
    return "" if found is None else " ".join(found[1].split()).removesuffix(".").replace("%", "%%")
