"""docs/trainers.md: the lines of use of each contract run as they stand and do what they say; the table is right."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import upstream
from documented import DOCUMENTED
from upstream import SEQUENCES, TOKENS, TRACES, padded

from moetrace.trainers import contracts

PAGE = Path("docs/trainers.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
HEADINGS = {
    "verl": "verl",
    "slime": "slime",
    "miles": "miles",
    "nemo_rl": "NeMo-RL",
    "automodel": "NeMo Automodel",
    "skyrl": "SkyRL",
    "prime_rl": "prime-rl",
    "maxtext": "MaxText",
}
SETTING = {"trace": TRACES[0], "traces": TRACES, "layout": SEQUENCES[0].layout, "num_layers": 6}
ROWS = {name: documented.rows(SEQUENCES[0]) for name, documented in DOCUMENTED.items()}


def run(name: str, **given: Any) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[HEADINGS[name]], re.DOTALL)
    steps = [line for line in code.splitlines() if line.strip() and not re.match(r"(from|import) ", line)]
    assert 2 <= len(steps) <= 5
    names = SETTING | given
    exec(code, names)
    return names


def test_verl() -> None:
    prompt, response = TOKENS[0][:3], TOKENS[0][3:]
    names = run("verl", output=SimpleNamespace(prompt_ids=prompt, response_ids=response))
    np.testing.assert_array_equal(names["output"].routed_experts, ROWS["verl"], strict=True)
    assert names["again"] == TRACES[0]


@pytest.mark.parametrize("name", ["slime", "miles"])
def test_samples(name: str) -> None:
    names = run(name, sample=SimpleNamespace(tokens=TOKENS[0]))
    np.testing.assert_array_equal(names["sample"].rollout_routed_experts, ROWS[name], strict=True)
    assert names["again"] == TRACES[0]


def test_nemo_rl() -> None:
    input_ids, mask = padded(left=False)
    names = run("nemo_rl", batch={"input_ids": input_ids}, mask=mask, captured=[5, 5])
    rows = names["batch"]["routed_experts"].numpy()[1]
    np.testing.assert_array_equal(rows, DOCUMENTED["nemo_rl"].rows(SEQUENCES[1]), strict=True)
    assert names["again"] == TRACES


def test_automodel() -> None:
    seen = []

    class RouterReplay:
        @staticmethod
        def replay(gates: list) -> nullcontext:
            seen.extend(gates)
            return nullcontext()

    input_ids, mask = padded(left=True)
    given = {"input_ids": input_ids, "mask": mask, "captured": [5, 5], "forward": len, "RouterReplay": RouterReplay}
    names = run("automodel", **given)
    np.testing.assert_array_equal(np.stack(seen, 1)[6:12], DOCUMENTED["automodel"].rows(SEQUENCES[1], first_row=6))
    assert names["again"] == TRACES


def test_skyrl() -> None:
    prompts = [ids[:prompt] for ids, prompt in zip(TOKENS, upstream.PROMPTS, strict=True)]
    responses = [ids[prompt:] for ids, prompt in zip(TOKENS, upstream.PROMPTS, strict=True)]
    names = run("skyrl", output={"prompt_token_ids": prompts, "response_ids": responses})
    np.testing.assert_array_equal(names["output"]["rollout_expert_indices"][0], ROWS["skyrl"], strict=True)
    assert names["again"] == TRACES


def test_prime_rl() -> None:
    names = run("prime_rl", sample=SimpleNamespace(token_ids=TOKENS[0]), RoutedExperts=SimpleNamespace)
    assert names["sample"].routed_experts.data == ROWS["prime_rl"].tobytes()
    assert names["again"] == TRACES[0]


def test_maxtext() -> None:
    input_ids, mask = upstream.prompts_left_responses_right()
    names = run("maxtext", input_ids=input_ids, mask=mask, TrainExample=SimpleNamespace)
    np.testing.assert_array_equal(names["example"].routed_experts[0, 1:7], ROWS["maxtext"], strict=True)
    assert names["again"] == TRACES


@pytest.mark.parametrize("name", HEADINGS)
def test_the_table_says_what_the_contract_is(name: str) -> None:
    contract, heading = contracts.CONTRACTS[name], HEADINGS[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| [{heading}")]
    _, _, field, _, dtype, _, missing, layers, functions, tested, _ = (cell.strip() for cell in row.split("|"))
    assert field == "`RouterReplay.replay(list)`" if name == "automodel" else field == f"`{contract.field}`"
    assert re.findall(r"u?int\d+", dtype) == list(contract.dtypes)
    assert ("−1" in missing) == contract.marks_missing
    assert (f"{contract.unknown} route" in missing) or contract.unknown is None or name == "maxtext"
    assert layers == {"all": "all", "moe": "MoE", "either": "all, or MoE"}[contract.layers]
    named = [f"to_{name}", f"to_{name}_batch"] if hasattr(contracts, f"to_{name}_batch") else [f"to_{name}"]
    assert functions == ", ".join(f"`{function}`" for function in named)
    assert all(function.replace("to_", "from_", 1) in contracts.__all__ for function in named)
    origin = json.loads(upstream.PATH.read_text())[name]["origin"]
    assert any(word in origin for word in re.findall(r"[0-9a-f]{8}|\d+\.\d+\.\d+", tested))
