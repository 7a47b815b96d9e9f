"""The examples end with a message, not a traceback, where they are asked for what cannot be."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from traces import make_trace
from transformers import LlamaConfig, LlamaForCausalLM

from moetrace.format import save_file
from moetrace.layout import MoeLayout

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example that ends early; returns what it says."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        code, said = caught.value.code, capsys.readouterr().err
        return code if isinstance(code, str) else said if code == 2 else ""

    return run


def test_demo(ended, tmp_path: Path) -> None:
    out, nowhere = ("--out", tmp_path / "out"), tmp_path / "none.txt"
    assert "error: there are no prompts: raise --prompts" in ended("demo.py", *out, "--prompts", 0)
    assert f"error: --prompt-file: there is no {nowhere};" in ended("demo.py", *out, "--prompt-file", nowhere)
    assert not (tmp_path / "out").exists()
    said = ended("demo.py", *out, "--prompts", 1, "--new-tokens", 5000)
    assert said.startswith("demo.py: max_new_tokens does not fit the model's window")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_trainer(ended, tmp_path: Path, dense: Path) -> None:
    arguments = ("trainer.py", "--model", dense, "--rollout", tmp_path)
    assert f"error: --rollout: there is no {tmp_path / 'traces.safetensors'};" in ended(*arguments)
    save_file([make_trace(range(6), MoeLayout((0, 1), 8, 2))], tmp_path / "traces.safetensors")
    rollout = [{"prompt_tokens": 2, "text": "a b", "logprobs": [-1.0] * 4}]
    (tmp_path / "rollout.json").write_text(json.dumps(rollout))
    assert ended(*arguments).startswith("trainer.py: LlamaForCausalLM is a dense model: it has no routers")


def test_grpo_trl(ended, dense: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES.parent / "models/tiny-qwen3-moe" / name, dense)
    said = ended("grpo_trl.py", "--model", dense)
    assert said.startswith("grpo_trl.py: LlamaForCausalLM is a dense model: it has no routers")
