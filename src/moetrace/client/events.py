"""The events of a stream: from bytes to `StreamEvent`s, with the routes of each sequence joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moetrace.client.refusals import error_from
from moetrace.client.results import Completion, StreamEvent
from moetrace.client.wire import Asked, Said, completion_of, prompt_tokens_of, understanding
from moetrace.errors import ServerError


@dataclass
class _Sequence:
    """What came of one sequence so far."""

    tokens: list[int] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    payloads: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    """Routes, and how many output tokens there were when they came."""
    is_finished: bool = False


class Events:
    """Takes the response of `/generate_stream` as it comes."""

    def __init__(self, asked: Asked, request_id: str) -> None:
        self._asked, self._request_id = asked, request_id
        self._rest: list[bytes] = []
        self._sequences = [_Sequence() for _ in range(asked.n)]

    def feed(self, data: bytes) -> list[StreamEvent]:
        """The events that are whole now.

        Raises:
            MoetraceError: what the server said last; or an event that is not one of `/generate_stream`, whose routes
                are damaged or not those of its tokens.
        """
        if b"\n" not in data:  # the last event has all routes, and comes in very many pieces
            self._rest.append(data)
            return []
        *lines, rest = b"".join([*self._rest, data]).split(b"\n")
        self._rest = [rest]
        return [event for line in lines if line.startswith(b"data:") for event in self._events(line[5:])]

    def end(self) -> None:
        """Raise `ServerError` unless all sequences have ended."""
        running = [i for i, sequence in enumerate(self._sequences) if not sequence.is_finished]
        if running:
            raise ServerError("the stream ended before its sequences did", got=f"sequences {running} without an end")

    def _events(self, line: bytes) -> Iterator[StreamEvent]:
        with understanding("/generate_stream", line):
            event = json.loads(line)
            if "error" in event:
                raise error_from(event["error"])
            index, token = event.get("index", 0), event["token"]
            sequence = self._sequences[index]
            if token is not None:
                sequence.tokens.append(token["id"])
                sequence.texts.append(token["text"])
                sequence.logprobs.append(token["logprob"])
            if event.get("routed_experts") is not None:
                sequence.payloads.append((event["routed_experts"], len(sequence.tokens)))
            completion = self._completion(index, sequence, event) if event["finished"] else None
            said = token or {"id": None, "text": None, "logprob": None}
            yield StreamEvent(index, said["id"], said["text"], said["logprob"], completion)

    def _completion(self, index: int, sequence: _Sequence, event: dict[str, Any]) -> Completion:
        """The whole sequence, out of what came of it."""
        sequence.is_finished = True
        if event.get("output_token_ids", sequence.tokens) != sequence.tokens:
            raise ValueError("the last event names other tokens than came")
        said = Said(
            prompt=prompt_tokens_of(event, self._asked.prompts[0]),
            output=sequence.tokens,
            text=None if None in sequence.texts else "".join(map(str, sequence.texts)),
            logprobs=sequence.logprobs,
            prompt_logprobs=event.get("prompt_logprobs"),
            finish_reason=event["finish_reason"],
            weight_version=event.get("weight_version"),
            payloads=sequence.payloads,
        )
        return completion_of(said, 0, index, self._asked, self._request_id)
