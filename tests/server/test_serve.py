"""`moetrace serve` as a process on loopback, as a user starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
        assert server.wait(timeout=30) == 0


def test_the_documented_client_prints_an_LTK_shape_with_either_spelling_of_the_flag(url: str) -> None:
    script = DOCUMENTED_CLIENT.replace("http://localhost:8000", url)
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    layers, rows, top_k = eval(printed)
    assert (layers, top_k) == (4, 4)
    assert 13 <= rows <= 13 + 100 - 1  # the model may end its sentence early
    assert [model["id"] for model in requests.get(f"{url}/v1/models").json()["data"]] == ["tiny-qwen3-moe"]


def test_a_signal_ends_the_server_after_its_requests_are_answered() -> None:
    """The engine is paused, so the request could wait for ever: it is answered as it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://localhost:{port}"
    command = serve(TINY, "--port", str(port), "--host", "0.0.0.0", "--shutdown-seconds", "0.5")
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            try:
                requests.get(f"{url}/health", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        requests.post(f"{url}/pause", timeout=5)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(requests.post, f"{url}/generate", json={"inputs": "A"}, timeout=30)
            while "moetrace_sequences_under_way 1" not in requests.get(f"{url}/metrics", timeout=5).text:
                time.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            assert waiting.result().json()["finish_reason"] == "abort"
        log = server.communicate(timeout=30)[1]
        assert server.returncode == 0
        assert "0.0.0.0 is open to other machines and needs no key" in log
        assert '"path": "/generate", "status": 200' in log
    finally:
        server.kill()


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
