"""The embedded engine under the suite: behind its own server on loopback, and in this process.

Its cache is small, so prefixes are evicted and requests preempted; its steps are small, so prompts come in chunks.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from moetrace.conformance.dye.checkpoint import write_dye
from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.dye.options import DyeOptions
from moetrace.conformance.suite import CASES, Bug, Plan, Report, check_engine, run_suite
from moetrace.conformance.suite.adapters.opening import open_subject
from moetrace.conformance.suite.run import load_forms
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.errors import CheckError
from moetrace.server import create_app

OPTIONS = DyeOptions(num_experts=32, top_k=4, num_layers=3, dense_first=1, vocab_size=1024, window=640, dtype="float32")
CONFIG = EngineConfig(
    enable_return_routed_experts=True, kv_cache_tokens=1280, page_size=16, max_batch_tokens=256, seed=0
)
PLAN = Plan(requests=32, in_flight=24, max_tokens=640, flood_tokens=2560, pressure=10, pressure_tokens=160)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    old, new = (tmp_path_factory.mktemp(f"dye{version}") for version in (0, 1))
    for version, folder in enumerate((old, new)):
        write_dye(folder, "qwen3_moe", replace(OPTIONS, weight_version=version))
    return old, new


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path]) -> Iterator[TransformersEngine]:
    engine = TransformersEngine.load(str(folders[0]), CONFIG)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def checked(
    url: str,
    folders: tuple[Path, Path],
    names: set[str] | None = None,
    client: httpx.AsyncClient | None = None,
    dialect: str = "auto",
) -> Report:
    form, newer = load_forms(*folders)
    cases = [case for case in CASES if names is None or case.name in names]

    async def run() -> Report:
        subject = await open_subject(url, form, dialect, client=client)
        try:
            return await run_suite(subject, form, PLAN, newer=newer, cases=cases)
        finally:
            await subject.close()

    return asyncio.run(run())


def test_the_server_passes(url: str, folders: tuple[Path, Path]) -> None:
    report = checked(url, folders)
    assert report.exit_code == 0, report.text()
    assert report.dialect == "moetrace"
    skipped = {check.name: check.reason for check in report.checks if check.status == "skipped"}
    assert set(skipped) == {"dtype edges"}
    assert sum(check.missing for check in report.checks) == 0


def test_the_server_passes_in_the_dialects_of_others(url: str, folders: tuple[Path, Path]) -> None:
    plain = {"length", "stop", "n > 1", "full prefix hit"}
    for path, dialect, names in (
        ("/sglang", "sglang", {"streamed", "start offset", "abort"}),
        ("", "lightllm", {"scoring"}),
    ):
        report = checked(url + path, folders, plain | names, None, dialect)
        assert report.exit_code == 0, report.text()
        assert {check.status for check in report.checks} == {"passed"}


def test_a_server_of_another_dye_is_not_tested(url: str, folders: tuple[Path, Path]) -> None:
    form = DyeForm.load(folders[0])
    for other, what in (
        (replace(form, architecture="mixtral"), "has another fingerprint"),
        (replace(form, top_k=6), "has another layout: expected {'layers': [1, 2], 'num_experts': 32, 'top_k': 6}"),
        (replace(form, digits=(27, 26)), "has another vocab_size: expected 702"),
    ):
        with pytest.raises(CheckError, match="the server does not serve this dye") as caught:
            asyncio.run(open_subject(url, other))
        assert what in str(caught.value)


def test_the_engine_passes_in_this_process(engine: TransformersEngine, folders: tuple[Path, Path]) -> None:
    names = {"length", "streamed", "n > 1", "abort", "full prefix hit", "weight update"}
    cases = [case for case in CASES if case.name in names]
    report = check_engine(engine, folders[0], plan=PLAN, update_dye=folders[1], cases=cases)
    assert report.exit_code == 0, report.text()
    assert {check.name for check in report.checks if check.status == "skipped"} == {"payloads"}
    assert engine.weight_version == "0"


Bend = Callable[[np.ndarray, list[int]], np.ndarray]


class BentTransport(httpx.AsyncHTTPTransport):
    """What the server sends, with the ids `[T, L, K]` of every payload bent on the way."""

    def __init__(self, bend: Bend) -> None:
        super().__init__()
        self._bend = bend

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.url.path != "/generate" or response.status_code != httpx.codes.OK:
            return response
        answer = json.loads(await response.aread())
        payloads, outputs = answer["routed_experts"], answer["output_token_ids"]
        many = isinstance(payloads, list)
        for payload, output in zip(payloads if many else [payloads], outputs if many else [outputs], strict=True):
            ids_LTK = np.frombuffer(base64.b64decode(payload["data"]), "<i4").reshape(payload["shape"])
            tokens = [*answer["prompt_token_ids"], *output]
            bent_LTK = np.ascontiguousarray(self._bend(ids_LTK.transpose(1, 0, 2).copy(), tokens).transpose(1, 0, 2))
            rows = bent_LTK.shape[1]
            payload |= {
                "shape": bent_LTK.shape,
                "data": base64.b64encode(bent_LTK.tobytes()).decode(),
                "valid": base64.b64encode(np.packbits(np.ones(rows, bool)).tobytes()).decode(),
            }
        return httpx.Response(200, json=answer)


def _zero_tail(ids_TLK: np.ndarray, tokens: list[int]) -> np.ndarray:
    ids_TLK[-1] = 0
    return ids_TLK


@pytest.mark.parametrize(
    ("bend", "bug"),
    [
        (lambda ids, tokens: np.concatenate([ids[:1], ids[:-1]]), Bug.SHIFTED),
        (lambda ids, tokens: ids[:-1], Bug.LAST_ROW),
        (lambda ids, tokens: ids[:, ::-1], Bug.LAYER_MAP),
        (lambda ids, tokens: np.sort(ids), Bug.RANK_LOST),
        (_zero_tail, Bug.ZEROS),
        (lambda ids, tokens: ids % 16, Bug.SHARD),
        (lambda ids, tokens: np.argsort(np.random.default_rng(1).permutation(32))[ids].astype("<i4"), Bug.PHYSICAL),
    ],
)
def test_a_server_whose_payloads_are_bent_is_convicted(
    bend: Bend, bug: Bug, url: str, folders: tuple[Path, Path]
) -> None:
    client = httpx.AsyncClient(base_url=url, transport=BentTransport(bend), timeout=None)
    report = checked(url, folders, {"length", "full prefix hit"}, client)
    assert report.exit_code == 1
    assert next(iter(report.bugs)) is bug, report.text()
