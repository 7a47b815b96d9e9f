"""A stand-in of vLLM, as TRL uses it: the real one does not run on the machines of the tests.

Tokens and routes are those of a dye checkpoint. Requests and answers have vLLM's documented form: completions know
their token ids, their log-probabilities by token id, and `routed_experts`, uint8 `[T, D, K]` over all decoder layers,
of which the dense ones hold what means nothing; over HTTP that is the base64 of a `.npy` file.

Axes: T = P + O - 1 rows of a sequence, D decoder layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
from dye import Dye
from fastapi import FastAPI


def routed_experts(dye: Dye, tokens: list[int]) -> np.ndarray:
    """`[T, D, K]`, where dense layers hold 7."""
    ids_TDK = np.full((len(tokens) - 1, len(dye.layers) + 1, dye.top_k), 7, np.uint8)
    ids_TDK[:, list(dye.layers)] = dye.routes(tokens[:-1])
    return ids_TDK


class FakeLLM:
    """`vllm.LLM` in TRL's process."""

    dye: Dye
    asked: list[dict[str, Any]]
    """What each one was started with."""

    def __init__(self, **options: Any) -> None:
        self.asked.append(options)
        self.returns_routes = options.get("enable_return_routed_experts", False)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(
                driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=list)))
            )
        )

    def generate(self, prompts: list[dict], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        return [self._request(prompt["prompt_token_ids"], sampling_params.max_tokens) for prompt in prompts]

    def reset_prefix_cache(self) -> None:
        pass

    def _request(self, prompt: list[int], count: int) -> Any:
        tokens = self.dye.continuation(prompt[-1], count)
        completion = SimpleNamespace(
            token_ids=tokens,
            logprobs=[{token: SimpleNamespace(logprob=-0.25, rank=1)} for token in tokens],
            routed_experts=routed_experts(self.dye, prompt + tokens) if self.returns_routes else None,
        )
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[completion])


def fake_server(dye: Dye, *, returns_routes: bool = True) -> FastAPI:
    """What `vllm serve --enable-return-routed-experts` answers to TRL's client."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict:
        return {}

    @app.get("/v1/models")
    def models() -> dict:
        return {"data": [{"id": "dye"}]}

    @app.get("/server_info")
    def server_info() -> dict:
        return {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}

    @app.post("/reset_prefix_cache")
    def reset_prefix_cache() -> dict:
        return {"success": True}

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> dict:
        choices = [choice(prompt, body["max_tokens"]) for prompt in body["prompt"] for _ in range(body["n"])]
        return {"choices": choices}

    def choice(prompt: list[int], count: int) -> dict[str, Any]:
        tokens = dye.continuation(prompt[-1], count)
        names = [f"token_id:{token}" for token in tokens]
        file = io.BytesIO()
        np.save(file, routed_experts(dye, prompt + tokens))
        return {
            "prompt_token_ids": prompt,
            "token_ids": tokens,
            "logprobs": {
                "tokens": names,
                "token_logprobs": [-0.25] * count,
                "top_logprobs": [{name: -0.25} for name in names],
            },
            "routed_experts": base64.b64encode(file.getvalue()).decode() if returns_routes else None,
        }

    return app
