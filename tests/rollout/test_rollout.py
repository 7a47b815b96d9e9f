"""`moetrace rollout` against the real server: whatever is interrupted goes on, with each prompt once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import DYE, dyed_engine
from serving import free_port, serving

from moetrace import Client
from moetrace.cli import main
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app
from moetrace.server.config import ServerConfig
from moetrace.stores import TraceLog

NEW = 12


@pytest.fixture(scope="module")
def dyed() -> Iterator[Any]:
    with dyed_engine() as dyed:
        yield dyed


@pytest.fixture(scope="module")
def url(dyed: Any) -> Iterator[str]:
    with serving(create_app(*dyed)) as url:
        yield url


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 prompts: text and token ids, some with parameters of their own."""
    lines: list[dict[str, Any]] = [{"inputs": chr(65 + i % 26) * (1 + i % 3), "id": f"p{i}"} for i in range(30)]
    lines += [{"prompt": [i, i + 1], "answer": i} for i in range(10)]
    lines[3]["parameters"] = {"n": 3}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(capsys: pytest.CaptureFixture[str], prompts: Path, url: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report, and what was said of errors."""
    code = main([*command(prompts, url), *options])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def command(prompts: Path, url: str) -> list[str]:
    out = str(prompts.parent / "out")
    return ["rollout", str(prompts), "--url", url, "--out", out, "--max-new-tokens", str(NEW), "--n", "2", "--json"]


def finished(prompts: Path) -> list[int]:
    """Numbers of the prompts that are in the responses, after a check of every token and row, each there once."""
    out = prompts.parent / "out"
    lines = [json.loads(line) for line in (out / "rollout.jsonl").read_bytes().splitlines()]
    log = TraceLog(out / "traces")
    names = [sequence["trace"] for line in lines for sequence in line["sequences"]]
    assert sorted(record.name for record in log.records) == sorted(names)
    assert len(set(names)) == len(names)
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    for line in lines:
        prompt = asked[line["number"]]
        inputs = prompt.get("inputs", prompt.get("prompt"))
        assert line["prompt_token_ids"] == (list(inputs.encode()) if isinstance(inputs, str) else inputs)
        assert line["id"] == prompt.get("id", str(line["number"]))
        assert line["given"] == ({"answer": prompt["answer"]} if "answer" in prompt else {})
        assert len(line["sequences"]) == prompt.get("parameters", {}).get("n", 2)
        for sequence in line["sequences"]:
            assert sequence["output_token_ids"] == DYE.continuation(line["prompt_token_ids"][-1], NEW)
            assert sequence["finish_reason"] == "length"
            assert sequence["weight_version"] == "0"
            assert len(sequence["logprobs"]) == NEW
            tokens = line["prompt_token_ids"] + sequence["output_token_ids"]
            (trace,) = log.find(sequence["trace"])
            np.testing.assert_array_equal(trace.experts_TLK, DYE.routes(tokens[:-1]))
            np.testing.assert_array_equal(trace.tokens, tokens)
    numbers = [line["number"] for line in lines]
    assert len(set(numbers)) == len(numbers)
    return sorted(numbers)


def test_all_prompts_once_and_nothing_again(capsys: Any, prompts: Path, url: str, dyed: Any) -> None:
    code, report, _ = run(capsys, prompts, url)
    assert code == 0
    rows = sum(len(line["prompt_token_ids"]) + NEW - 1 for line in responses(prompts) for _ in line["sequences"])
    facts = {"prompts": 40, "before": 0, "finished": 40, "failed": 0, "sequences": 81, "tokens": 81 * NEW, "rows": rows}
    assert report == facts | {"out": str(prompts.parent / "out")}
    assert finished(prompts) == list(range(40))
    generated = counting(dyed)
    code, report, _ = run(capsys, prompts, url)
    assert (code, report["before"], report["finished"]) == (0, 40, 0)
    assert generated() == 0


def responses(prompts: Path) -> list[dict[str, Any]]:
    text = (prompts.parent / "out" / "rollout.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def counting(dyed: Any) -> Callable[[], int]:
    """How many requests the engine gets from now on."""
    count, submit = 0, dyed[0].submit

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return submit(*args, **kwargs)

    dyed[0].submit = counted
    return lambda: count


def test_a_limit_can_be_lifted_and_what_is_asked_cannot_be_changed(capsys: Any, prompts: Path, url: str) -> None:
    assert run(capsys, prompts, url, "--limit", "7")[1]["finished"] == 7
    assert finished(prompts) == list(range(7))
    for options, name in ((["--top-k", "5"], "parameters"), (["--codec", "set"], "codec")):
        code, _, said = run(capsys, prompts, url, *options)
        assert code == 2
        assert f"{name} is not what the rollout" in said
    prompts.write_text(prompts.read_text() + " ")
    code, _, said = run(capsys, prompts, url)
    assert code == 2
    assert "prompts_sha256 is not what the rollout" in said
    prompts.write_text(prompts.read_text()[:-1])
    assert run(capsys, prompts, url)[1]["before"] == 7
    assert finished(prompts) == list(range(40))


def test_another_model_is_refused(capsys: Any, prompts: Path, url: str) -> None:
    assert run(capsys, prompts, url, "--limit", "1")[0] == 0
    path = prompts.parent / "out" / "settings.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["model"], "f00d"))
    code, _, said = run(capsys, prompts, url)
    assert code == 2
    assert "model is not what the rollout" in said


def test_prompts_that_fail_are_recorded_and_the_rest_goes_on(capsys: Any, prompts: Path, url: str) -> None:
    lines = prompts.read_text().splitlines()
    lines[5] = json.dumps({"inputs": "x" * 600, "id": "long"})
    lines[8] = json.dumps({"inputs": [1_000_000]})
    prompts.write_text("\n".join(lines))
    code, report, _ = run(capsys, prompts, url)
    assert (code, report["failed"], report["finished"]) == (1, 2, 38)
    errors = [json.loads(line) for line in (prompts.parent / "out" / "errors.jsonl").read_text().splitlines()]
    assert sorted((error["number"], error["id"], error["type"]) for error in errors) == [
        (5, "long", "RequestError"),
        (8, "8", "RequestError"),
    ]
    assert any("longer than the model's window" in error["message"] for error in errors)
    assert finished(prompts) == [number for number in range(40) if number not in (5, 8)]
    code, report, _ = run(capsys, prompts, url)  # they are tried again
    assert (code, report["failed"], report["finished"]) == (1, 2, 0)


def test_a_text_summary_and_codecs(capsys: Any, prompts: Path, url: str) -> None:
    arguments = command(prompts, url)[:-1]
    assert main([*arguments, "--codec", "bits+zstd", "--stop", '["zz"]']) == 0
    out = capsys.readouterr().out
    assert out.startswith("40 of 40 prompts are finished, 40 of them now: 81 sequences, 972 tokens,")
    assert finished(prompts) == list(range(40))


def spawn(prompts: Path, url: str, *options: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "moetrace", *command(prompts, url), *options]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(prompts: Path, count: int, process: subprocess.Popen[str]) -> None:
    path = prompts.parent / "out" / "rollout.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


def test_kill_9_and_again(capsys: Any, prompts: Path, url: str) -> None:
    for count in (3, 11, 23):
        process = spawn(prompts, url, "--concurrency", "3")
        wait_for(prompts, count, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    before = len(responses_of_whole_lines(prompts))
    assert before >= 23
    code, report, _ = run(capsys, prompts, url)
    assert code == 0
    assert report["before"] in (before, before + 1)  # one may have been on its way
    assert finished(prompts) == list(range(40))


def responses_of_whole_lines(prompts: Path) -> list[bytes]:
    return (prompts.parent / "out" / "rollout.jsonl").read_bytes().split(b"\n")[:-1]


def test_an_interrupt_ends_with_130_and_what_there_is(capsys: Any, dyed: Any, prompts: Path, url: str) -> None:
    process = spawn(prompts, url, "--concurrency", "2")
    wait_for(prompts, 5, process)
    dyed[0].pause()  # so that it cannot be done before it is interrupted
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        dyed[0].resume()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in err
    assert "Traceback" not in err
    assert 5 <= json.loads(out)["finished"] <= len(finished(prompts)) < 40
    assert run(capsys, prompts, url)[0] == 0
    assert finished(prompts) == list(range(40))


def test_a_server_that_dies_ends_the_run_and_one_that_comes_back_does_not(
    capsys: Any, prompts: Path, dyed: Any
) -> None:
    port = free_port()
    with serving(create_app(*dyed), port) as url:
        process = spawn(prompts, url, "--concurrency", "2", "--retries", "1")
        wait_for(prompts, 5, process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be reached" in err or "gave no whole answer" in err
    some = finished(prompts)
    assert 5 <= len(some) < 40
    with serving(create_app(*dyed), port) as url:
        process = spawn(prompts, url, "--concurrency", "2")
        wait_for(prompts, len(some) + 5, process)
    time.sleep(0.3)
    with serving(create_app(*dyed), port):
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["before"] == len(some)
    assert finished(prompts) == list(range(40))


def test_an_aborted_prompt_is_sent_again(capsys: Any, prompts: Path, url: str, dyed: Any) -> None:
    generated = counting(dyed)
    with Client(url) as client:
        client.pause()
        code: list[int] = []
        thread = threading.Thread(target=lambda: code.append(main([*command(prompts, url), "--limit", "4"])))
        thread.start()
        while generated() < 4:
            time.sleep(0.005)
        client.abort()
        while generated() < 8:
            time.sleep(0.005)
        client.resume()
        thread.join(30)
    assert code == [0]
    assert finished(prompts) == list(range(4))


def test_a_server_without_routes_and_one_without_a_key(capsys: Any, prompts: Path, dyed: Any, monkeypatch: Any) -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    with serving(create_app(engine)) as url:
        code, _, said = run(capsys, prompts, url)
        assert code == 2
        assert "the server does not record routes" in said
    engine.close()
    with serving(create_app(dyed[0], dyed[1], ServerConfig(api_key="secret"))) as url:
        code, _, said = run(capsys, prompts, url)
        assert code == 2
        assert "the API key is missing or wrong" in said
        monkeypatch.setenv("MOETRACE_API_KEY", "secret")
        assert run(capsys, prompts, url)[0] == 0
    assert finished(prompts) == list(range(40))
    code, _, said = run(capsys, prompts, url, "--concurrency", "0")
    assert code == 2
    assert "concurrency is out of range" in said


def test_a_file_where_the_folder_shall_be(capsys: Any, prompts: Path, url: str) -> None:
    code, _, said = run(capsys, prompts, url, "--out", str(prompts))
    assert code == 2
    assert said == f"moetrace: {prompts} cannot be used: got File exists. Name a folder, or a path where nothing is.\n"
