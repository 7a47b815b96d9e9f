"""Sound engines in other dialects as fake HTTP servers: they answer from the closed form, with their own encoders."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from moetrace.conformance.dye.form import DyeForm

Reply = Callable[[httpx.Request], httpx.Response]


def routes(form: DyeForm, tokens: list[int]) -> np.ndarray:
    """`[T, D, K]` over all decoder layers; dense ones hold zeros."""
    ids_TDK = np.zeros((len(tokens), form.num_layers, form.top_k), np.int64)
    for row, token in enumerate(tokens):
        for layer in form.layers:
            ids_TDK[row, layer] = form.route(token, layer)
    return ids_TDK


class FakeEngine:
    """What the fake servers share: generation."""

    def __init__(self, form: DyeForm) -> None:
        self.form, self.asked = form, 0
        self._random = np.random.default_rng(0)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://engine", transport=httpx.MockTransport(self.reply))

    def reply(self, request: httpx.Request) -> httpx.Response:
        raise NotImplementedError

    def output(self, prompt: list[int], count: int, hot: bool, ignore_eos: bool) -> tuple[list[int], str]:
        self.asked += 1
        if hot:
            return self._random.integers(0, self.form.vocab_size, count).tolist(), "length"
        tokens = self.form.continuation(prompt[-1], count)
        if not ignore_eos and self.form.eos_token_id in tokens:
            return tokens[: tokens.index(self.form.eos_token_id) + 1], "stop"
        return tokens, "length"


class FakeSGLang(FakeEngine):
    def reply(self, request: httpx.Request) -> httpx.Response:
        if request.url.path in ("/get_model_info", "/server_info"):
            return httpx.Response(200, json={"model_path": "dye", "version": "0.5.9"})
        if request.url.path == "/update_weights_from_disk":
            self.form = DyeForm.load(json.loads(request.content)["model_path"])
            return httpx.Response(200, json={"success": True})
        if request.url.path != "/generate":
            return httpx.Response(404)
        body = json.loads(request.content)
        sampling, prompt = body["sampling_params"], body["input_ids"]
        answers: list[dict[str, Any]] = []
        for _ in range(sampling.get("n", 1)):
            hot = sampling["temperature"] > 0
            output, reason = self.output(prompt, sampling["max_new_tokens"], hot, sampling["ignore_eos"])
            ids = routes(self.form, [*prompt, *output][:-1])[body.get("routed_experts_start_len", 0) :].astype("<i4")
            meta = {
                "finish_reason": {"type": reason},
                "completion_tokens": len(output),
                "routed_experts": base64.b64encode(ids.tobytes()).decode(),
            }
            answers.append({"output_ids": output, "meta_info": meta})
        if body.get("stream"):
            [last] = answers
            count = len(last["output_ids"])
            events = [
                {"output_ids": last["output_ids"][:some], "meta_info": {"completion_tokens": some}}
                for some in range(1, count)
            ]
            text = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, last])
            return httpx.Response(200, text=text + "data: [DONE]\n\n")
        return httpx.Response(200, json=answers if "n" in sampling else answers[0])


class FakeVLLM(FakeEngine):
    """Its stream brings all rows with the last tokens; an abort, here, finds its request ended."""

    def __init__(self, form: DyeForm, tokens_endpoint: bool) -> None:
        super().__init__(form)
        self._path = "/inference/v1/generate" if tokens_endpoint else "/v1/completions"
        self.names: list[str] = []
        self.aborted: list[str] = []

    def reply(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/version":
            return httpx.Response(200, json={"version": "0.26.0"})
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "dye", "owned_by": "vllm", "max_model_len": 2048}]})
        if path == "/openapi.json":
            return httpx.Response(200, json={"paths": {self._path: {}, "/abort_requests": {}}})
        if path == "/abort_requests":
            self.aborted += json.loads(request.content)["request_ids"]
            return httpx.Response(200)
        if path != self._path:
            return httpx.Response(404)
        body = json.loads(request.content)
        sampling, prompt = body.get("sampling_params", body), body.get("token_ids") or body["prompt"]
        self.names.append(body.get("request_id", ""))
        if sampling.get("routed_experts_prompt_start", 0) >= len(prompt):
            return httpx.Response(400, json={"error": {"message": "routed_experts_prompt_start must be below P"}})
        if not 0 <= sampling["temperature"] <= 2:
            return httpx.Response(400, json={"error": {"message": "temperature must be in [0, 2]"}})
        choices: list[dict[str, Any]] = []
        for index in range(sampling["n"]):
            hot = "allowed_token_ids" in sampling
            output, reason = self.output(prompt, sampling["max_tokens"], hot, sampling["ignore_eos"])
            ids = routes(self.form, [*prompt, *output][:-1])[sampling.get("routed_experts_prompt_start", 0) :]
            file = io.BytesIO()
            np.save(file, ids.astype(np.uint8))
            data = base64.b64encode(file.getvalue()).decode()
            choices.append({"index": index, "finish_reason": reason, "token_ids": output, "routed_experts": data})
        if body.get("stream"):
            [last] = choices
            first = {"index": 0, "token_ids": last["token_ids"][:-1], "finish_reason": None, "routed_experts": None}
            events = [first, last | {"token_ids": last["token_ids"][-1:]}]
            text = "".join(f"data: {json.dumps({'choices': [event]})}\n\n" for event in events)
            return httpx.Response(200, text=text + "data: [DONE]\n\n")
        return httpx.Response(200, json={"choices": choices[::-1]})


class FakeLightLLM(FakeEngine):
    """As first proposed: layer-major int32, MoE layers only; token ids in `tokens`."""

    def reply(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/get_model_name":
            return httpx.Response(200, json={"model_name": "dye"})
        if request.url.path != "/generate":
            return httpx.Response(404)
        body = json.loads(request.content)
        parameters, prompt = body["parameters"], body["inputs"]
        count = parameters["max_new_tokens"]
        if count < 1:
            return httpx.Response(417, json={"error": "max_new_tokens must be at least 1"})
        answers = []
        for _ in range(parameters.get("best_of", 1)):
            output, reason = self.output(prompt, count, parameters["do_sample"], parameters["ignore_eos"])
            ids = routes(self.form, [*prompt, *output][:-1])[:, list(self.form.layers)].transpose(1, 0, 2).astype("<i4")
            payload = {"shape": ids.shape, "dtype": "int32", "data": base64.b64encode(ids.tobytes()).decode()}
            answers.append((reason, [{"id": token} for token in output], payload))
        reasons, tokens, payloads = ([*each] if len(answers) > 1 else each[0] for each in zip(*answers, strict=True))
        return httpx.Response(200, json={"finish_reason": reasons, "tokens": tokens, "routed_experts": payloads})
