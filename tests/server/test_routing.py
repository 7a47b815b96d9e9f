"""Routes by codec and by reference, traces over HTTP, and capture stopped and started by clients."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from dye import Dye
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from moetrace import codecs, load
from moetrace.engines.config import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import ServerConfig, create_app, generation
from moetrace.server.schemas import Codec
from moetrace.stores import resolve
from moetrace.trace import RoutingTrace

DYE = Dye()


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, weight_version="7"))
    yield engine
    engine.close()


def client_of(engine: TransformersEngine, **knobs: Any) -> TestClient:
    return TestClient(create_app(engine, config=ServerConfig(**knobs)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(engine: TransformersEngine) -> TestClient:
    return client_of(engine)


def body_of(inputs: object, routes: object = "reference", **parameters: object) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"max_new_tokens": 10, "return_routed_experts": routes, **parameters}}


def generate(client: TestClient, inputs: object, routes: object = "reference", **parameters: object) -> Any:
    response = client.post("/generate", json=body_of(inputs, routes, **parameters))
    assert response.status_code == 200, response.text
    return response.json()


def fetch(client: TestClient, payload: dict[str, Any]) -> RoutingTrace:
    response = client.get(payload["reference"]["path"])
    assert response.status_code == 200, response.text
    assert len(response.content) == payload["reference"]["num_bytes"]
    (trace,) = load(response.content)
    return trace


def assert_rows(trace: RoutingTrace, tokens: list[int], start: int = 0) -> None:
    """The rows from `start` on are the closed form's."""
    assert (trace.start, trace.stop) == (start, len(tokens) - 1)
    assert trace.valid_T.all()
    expected_TLK = DYE.routes(tokens[:-1])[start:]
    if trace.order == "set":
        expected_TLK = np.sort(expected_TLK)
    np.testing.assert_array_equal(trace.experts_TLK, expected_TLK)
    trace.require_tokens(tokens, "the response's")


def tokens_of(response: dict[str, Any]) -> list[int]:
    return response["prompt_token_ids"] + response["output_token_ids"]


def test_a_reference_leads_to_the_rows_and_says_what_they_are(client: TestClient) -> None:
    before = time.time()
    response = generate(client, [3, 4, 5])
    payload = response["routed_experts"]
    reference = payload.pop("reference")
    trace = fetch(client, {"reference": reference})
    assert_rows(trace, tokens_of(response))
    assert before + 3600 <= reference.pop("expires_at") <= time.time() + 3600
    assert reference == {
        "id": reference["sha256"],
        "path": f"/routing/traces/{reference['sha256']}",
        "num_bytes": reference["num_bytes"],
        "codec": "bits",
        "sha256": reference["sha256"],
    }
    assert payload == {
        "shape": [12, 3, 4],
        "layout": "TLK",
        "layers": [1, 2, 3],
        "num_experts": 32,
        "order": "rank",
        "start": 0,
        "num_valid": 12,
        "valid": base64.b64encode(b"\xff\xf0").decode(),
        "token_sha256": trace.token_sha256,
        "weight_spans": [{"start": 0, "version": "7"}],
        "fingerprint": trace.fingerprint,
        "engine": trace.engine,
    }


@pytest.mark.parametrize("codec", get_args(Codec))
def test_every_codec_brings_the_rows_in_the_response_and_by_reference(client: TestClient, codec: str) -> None:
    response = generate(client, [3, 4, 5], True, routed_experts_codec=codec, routed_experts_start=2)
    payload = response["routed_experts"]
    (trace,) = load(base64.b64decode(payload["data"]))
    assert_rows(trace, tokens_of(response), start=2)
    assert (payload["format"], payload["layout"], payload["shape"], payload["start"]) == (
        "moetrace",
        "TLK",
        [10, 3, 4],
        2,
    )
    resolved = {"auto": "bits", "auto+zstd": "raw+zstd"}.get(codec, codec)
    assert payload["codec"] == resolved
    assert payload["order"] == trace.order == ("set" if codec.startswith("set") else "rank")
    assert "dtype" not in payload
    by_reference = generate(client, [3, 4, 5], routed_experts_codec=codec, routed_experts_start=2)["routed_experts"]
    assert by_reference["reference"]["codec"] == resolved
    assert by_reference["order"] == trace.order
    assert fetch(client, by_reference) == trace


def test_the_names_of_codecs_are_the_librarys() -> None:
    assert set(get_args(Codec)) == {*codecs.NAMES, codecs.AUTO, f"{codecs.AUTO}+zstd"}


def test_each_sequence_of_each_prompt_has_a_reference(client: TestClient) -> None:
    for response in generate(client, [[1, 2], [9]], n=2):
        for tokens, payload in zip(response["output_token_ids"], response["routed_experts"], strict=True):
            assert_rows(fetch(client, payload), response["prompt_token_ids"] + tokens)


def test_a_stream_ends_with_a_reference(client: TestClient) -> None:
    *_, last = stream(client, body_of([3, 4, 5]))
    assert_rows(fetch(client, last["routed_experts"]), tokens_of(last))


@pytest.mark.parametrize("routes", [True, "reference"])
def test_deltas_of_a_stream_may_be_containers(client: TestClient, routes: object) -> None:
    body = body_of([3, 4, 5], routes, max_new_tokens=60, routed_experts_every=10, routed_experts_codec="bits")
    events = stream(client, body)
    payloads = [event["routed_experts"] for event in events if "routed_experts" in event]
    assert len(payloads) > 1
    whole = None
    for payload in payloads:
        part = fetch(client, payload) if routes == "reference" else load(base64.b64decode(payload["data"]))[0]
        assert part.start == payload["start"]
        whole = part if whole is None else whole.concat(part)
    assert whole is not None
    assert_rows(whole, tokens_of(events[-1]))


def stream(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post("/generate_stream", json=body)
    assert response.status_code == 200, response.text
    return [json.loads(event.removeprefix(b"data:")) for event in response.content.split(b"\n\n")[:-1]]


@pytest.mark.parametrize(
    ("routes", "parameters", "words"),
    [
        (True, {"routed_experts_codec": "bits", "routed_experts_dtype": "uint8"}, "routed_experts_dtype"),
        (True, {"routed_experts_codec": "bits", "routed_experts_layout": "LTK"}, "routed_experts_layout"),
        ("reference", {"routed_experts_dtype": "int32"}, "routed_experts_dtype"),
        (False, {"routed_experts_codec": "bits"}, "not asked for"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_what_contradicts_is_refused(
    client: TestClient, path: str, routes: object, parameters: Any, words: str
) -> None:
    response = client.post(path, json=body_of([1], routes, **parameters))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_the_order_that_a_container_has_may_be_asked_for(client: TestClient) -> None:
    assert generate(client, [1], routed_experts_layout="TLK")["routed_experts"]["layout"] == "TLK"


@pytest.mark.parametrize("parameters", [{"routed_experts_codec": "zip"}, {"return_routed_experts": "ref"}])
def test_what_is_unknown_is_refused(client: TestClient, parameters: dict[str, Any]) -> None:
    response = client.post(
        "/generate", json={"inputs": [1], "parameters": {"return_routed_experts": True, **parameters}}
    )
    assert response.status_code == 422
    assert next(iter(parameters)) in response.json()["error"]["message"]


def test_a_codec_that_is_not_there_is_refused_before_anything_is_generated(client, engine, monkeypatch) -> None:
    monkeypatch.setattr(generation.zstd, "available", lambda: False)
    before = engine.capture.sequences
    response = client.post("/generate", json=body_of([1], routed_experts_codec="bits+zstd"))
    assert (response.status_code, "moetrace[zstd]" in response.text) == (400, True)
    assert engine.capture.sequences == before


def test_more_than_is_ever_kept_is_refused_before_anything_is_generated(engine) -> None:
    client, before = client_of(engine, archive_bytes=1 << 16), engine.capture.sequences
    response = client.post("/generate", json=body_of([1]))
    assert (response.status_code, response.json()["error"]["type"]) == (400, "QuotaError")
    assert engine.capture.sequences == before
    assert generate(client, [1], True)["routed_experts"]["num_valid"] == 10


def test_a_failing_store_is_the_servers_fault_and_said(engine, monkeypatch) -> None:
    client = client_of(engine)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(client.app.state.archive._store, "write", fail)  # type: ignore[attr-defined]
    response = client.post("/generate", json=body_of([1]))
    assert (response.status_code, response.json()["error"]["type"]) == (503, "ArchiveError")
    assert client.get("/routing").json()["archive"]["num_bytes"] == 0


@pytest.fixture(scope="module")
def kept(client: TestClient) -> tuple[str, bytes]:
    """The path of a trace, and its bytes."""
    path = generate(client, [40, 41, 42], max_new_tokens=50)["routed_experts"]["reference"]["path"]
    return path, client.get(path).content


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-99", slice(0, 100)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=0-0", slice(0, 1)),
        ("Bytes=5-5", slice(5, 6)),
        ("bytes=10-99999999", slice(10, None)),
        ("bytes=-99999999", slice(0, None)),
        (f"bytes=10-{'9' * 90}", slice(10, None)),
    ],
)
def test_one_range_is_one_part(client: TestClient, kept: tuple[str, bytes], asked: str, part: slice) -> None:
    path, data = kept
    response = client.get(path, headers={"Range": asked})
    expected = data[part]
    first = len(data) - len(expected) if part.stop is None else part.start
    assert response.status_code == 206
    assert response.content == expected
    assert response.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(data)}"
    assert response.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize(
    "asked",
    ["", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=9-3", "rows=0-1", "bytes=0-1,5-6", f"bytes={'9' * 5000}-"],
)
def test_what_is_no_single_range_brings_the_whole(client: TestClient, kept: tuple[str, bytes], asked: str) -> None:
    path, data = kept
    response = client.get(path, headers={"Range": asked})
    assert (response.status_code, response.content) == (200, data)
    assert "content-range" not in response.headers


@pytest.mark.parametrize("first", ["{}-", "{}-999999", "-0"])
def test_a_range_after_the_end_is_told_how_much_there_is(client: TestClient, kept, first: str) -> None:
    path, data = kept
    response = client.get(path, headers={"Range": f"bytes={first.format(len(data))}"})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(data)}"
    assert response.json()["error"]["type"] == "RequestError"


def test_a_head_has_the_length_and_no_range(client: TestClient, kept: tuple[str, bytes]) -> None:
    path, data = kept
    for headers in ({}, {"Range": "bytes=0-1"}):
        response = client.head(path, headers=headers)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str(len(data))
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.headers["accept-ranges"] == "bytes"
        assert response.headers["etag"] == f'"{path.rsplit("/", 1)[1]}"'
    assert client.head("/routing/traces/" + "0" * 64).status_code == 404


def test_what_a_client_has_is_not_sent_again(client: TestClient, kept: tuple[str, bytes]) -> None:
    path, data = kept
    etag = client.get(path).headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        for call in (client.get, client.head):
            response = call(path, headers={"If-None-Match": known, "Range": "bytes=99999999-"})
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == data
    for condition, status in ((etag, 206), ('"other"', 200), (f"W/{etag}", 200)):
        assert client.get(path, headers={"If-Range": condition, "Range": "bytes=0-1"}).status_code == status


@pytest.mark.parametrize("name", ["0" * 64, "x", "..%2f..%2fetc", "%00", "é"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_is_not_there_is_a_404(client: TestClient, method: str, name: str) -> None:
    response = client.request(method, f"/routing/traces/{name}")
    assert response.status_code == 404
    assert "error" in response.json()


def test_deleted_by_all_who_were_given_it_a_trace_is_gone(client: TestClient) -> None:
    first, second = (generate(client, [77, 3], max_new_tokens=4)["routed_experts"]["reference"] for _ in range(2))
    assert first["id"] == second["id"]
    path = first["path"]
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 200
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == client.delete(path).status_code == 404


def test_a_directory_serves_references_of_the_server_before(engine, tmp_path) -> None:
    response = generate(client_of(engine, archive=str(tmp_path)), [5, 6])
    payload = response["routed_experts"]
    trace = fetch(client_of(engine, archive=str(tmp_path)), payload)
    assert_rows(trace, tokens_of(response))
    digest = payload["reference"]["id"]
    assert resolve(f"{(tmp_path / digest).as_uri()}.safetensors#{digest}") == [trace]


def test_reading_leaves_no_file_open(engine, tmp_path) -> None:
    client = client_of(engine, archive=str(tmp_path))
    path = generate(client, [5, 6])["routed_experts"]["reference"]["path"]
    before = len(list(Path("/proc/self/fd").iterdir()))
    headers: list[dict[str, str]] = [{}, {"Range": "bytes=0-9"}, {"Range": "bytes=99999-"}, {"If-None-Match": "*"}]
    for each in headers * 5:
        client.get(path, headers=each)
        client.head(path, headers=each)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_key_guards_traces_and_control(engine) -> None:
    client = client_of(engine, api_key="secret")
    for method, path in (("GET", "/routing"), ("POST", "/routing/stop"), ("GET", "/routing/traces/x")):
        assert client.request(method, path).status_code == 401
    assert engine.capture.is_on


def test_capture_stops_and_starts_and_says_where_it_stands(engine, client: TestClient) -> None:
    generate(client, [1, 2, 3])
    try:
        for _ in range(2):
            assert client.post("/routing/stop").json() == {"state": "off"}
        assert client.get("/routing").json()["state"] == "off"
        for path in ("/generate", "/generate_stream"):
            refused = client.post(path, json=body_of([1, 2, 3]))
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "CaptureOffError")
            assert "/routing/start" in refused.json()["error"]["fix"]
        assert generate(client, [1, 2, 3], False)["output_token_ids"] == DYE.continuation(3, 10)
        assert metric(client, "moetrace_capture_on") == 0
    finally:
        assert client.post("/routing/start").json() == {"state": "on"}
    response = generate(client, [1, 2, 3])
    assert_rows(fetch(client, response["routed_experts"]), tokens_of(response))
    assert metric(client, "moetrace_capture_on") == 1


def test_a_request_under_way_at_the_stop_says_which_rows_are_missing(engine, client: TestClient) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, client, [1, 2, 3], max_new_tokens=400)
        while not engine._delivery.pending:
            assert not running.done()
        time.sleep(0.1)
        try:
            assert client.post("/routing/stop").status_code == 200
            assert not running.done()
            response = running.result(60)
        finally:
            client.post("/routing/start")
    payload = response["routed_experts"]
    trace = fetch(client, payload)
    assert 0 < payload["num_valid"] == trace.num_valid < trace.num_rows == 402
    assert trace.valid_T[: trace.num_valid].all()
    np.testing.assert_array_equal(
        trace.experts_TLK[: trace.num_valid], DYE.routes(tokens_of(response))[: trace.num_valid]
    )


def test_routing_says_what_there_is(engine) -> None:
    client = client_of(engine, archive_bytes=1 << 20, archive_seconds=0)
    before = client.get("/routing").json()
    path = generate(client, [8, 9])["routed_experts"]["reference"]["path"]
    facts = client.get("/routing").json()
    assert facts["state"] == "on"
    assert facts["layout"] == {"layers": [1, 2, 3], "num_experts": 32, "top_k": 4}
    assert facts["capacity"] == {"rows": engine.capture.capacity_rows, "bytes": engine.capture.capacity_bytes}
    assert facts["capacity"]["bytes"] > facts["capacity"]["rows"] * (12 + 8) > 0
    assert facts["captured"]["sequences"] == before["captured"]["sequences"] + 1
    assert facts["captured"]["rows"] == before["captured"]["rows"] + 11
    size = len(client.get(path).content)
    assert facts["archive"] == {
        "traces": 1,
        "num_bytes": size,
        "max_bytes": 1 << 20,
        "max_seconds": None,
        "deleted": 0,
        "expired": 0,
        "evicted": 0,
        "unfetched": 0,
    }
    assert metric(client, "moetrace_archive_bytes") == size
    assert metric(client, "moetrace_archive_traces") == 1
    client.delete(path)
    assert metric(client, "moetrace_archive_deleted_total") == 1
    assert metric(client, "moetrace_capture_errors_total") == 0


def test_evictions_show(engine) -> None:
    client = client_of(engine, archive_bytes=(1 << 16) + 2000)
    for first in range(90):
        generate(client, [first, 1], routed_experts_codec="raw")
    facts = client.get("/routing").json()["archive"]
    assert facts["num_bytes"] <= facts["max_bytes"]
    assert metric(client, "moetrace_archive_evicted_total") == facts["evicted"] == facts["unfetched"] > 0


def test_without_the_flag_there_is_nothing_to_control() -> None:
    engine = TransformersEngine(DYE.model(), EngineConfig())
    try:
        client = client_of(engine)
        facts = client.get("/routing").json()
        assert (facts["state"], facts["layout"], facts["capacity"], facts["captured"]) == ("never", None, None, None)
        for path in ("/routing/start", "/routing/stop"):
            refused = client.post(path)
            assert refused.status_code == 400
            assert refused.json()["error"]["type"] == "CaptureOffError"
            assert "moetrace serve MODEL --enable-return-routed-experts" in refused.json()["error"]["fix"]
        assert b"moetrace_capture_on" not in client.get("/metrics").content
    finally:
        engine.close()


def metric(client: TestClient, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return next(sample.value for family in families for sample in family.samples if sample.name == name)
