"""vLLM over HTTP: its token-in, token-out endpoint where it is served, else OpenAI completions with token ids."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.adapters.http import HttpSubject, field
from moetrace.conformance.suite.adapters.payloads import joined, rows_of_vllm
from moetrace.conformance.suite.asking import Answer, Ask, Rows
from moetrace.errors import CheckError, LackingError

TOKENS, TEXT = "/inference/v1/generate", "/v1/completions"
"""The endpoints that return routes and take token ids."""
_HOTTEST = 2.0
_STEP = 61
_ABORT = "/abort_requests"
_SECONDS_TO_ABORT = 0.5
"""An answer that is not streamed does not tell when its tokens are there."""


def sampling_of(ask: Ask, form: DyeForm) -> dict[str, Any]:
    """What vLLM's sampling parameters are called, over HTTP and in process.

    It takes no temperature above 2, at which samples of a dye would all be one. They part too where only some tokens
    are allowed: the next one is seldom among them, and the others are alike.
    """
    sampling: dict[str, Any] = {
        "max_tokens": ask.max_new_tokens,
        "temperature": min(ask.temperature, _HOTTEST),
        "ignore_eos": ask.ignore_eos,
        "n": ask.n,
    }
    if ask.temperature > _HOTTEST:
        sampling["allowed_token_ids"] = list(range(0, form.vocab_size - 1, _STEP))
    return sampling


class VLLMSubject(HttpSubject):
    """A vLLM server that was started with `enable_return_routed_experts`.

    Attributes:
        endpoint: which is asked: `TOKENS` where it is served, else `TEXT`.
    """

    dialect = "vllm"

    def __init__(self, client: Any, form: DyeForm) -> None:
        super().__init__(client, form)
        self._model, self._aborts, self.endpoint = "", False, TOKENS

    async def open(self) -> None:
        """`/version` and `/v1/models` tell; `/openapi.json` says which endpoints are there."""
        version, models = await self.get("/version") or {}, await self.get("/v1/models") or {}
        self.name = f"vLLM {version.get('version', 'of unknown version')}"
        model = (models.get("data") or [{}])[0]
        self._model, self.window = model.get("id", ""), model.get("max_model_len")
        paths = (await self.get("/openapi.json") or {}).get("paths", {})
        self.endpoint, self._aborts = TOKENS if TOKENS in paths else TEXT, _ABORT in paths

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        if ask.max_new_tokens == 0:
            raise LackingError("vLLM generates at least one token")
        sampling = sampling_of(ask, self.form)
        if self.endpoint == TEXT:
            for asked, what in (
                (ask.start, "has no start offset"),
                (ask.stream, "streams no routes"),
                (ask.abort_after is not None, "has no abort but that the client leaves, and then nobody is answered"),
            ):
                if asked:
                    raise LackingError(f"vLLM's {TEXT} {what}", fix=f"Serve {TOKENS}.")
            body = {"model": self._model, "prompt": list(ask.prompt), "return_token_ids": True, **sampling}
            return self._answers(ask, await self.post(TEXT, body))
        if ask.start:
            sampling["routed_experts_prompt_start"] = ask.start
        body = {"request_id": uuid.uuid4().hex, "token_ids": list(ask.prompt), "sampling_params": sampling}
        if ask.stream:
            return [await self._stream(ask, body)]
        if ask.abort_after is None:
            return self._answers(ask, await self.post(TOKENS, body))
        if not self._aborts:
            raise LackingError(f"this vLLM serves no {_ABORT}", fix="Start it with --tokens-only.")
        answer = asyncio.ensure_future(self.post(TOKENS, body))
        await asyncio.sleep(_SECONDS_TO_ABORT)
        await self.post(_ABORT, {"request_ids": [f"generate-tokens-{body['request_id']}"]})
        return self._answers(ask, await answer)

    async def _stream(self, ask: Ask, body: dict[str, Any]) -> Answer:
        output: list[int] = []
        payloads: list[tuple[int, Any]] = []
        reason = ""
        async for event in self.events(TOKENS, body | {"stream": True}):
            if "error" in event:
                raise CheckError("the stream ended with an error", got=event["error"])
            for choice in event.get("choices", []):
                output += choice.get("token_ids") or []
                reason = choice.get("finish_reason") or reason
                if choice.get("routed_experts") is not None:
                    payloads.append((len(output), choice["routed_experts"]))
        rows: list[Rows] = []
        for there, payload in payloads:  # vLLM 0.26 sends all of them at the end; a later piece starts where one ended
            start = ask.start + sum(len(piece.ids_TLK) for piece in rows)
            rows.append(rows_of_vllm(payload, [*ask.prompt, *output[:there]], self.form, start))
        return Answer(tuple(output), reason, joined(rows) if rows else None)

    def _answers(self, ask: Ask, response: Any) -> list[Answer]:
        choices = sorted(field(response, self.endpoint, "choices"), key=lambda choice: choice.get("index", 0))
        return [self._answer(ask, choice) for choice in choices]

    def _answer(self, ask: Ask, choice: Any) -> Answer:
        output, payload = tuple(field(choice, self.endpoint, "token_ids")), choice.get("routed_experts")
        rows = None if payload is None else rows_of_vllm(payload, [*ask.prompt, *output], self.form, ask.start)
        return Answer(output, choice.get("finish_reason") or "", rows)
