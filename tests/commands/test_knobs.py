"""Options come out of dataclasses, with their names, types, defaults and help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import pytest

from moetrace.commands.knobs import add_knobs, knobs_of
from moetrace.engines.config import EngineConfig
from moetrace.engines.requests import SamplingParams
from moetrace.rollout.config import RolloutConfig
from moetrace.server.config import ServerConfig


@dataclass(frozen=True)
class Knobs:
    """Some.

    Attributes:
        count: how many, of
            which 5 % are lost.
        runs: lists of ids.
    """

    count: int = 3
    rate: float = field(default=0.5, metadata={"help": "how often"})
    name: str | None = None
    is_on: bool = False
    is_off: bool = True
    runs: tuple[tuple[int, ...], ...] = ()


def parse(kind: type[Any], *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_knobs(parser, kind)
    return knobs_of(parser.parse_args(arguments), kind)


def test_values_of_every_type_in_either_spelling() -> None:
    assert Knobs(**parse(Knobs)) == Knobs()
    given = ["--count", "4", "--rate", "2", "--name", "x", "--is_on", "--no-is-off", "--runs", "[[1, 2], [3]]"]
    assert parse(Knobs, *given) == {
        "count": 4,
        "rate": 2.0,
        "name": "x",
        "is_on": True,
        "is_off": False,
        "runs": [[1, 2], [3]],
    }
    with pytest.raises(SystemExit):
        parse(Knobs, "--runs", "[1")


def test_help_is_that_of_the_field_or_of_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Knobs, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "how many, of which 5 % are lost" in text
    assert "how often" in text
    assert "lists of ids (as JSON)" in text


@pytest.mark.parametrize("kind", [SamplingParams, RolloutConfig, ServerConfig, EngineConfig])
def test_every_option_of_every_command_has_help(kind: type[Any]) -> None:
    parser = argparse.ArgumentParser()
    add_knobs(parser, kind)
    assert [action.dest for action in parser._actions if not (action.help or "").strip(" (asJON)")] == []
    assert kind(**parse(kind)) == kind()
