"""`moetrace serve` as a process on loopback, as a user starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests
from transformers import LlamaConfig, LlamaForCausalLM

TINY = "models/tiny-qwen3-moe"
DOCUMENTED_CLIENT = """
import base64, numpy as np, requests
r = requests.post("http://localhost:8000/generate", json={"inputs": "Hello, world!", "parameters": \
{"max_new_tokens": 100, "return_routed_experts": True}}).json()["routed_experts"]
print(np.frombuffer(base64.b64decode(r["data"]), dtype=np.int32).reshape(r["shape"]).shape)
"""


def serve(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moetrace", "serve", *arguments]


@pytest.fixture(params=["--enable-return-routed-experts", "--enable_return_routed_experts"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(serve(TINY, "--port", str(port), request.param), stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            try:
                if requests.get(f"http://localhost:{port}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                assert server.poll() is None, server.communicate()[1]
                time.sleep(0.1)
        yield f"http://localhost:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)


def test_the_documented_client_prints_an_LTK_shape_with_either_spelling_of_the_flag(url: str) -> None:
    script = DOCUMENTED_CLIENT.replace("http://localhost:8000", url)
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    layers, rows, top_k = eval(printed)
    assert (layers, top_k) == (4, 4)
    assert 13 <= rows <= 13 + 100 - 1  # the model may end its sentence early


def test_an_unknown_model_path_ends_with_a_message_and_no_traceback() -> None:
    done = subprocess.run(serve("./no/such/model"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no model at './no/such/model'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dense_model_with_the_flag_ends_before_its_weights_load(tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights that would not load")
    command = serve(str(tmp_path), "--enable-return-routed-experts")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is a dense model" in done.stderr
    assert "Start without --enable-return-routed-experts" in done.stderr
