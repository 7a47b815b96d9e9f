"""A file of prompts is right in every line, or refused with the line that is not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from traces import refused

from moetrace.errors import RequestError, RolloutError
from moetrace.rollout.config import RolloutConfig
from moetrace.rollout.prompts import PromptFile, PromptLine


def read(tmp_path: Path, text: str) -> PromptFile:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode())
    return PromptFile.read(path, {"max_new_tokens": 5, "n": 2})


def test_lines_have_text_or_ids_names_and_parameters_of_their_own(tmp_path: Path) -> None:
    text = '{"inputs": "a\u2028b"}\n\n'
    text += '{"prompt": [1, 2], "id": "x", "parameters": {"n": 3, "add_special_tokens": false}}\r\n'
    text += '{"inputs": "c", "id": 7, "answer": 42}'
    prompts = read(tmp_path, text)
    asked = {"max_new_tokens": 5, "n": 2}
    assert prompts.lines == [
        PromptLine(0, "0", "a\u2028b", asked, {}),
        PromptLine(2, "x", [1, 2], asked | {"n": 3, "add_special_tokens": False}, {}),
        PromptLine(3, "7", "c", asked, {"answer": 42}),
    ]
    assert prompts.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a prompt"),
        ('{"id": 1}', "is not a prompt"),
        ('{"inputs": "a", "prompt": "b"}', "is not a prompt"),
        ('{"inputs": ""}', "has a prompt that is neither text nor token ids"),
        ('{"inputs": []}', "has a prompt that is neither text nor token ids"),
        ('{"inputs": ["a"]}', "has a prompt that is neither text nor token ids"),
        ('{"inputs": [true]}', "has a prompt that is neither text nor token ids"),
        ('{"inputs": "a", "parameters": []}', "has parameters that are no object"),
        ('{"inputs": "a", "id": null}', "has parameters that are no object, or an id that is no text"),
        ('{"inputs": "a", "parameters": {"top_q": 1}}', "has parameters that cannot be served"),
        ('{"inputs": "a", "parameters": {"n": 0}}', "has parameters that cannot be served"),
        ('{"inputs": "a", "parameters": {"n": "1"}}', "has parameters that cannot be served"),
        ('{"inputs": "a", "parameters": {"stop_sequences": [1]}}', "has parameters that cannot be served"),
        ('{"inputs": "a", "parameters": {"skip_special_tokens": "no"}}', "has parameters that cannot be served"),
        ('{"inputs": "a", "id": "0"}', "has the id of another"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, what: str) -> None:
    with refused(RolloutError, f"line 3 of {tmp_path / 'prompts.jsonl'} {what}"):
        read(tmp_path, '{"inputs": "fine"}\n\n' + line)


def test_a_file_without_prompts_and_a_rollout_with_wrong_parameters(tmp_path: Path) -> None:
    with refused(RolloutError, "has no prompts"):
        read(tmp_path, "\n \n")
    with refused(RequestError, "temperature is out of range"):
        PromptFile.read(tmp_path / "prompts.jsonl", {"temperature": 0})
    with pytest.raises(FileNotFoundError):
        PromptFile.read(tmp_path / "nothing", {})


@pytest.mark.parametrize(
    ("knobs", "name"), [({"codec": "foo"}, "codec"), ({"timeout": float("nan")}, "timeout"), ({"limit": 0}, "limit")]
)
def test_knobs_are_checked_before_a_folder_is_begun(knobs: dict[str, Any], name: str) -> None:
    with pytest.raises(RolloutError, match=f"^{name} is "):
        RolloutConfig(**knobs)
