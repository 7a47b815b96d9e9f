"""A file of prompts: one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrace.client.wire import parameters_of
from moetrace.errors import RequestError, RolloutError

_KEYS = 'an object with "inputs" or "prompt" (text or token ids), and perhaps "id" and "parameters"'


@dataclass(frozen=True)
class PromptLine:
    """One prompt.

    Attributes:
        number: of the line, from 0.
        id: by which its responses are known; the number where the line has none.
        inputs: text, or token ids.
        parameters: how it is generated: those of the rollout, and its own.
        given: what else the line says; it is copied to the response.
    """

    number: int
    id: str
    inputs: str | list[int]
    parameters: dict[str, Any]
    given: dict[str, Any]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and the SHA-256 of its bytes."""

    lines: list[PromptLine]
    sha256: str

    @classmethod
    def read(cls, path: Path, parameters: Mapping[str, Any]) -> PromptFile:
        """Read and check all lines, so that nothing is generated from a file that is wrong further down.

        Args:
            path: of the file; empty lines are left out.
            parameters: of the rollout, see `SamplingParams`; a line's own go before them.

        Raises:
            RolloutError: a line is not a prompt, or has the id of another.
            RequestError: `parameters` are out of range.
        """
        parameters_of(parameters)
        data = path.read_bytes()
        lines = [
            _line_of(number, text, parameters, path) for number, text in enumerate(data.split(b"\n")) if text.strip()
        ]
        seen: dict[str, int] = {}
        for line in lines:
            if seen.setdefault(line.id, line.number) != line.number:
                raise _wrong(
                    path, line.number, "has the id of another", got=f"{line.id!r}, as line {seen[line.id] + 1}"
                )
        if not lines:
            raise RolloutError(f"{path} has no prompts", expected=f"on each line {_KEYS}")
        return cls(lines, hashlib.sha256(data).hexdigest())


def _line_of(number: int, text: bytes, parameters: Mapping[str, Any], path: Path) -> PromptLine:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, number, "is not JSON", got=str(error)) from error
    if not isinstance(facts, dict) or ("inputs" in facts) == ("prompt" in facts):
        raise _wrong(path, number, "is not a prompt", got=text[:80].decode("utf-8", "replace"))
    inputs = facts.pop("inputs") if "inputs" in facts else facts.pop("prompt")
    own, name = facts.pop("parameters", {}), facts.pop("id", number)
    are_ids = isinstance(inputs, list) and all(type(token) is int for token in inputs)
    if not (isinstance(inputs, str) or are_ids) or not inputs:
        raise _wrong(path, number, "has a prompt that is neither text nor token ids", got=repr(inputs)[:80])
    if not isinstance(own, dict) or type(name) not in (int, str):
        raise _wrong(
            path, number, "has parameters that are no object, or an id that is no text", got=f"{own!r}, {name!r}"
        )
    merged = {**parameters, **own}
    try:
        parameters_of(merged)
    except RequestError as error:
        raise _wrong(path, number, "has parameters that cannot be served", got=str(error)) from error
    return PromptLine(number, str(name), inputs, merged, facts)


def _wrong(path: Path, number: int, what: str, *, got: str) -> RolloutError:
    return RolloutError(f"line {number + 1} of {path} {what}", expected=_KEYS, got=got)
