"""LightLLM's `/generate`, and moetrace's own server, which speaks it and more."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from moetrace.conformance.suite.adapters.http import HttpSubject, field
from moetrace.conformance.suite.adapters.payloads import joined, rows_of_lightllm
from moetrace.conformance.suite.asking import Answer, Ask, Rows
from moetrace.errors import CheckError, LackingError

_EVERY = 5
"""Tokens after which a stream brings rows."""


class LightLLMSubject(HttpSubject):
    """A LightLLM server, through what its documentation promises."""

    dialect = "lightllm"

    async def open(self) -> None:
        """It tells the model's name only."""
        self.name = "LightLLM"

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        for asked, what in (
            (ask.start, "has no start offset"),
            (ask.stream, "streams no routes"),
            (ask.abort_after is not None, "aborts no request through its public API"),
        ):
            if asked:
                raise LackingError(f"LightLLM {what}")
        return self._answers(ask, await self.post("/generate", self._body(ask)))

    def _body(self, ask: Ask) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_new_tokens": ask.max_new_tokens,
            "ignore_eos": ask.ignore_eos,
            "do_sample": ask.temperature > 0,
            "return_details": True,
            "return_routed_experts": True,
        }
        if ask.temperature > 0:
            parameters["temperature"] = ask.temperature
        if ask.n > 1:
            parameters |= {"n": ask.n, "best_of": ask.n}
        return {"inputs": list(ask.prompt), "parameters": parameters}

    def _answers(self, ask: Ask, response: dict[str, Any]) -> list[Answer]:
        many = ask.n > 1
        reasons, payloads = field(response, "/generate", "finish_reason"), response.get("routed_experts")
        outputs = response.get("output_token_ids")
        if outputs is None:
            details = field(response, "/generate", "tokens")
            outputs = [[token["id"] for token in one] for one in (details if many else [details])]
            outputs = outputs if many else outputs[0]
        if not many:
            reasons, payloads, outputs = [reasons], [payloads], [outputs]
        elif not isinstance(payloads, list):  # one for all samples: whose it is, the judge will see
            payloads = [payloads] * len(outputs)
        if not len(reasons) == len(payloads) == len(outputs):
            raise CheckError(
                "the answer has lists of different lengths",
                expected=f"{len(outputs)} sequences",
                got=f"{len(reasons)} reasons, {len(payloads)} payloads",
            )
        return [
            Answer(tuple(output), reason, self._rows(ask, output, payload))
            for output, reason, payload in zip(outputs, reasons, payloads, strict=True)
        ]

    def _rows(self, ask: Ask, output: Sequence[int], payload: Any) -> Rows | None:
        return None if payload is None else rows_of_lightllm(payload, [*ask.prompt, *output], self.form)


class MoetraceSubject(LightLLMSubject):
    """moetrace's server: LightLLM's contract, and start offsets, streams with routes, aborts, new weights."""

    dialect = "moetrace"

    async def open(self) -> None:
        """`/model` tells, and must tell of this dye."""
        model = await self.get("/model") or {}
        form = self.form
        layout = {"layers": list(form.layers), "num_experts": form.num_experts, "top_k": form.top_k}
        facts = {"vocab_size": form.vocab_size, "layout": layout, "fingerprint": form.fingerprint}
        for name, right in facts.items():
            if model.get(name) not in (None, right):
                raise CheckError(
                    f"the server does not serve this dye ({form.words}): its model has another {name}",
                    expected=right,
                    got=model[name],
                    fix="Serve the folder that --dye names.",
                )
        self.name, self.window = f"moetrace, {model.get('engine')}", model.get("window")

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        if ask.stream or ask.abort_after is not None:
            return [await self._stream(ask)]
        return self._answers(ask, await self.post("/generate", self._body(ask)))

    def _body(self, ask: Ask) -> dict[str, Any]:
        body = super()._body(ask)
        if ask.start:
            body["parameters"]["routed_experts_start"] = ask.start
        if ask.stream:
            body["parameters"]["routed_experts_every"] = _EVERY
        return body

    async def _stream(self, ask: Ask) -> Answer:
        name, count, last = uuid.uuid4().hex, 0, None
        pieces: list[tuple[int, Any]] = []
        async for event in self.events("/generate_stream", self._body(ask), {"X-Request-Id": name}):
            if "error" in event:
                raise CheckError("the stream ended with an error", got=event["error"])
            count += event.get("token") is not None
            if event.get("routed_experts") is not None:
                pieces.append((count, event["routed_experts"]))
            if count == ask.abort_after and not event.get("finished"):
                await self.post("/abort", {"request_ids": [name]})
            last = event if event.get("finished") else last
        output = field(last, "/generate_stream", "output_token_ids")
        # A piece was made when there were so many tokens, and says so by its hash.
        rows = [rows_of_lightllm(piece, [*ask.prompt, *output[:there]], self.form) for there, piece in pieces]
        return Answer(tuple(output), field(last, "/generate_stream", "finish_reason"), joined(rows) if rows else None)

    async def update_weights(self, folder: str, version: str) -> None:
        """See `Subject`."""
        await self.post("/update_weights", {"path": folder, "version": version})
