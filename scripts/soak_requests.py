"""What the soak sends, and what must come back: every token and every row against the closed form of the dye.

Axes: V vocabulary, T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from dye import Dye

from moetrace.dialects import from_lightllm, from_sglang
from moetrace.errors import MoetraceError
from moetrace.format import load
from moetrace.layout import MoeLayout
from moetrace.trace import RoutingTrace

WINDOW = 512
MAX_BODY_BYTES = 65_536
LONGEST_ANSWER = 180
"""Seconds after which an answer counts as lost."""

Body = dict[str, Any]


class SoakError(Exception):
    """The server did what it must not."""


@dataclass
class Ledger:
    """Every request and what became of it."""

    begun: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Whole answers by path and status, to be compared with the server's own count."""
    rows: int = 0
    missing: int = 0
    """Rows marked as missing, of sequences that were aborted before their prompt was computed."""
    tokens: int = 0
    traces: int = 0
    changed: int = 0
    """Traces whose rows are of more than one weight version."""
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0

    def fault(self, what: str) -> None:
        """Remember the first fifty, count them all."""
        self.num_faults += 1
        if len(self.faults) < 50:
            self.faults.append(what)

    @property
    def lost(self) -> int:
        """Requests without an end, and those whose end was no answer."""
        unanswered = sum(count for (_, outcome), count in self.ended.items() if outcome == "lost")
        return self.begun.total() - self.ended.total() + unanswered


class Closed:
    """The closed form of both weight versions."""

    def __init__(self, versions: dict[str, Dye]) -> None:
        self.dye = next(iter(versions.values()))
        every = list(range(self.dye.vocab))
        self.tables_VLK = {letter: dye.routes(every) for letter, dye in versions.items()}

    def check(
        self, ledger: Ledger, payload: Body, tokens: list[int], start: int, rows: int, computed: bool = True
    ) -> None:
        """A payload of routes: `rows` rows from `start` on, each as its weight version has it, and if all were
        computed, none missing."""
        try:
            trace = from_lightllm(payload, tokens) if "dtype" in payload else trace_in(payload["data"], tokens)
        except MoetraceError as error:
            raise SoakError(f"a payload that cannot be read: {error}") from error
        if (trace.start, trace.num_rows) != (start, rows) or (computed and trace.num_valid != rows):
            raise SoakError(
                f"rows {trace.start}+{trace.num_rows}, {trace.num_valid} valid; expected {start}+{rows}, all"
            )
        bounds = [span.start for span in trace.weight_spans] + [rows]
        if trace.num_valid and (not trace.weight_spans or bounds[0] != 0):
            raise SoakError(f"weight spans {trace.weight_spans} of {rows} rows")
        for span, first, last in zip(trace.weight_spans, bounds, bounds[1:], strict=False):
            own = tokens[start + first : start + last]
            right = (trace.experts_TLK[first:last] == self.tables_VLK[span.version[0]][own]).all(axis=(1, 2))
            wrong = trace.valid_T[first:last] & ~right
            if wrong.any():
                raise SoakError(
                    f"{wrong.sum()} of {rows} rows are wrong, first at {start + first + int(wrong.argmax())}"
                )
        ledger.missing += rows - trace.num_valid
        ledger.rows, ledger.traces = ledger.rows + rows, ledger.traces + 1
        ledger.changed += len(trace.weight_spans) > 1

    def check_sglang(self, ledger: Ledger, payload: str, tokens: list[int], start: int) -> None:
        """SGLang's payload of all rows from `start` on. It does not say which weights made a row: any may have."""
        layout = MoeLayout(self.dye.layers, self.dye.num_experts, self.dye.top_k)
        num_layers = self.dye.config.num_hidden_layers
        try:
            trace = from_sglang(payload, tokens, layout, num_layers, start=min(start, len(tokens) - 1))
        except MoetraceError as error:
            raise SoakError(f"a payload that cannot be read: {error}") from error
        own = tokens[start : start + trace.num_rows]
        right = [(trace.experts_TLK == table[own]).all(axis=(1, 2)) for table in self.tables_VLK.values()]
        if not (right[0] | right[1]).all():
            raise SoakError(f"{(~(right[0] | right[1])).sum()} of {trace.num_rows} rows are wrong")
        ledger.rows, ledger.traces = ledger.rows + trace.num_rows, ledger.traces + 1


def trace_in(data: str, tokens: list[int]) -> RoutingTrace:
    """The one trace of a container in base64, recorded on these tokens."""
    (trace,) = load(base64.b64decode(data, validate=True))
    trace.require_tokens(tokens, "those of the answer")
    return trace


class Client:
    """One client after another request. All of its requests are entered in the ledger."""

    def __init__(self, url: str, closed: Closed, ledger: Ledger, seed: int) -> None:
        self.url, self.closed, self.ledger, self.chance = url, closed, ledger, random.Random(seed)
        self.aborted_all_at = float("-inf")
        self.open()

    def open(self) -> None:
        """New connections."""
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=LONGEST_ANSWER, limits=limits)

    async def perform(self, kind: str, work: Callable[[], Awaitable[str]]) -> str:
        """One request of a kind, to its end, which is returned whatever it is."""
        self.ledger.begun[kind] += 1
        outcome = "fault"
        try:
            outcome = await asyncio.wait_for(work(), LONGEST_ANSWER)
        except (TimeoutError, httpx.HTTPError, OSError) as error:
            outcome = "lost"
            self.ledger.fault(f"{kind}: no answer ({error!r})")
        except SoakError as fault:
            self.ledger.fault(f"{kind}: {fault}")
        self.ledger.ended[kind, outcome] += 1
        return outcome

    async def ask(self, path: str, body: object, allowed: tuple[int, ...] = (200, 429), **headers: str) -> Any:
        """The JSON of an answer, or None for a 429 as it should be."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.http.post(path, json=body, headers=headers)
        return self.judge(path, response.status_code, response.headers, response.content, allowed)

    def judge(self, path: str, status: int, headers: Any, content: bytes, allowed: tuple[int, ...]) -> Any:
        """The JSON of an answer that may be as it is."""
        self.ledger.answered[path, status] += 1
        if status not in allowed:
            raise SoakError(f"status {status}, expected one of {allowed}: {content[:300]!r}")
        if status == 429 and "retry-after" not in headers:
            raise SoakError("a 429 without Retry-After")
        answer = json.loads(content)
        if status >= 400 and not {"type", "message"} <= set(answer["error"]):
            raise SoakError(f"an error of another form: {content[:300]!r}")
        return None if status == 429 else answer

    def prompt(self) -> tuple[list[int], str | list[int]]:
        """Token ids, and the same as it is sent. Many share a prefix."""
        length = self.chance.choice((1, 2, 7, 31, 32, 33, 64, 120, 200))
        if self.chance.random() < 0.4:
            text = "".join(self.chance.choices("abcdefgh XYZ", k=length))
            return list(text.encode()), text
        first = self.chance.choice((0, 0, 0, 40, 90)) if length > 20 else self.chance.randrange(self.closed.dye.vocab)
        tokens = [(first + i) % self.closed.dye.vocab for i in range(length)]
        tokens[-1] = self.chance.randrange(self.closed.dye.vocab)
        return tokens, tokens

    def parameters(self, prompt_length: int, most: int = 120) -> Body:
        """Random ones that are right."""
        chance = self.chance
        parameters: Body = {"max_new_tokens": chance.randint(1, most), "return_details": chance.random() < 0.3}
        parameters |= {"do_sample": True, "top_p": 0.9} if chance.random() < 0.5 else {}
        if chance.random() < 0.85:
            parameters |= {"return_routed_experts": True, "routed_experts_layout": chance.choice(("LTK", "TLK"))}
            parameters["routed_experts_dtype"] = chance.choice(("int32", "int16", "uint16", "uint8"))
            if chance.random() < 0.4:
                parameters["routed_experts_start"] = chance.randint(0, prompt_length)
        return parameters

    def check(self, prompt: list[int], parameters: Body, answer: Body, began: float, **known: Any) -> None:
        """All that an answer says of one prompt."""
        several = parameters.get("n", 1) > 1
        if answer["prompt_token_ids"] != prompt:
            raise SoakError("another prompt came back")
        for i in range(parameters.get("n", 1)):
            sequence = {k: answer.get(k) for k in ("output_token_ids", "finish_reason", "routed_experts")}
            self.check_sequence(
                prompt,
                parameters,
                {k: v[i] if several and v is not None else v for k, v in sequence.items()},
                began,
                **known,
            )

    def check_sequence(
        self, prompt: list[int], parameters: Body, sequence: Body, began: float, own_abort: bool = False, stops: int = 0
    ) -> None:
        """Tokens, end and rows of one sequence. `stops`: how many tokens there are if a stop sequence ends it."""
        output, reason = sequence["output_token_ids"], sequence["finish_reason"]
        asked = parameters["max_new_tokens"]
        if output != self.closed.dye.continuation(prompt[-1], len(output)):
            raise SoakError(f"{len(output)} tokens that the model does not say")
        due = {"length": asked, "stop": stops}.get(reason, len(output))
        if reason == "length" and stops:
            raise SoakError(f"a stop sequence after {stops} tokens was overlooked")
        if len(output) != due or len(output) > asked:
            raise SoakError(f"{len(output)} tokens and {reason!r}; expected {due}")
        if reason == "abort" and not own_abort and self.aborted_all_at < began:
            raise SoakError("it was aborted, and nobody had asked for that")
        self.ledger.tokens += len(output)
        if (sequence.get("routed_experts") is not None) != bool(parameters.get("return_routed_experts")):
            raise SoakError("routes that were asked for are missing, or others came")
        if parameters.get("return_routed_experts"):
            tokens, start = prompt + output, parameters.get("routed_experts_start", 0)
            total = len(tokens) - (1 if asked else 0)
            computed = reason != "abort" or len(output) > 0  # an abort may come before the prompt was computed
            start = start if computed else min(start, total)
            self.closed.check(self.ledger, sequence["routed_experts"], tokens, start, total - start, computed)

    @staticmethod
    def _axis(parameters: Body) -> int:
        return 0 if parameters.get("routed_experts_layout", "LTK") == "TLK" else 1

    def check_sglang(self, prompt: list[int], asked: int, start: int, answer: Body, began: float) -> None:
        """An answer in SGLang's dialect, which says nothing of its routes but one version for all."""
        output, meta = answer["output_ids"], answer["meta_info"]
        if output != self.closed.dye.continuation(prompt[-1], len(output)):
            raise SoakError(f"{len(output)} tokens that the model does not say")
        kind = meta["finish_reason"]["type"]
        if (kind, len(output)) != ("length", asked) and (kind != "abort" or self.aborted_all_at < began):
            raise SoakError(f"{len(output)} tokens of {asked} and {kind!r}")
        self.ledger.tokens += len(output)
        if kind == "abort" and meta["routed_experts"] is None:
            return
        self.closed.check_sglang(self.ledger, meta["routed_experts"], prompt + output, start)

    async def stream(self, body: Body, parameters: Body, prompt: list[int], leave_after: int | None = None) -> str:
        """A stream, to its end or left after so many events."""
        began, sequences = time.monotonic(), [list[Body]() for _ in range(parameters.get("n", 1))]
        async with self.http.stream("POST", "/generate_stream", json=body) as response:
            if response.status_code != 200:
                content = await response.aread()
                self.judge("/generate_stream", response.status_code, response.headers, content, (429,))
                return "429"
            async for line in response.aiter_lines():
                if line:
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        raise SoakError(f"the stream broke off: {event}")
                    sequences[event["index"]].append(event)
                if leave_after is not None and sum(map(len, sequences)) >= leave_after:
                    return "left"
        self.ledger.answered["/generate_stream", 200] += 1
        for events in sequences:
            self.check_events(prompt, parameters, events, began)
        return "200"

    def check_events(self, prompt: list[int], parameters: Body, events: list[Body], began: float) -> None:
        """The events of one sequence: each token once, deltas that join, and the end."""
        if not events or [event["finished"] for event in events] != [False] * (len(events) - 1) + [True]:
            raise SoakError(f"a stream of {len(events)} events does not end as it should")
        last, tokens = events[-1], list(prompt)
        sent = [event["token"]["id"] for event in events if event["token"] is not None]
        if sent != last["output_token_ids"]:
            raise SoakError("the tokens of the events are not those of the end")
        if not parameters.get("routed_experts_every"):
            return self.check_sequence(prompt, parameters, last, began)
        end = parameters.get("routed_experts_start", 0)
        for event in events:
            tokens += [event["token"]["id"]] if event["token"] is not None else []
            if "routed_experts" in event and not event["finished"]:
                rows = event["routed_experts"]["shape"][self._axis(parameters)]
                self.closed.check(self.ledger, event["routed_experts"], tokens, end, rows)
                end += rows
        rest = parameters | {"routed_experts_start": end}
        return self.check_sequence(prompt, rest, last, began)
