"""vLLM over HTTP: its token-in, token-out endpoint where it is served, else OpenAI completions with token ids."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.adapters.http import HttpSubject, field
from moetrace.conformance.suite.adapters.payloads import rows_of_vllm
from moetrace.conformance.suite.asking import Answer, Ask
from moetrace.errors import LackingError

_TOKENS, _TEXT = "/inference/v1/generate", "/v1/completions"


class VLLMSubject(HttpSubject):
    """A vLLM server that was started with `enable_return_routed_experts`."""

    dialect = "vllm"

    def __init__(self, client: Any, form: DyeForm) -> None:
        super().__init__(client, form)
        self._model, self._path = "", _TOKENS

    async def open(self) -> None:
        """`/version` and `/v1/models` tell; `/openapi.json` says which endpoint is there."""
        version, models = await self.get("/version") or {}, await self.get("/v1/models") or {}
        self.name = f"vLLM {version.get('version', 'of unknown version')}"
        model = (models.get("data") or [{}])[0]
        self._model, self.window = model.get("id", ""), model.get("max_model_len")
        described = await self.get("/openapi.json") or {}
        self._path = _TOKENS if _TOKENS in described.get("paths", {}) else _TEXT

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        if ask.stream:
            raise LackingError("vLLM streams no routes")
        if ask.max_new_tokens == 0:
            raise LackingError("vLLM generates at least one token")
        if ask.abort_after is not None:
            raise LackingError("vLLM's answer to an aborted request goes to nobody: the client must leave to abort it")
        sampling: dict[str, Any] = {
            "max_tokens": ask.max_new_tokens,
            "temperature": ask.temperature,
            "ignore_eos": ask.ignore_eos,
            "n": ask.n,
        }
        if self._path == _TEXT:
            if ask.start:
                raise LackingError(f"vLLM's {_TEXT} has no start offset", fix=f"Serve {_TOKENS}.")
            body = {"model": self._model, "prompt": list(ask.prompt), "return_token_ids": True, **sampling}
        else:
            if ask.start:
                sampling["routed_experts_prompt_start"] = ask.start
            body = {"request_id": uuid.uuid4().hex, "token_ids": list(ask.prompt), "sampling_params": sampling}
        response = await self.post(self._path, body)
        choices = sorted(field(response, self._path, "choices"), key=lambda choice: choice.get("index", 0))
        return [self._answer(ask, choice) for choice in choices]

    def _answer(self, ask: Ask, choice: Any) -> Answer:
        output, payload = tuple(field(choice, self._path, "token_ids")), choice.get("routed_experts")
        rows = None if payload is None else rows_of_vllm(payload, [*ask.prompt, *output], self.form, ask.start)
        return Answer(output, choice.get("finish_reason") or "", rows)
