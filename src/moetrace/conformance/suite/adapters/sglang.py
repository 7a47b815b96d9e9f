"""SGLang's `/generate`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from moetrace.conformance.suite.adapters.http import HttpSubject, field
from moetrace.conformance.suite.adapters.payloads import rows_of_sglang
from moetrace.conformance.suite.asking import Answer, Ask
from moetrace.errors import CheckError, LackingError

_PATH = "/generate"


class SGLangSubject(HttpSubject):
    """An SGLang server."""

    dialect = "sglang"

    async def open(self) -> None:
        """`/server_info` has the version."""
        info = await self.get("/server_info") or await self.get("/get_server_info") or {}
        self.name = f"SGLang {info.get('version', 'of unknown version')}"
        self.window = info.get("context_length")

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        if ask.max_new_tokens == 0:
            raise LackingError("by SGLang's contract a scored prompt has P - 1 rows: the last one has no place")
        body: dict[str, Any] = {
            "input_ids": list(ask.prompt),
            "sampling_params": {
                "max_new_tokens": ask.max_new_tokens,
                "temperature": ask.temperature,
                "ignore_eos": ask.ignore_eos,
                **({"n": ask.n} if ask.n > 1 else {}),
            },
            "return_routed_experts": True,
        }
        if ask.start:
            body["routed_experts_start_len"] = ask.start
        if ask.stream or ask.abort_after is not None:
            return [await self._stream(ask, body)]
        response = await self.post(_PATH, body)
        return [self._answer(ask, one) for one in (response if isinstance(response, list) else [response])]

    def _answer(self, ask: Ask, response: Any) -> Answer:
        meta = field(response, _PATH, "meta_info")
        output = tuple(field(response, _PATH, "output_ids"))
        reason, payload = meta.get("finish_reason") or {}, meta.get("routed_experts")
        rows = None
        if payload is not None:
            rows = rows_of_sglang(payload, [*ask.prompt, *output], self.form, ask.start)
        return Answer(output, reason.get("type", "") if isinstance(reason, dict) else str(reason), rows)

    async def _stream(self, ask: Ask, body: dict[str, Any]) -> Answer:
        """The last event has the routes; its tokens are all, or the last ones only, by the server's settings."""
        name, last, told = uuid.uuid4().hex, None, False
        tokens: list[int] = []
        async for event in self.events(_PATH, body | {"stream": True, "rid": name}):
            if "error" in event:
                raise CheckError("the stream ended with an error", got=event["error"])
            ids, count = event.get("output_ids") or [], (event.get("meta_info") or {}).get("completion_tokens")
            tokens = list(ids) if count is None or len(ids) == count else [*tokens, *ids]
            last = event
            if ask.abort_after is not None and len(tokens) >= ask.abort_after and not told:
                await self.post("/abort_request", {"rid": name})
                told = True
        return self._answer(ask, field({"last": last} if last else {}, _PATH, "last") | {"output_ids": tokens})

    async def update_weights(self, folder: str, version: str) -> None:
        """See `Subject`."""
        response = await self.post("/update_weights_from_disk", {"model_path": folder, "weight_version": version})
        if not response.get("success"):
            raise CheckError("the update of weights failed", got=response.get("message"))
