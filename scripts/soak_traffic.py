"""The soak's traffic: kinds of requests by weight, and those who disturb them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from soak_requests import MAX_BODY_BYTES, WINDOW, Body, Client, SoakError

BURST = 120
"""Requests at once, more than the server takes."""
TOKENIZER_KEEPS = 10_000
"""Words whose tokens tokenizers 0.23 remembers on each of the server's two threads; it forgets none, and takes no
more."""

MALFORMED: list[tuple[bytes, str, tuple[int, ...]]] = [
    (b"{", "application/json", (422,)),
    (b"", "application/json", (422,)),
    (b"[]", "application/json", (422,)),
    (b'{"inputs": "\xff\xfe"}', "application/json", (422,)),
    (b'{"inputs": "\\ud800"}', "application/json", (400,)),
    (b'{"inputs": 3}', "application/json", (422,)),
    (b'{"inputs": [1, "a"]}', "application/json", (422,)),
    (b'{"inputs": [260]}', "application/json", (400,)),
    (b'{"inputs": [-1]}', "application/json", (400,)),
    (b'{"inputs": []}', "application/json", (400,)),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": "9"}}', "application/json", (422,)),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": -1}}', "application/json", (400,)),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": 1e400}}', "application/json", (422,)),
    (b'{"inputs": "a", "parameters": {"temperature": NaN}}', "application/json", (400,)),
    (b'{"inputs": "a", "parameters": {"no_such_thing": 1}}', "application/json", (400,)),
    (b'{"inputs": "a", "parameters": {"n": 1000000}}', "application/json", (400,)),
    (b'{"inputs": "a", "nothing": 1}', "application/json", (422,)),
    (b'{"inputs": ' + b"[" * 5000, "application/json", (400, 422)),
    (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "application/json", (400, 422)),
    (b'{"inputs": "a"}', "text/plain", (422,)),
    (b'{"inputs": "a"}', "application/json; charset=no-such", (200, 400, 422)),
    (json.dumps({"inputs": [1] * (WINDOW + 1)}).encode(), "application/json", (400,)),
    (b" " * (MAX_BODY_BYTES + 1), "application/json", (413,)),
]


def _streamed(parameters: Body, client: Client) -> Body:
    if parameters.get("return_routed_experts") and client.chance.random() < 0.6:
        return parameters | {"routed_experts_every": client.chance.choice((1, 7, 40))}
    return parameters


async def plain(client: Client) -> str:
    """One prompt."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = client.parameters(len(prompt))
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began)
    return "200"


async def streamed(client: Client) -> str:
    """One prompt, streamed, sometimes forked, sometimes with deltas."""
    prompt, inputs = client.prompt()
    parameters = _streamed(client.parameters(len(prompt)), client) | {"n": client.chance.choice((1, 1, 2))}
    return await client.stream({"inputs": inputs, "parameters": parameters}, parameters, prompt)


async def forked(client: Client) -> str:
    """Several sequences of one prompt."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = client.parameters(len(prompt), 60) | {"n": client.chance.randint(2, 4)}
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began)
    return "200"


async def batched(client: Client) -> str:
    """Several prompts in one request."""
    began, prompts = time.monotonic(), [client.prompt() for _ in range(client.chance.randint(2, 4))]
    parameters = client.parameters(min(len(tokens) for tokens, _ in prompts), 40)
    answers = await client.ask("/generate", {"inputs": [sent for _, sent in prompts], "parameters": parameters})
    if answers is None:
        return "429"
    if len(answers) != len(prompts):
        raise SoakError(f"{len(answers)} answers to {len(prompts)} prompts")
    for (tokens, _), answer in zip(prompts, answers, strict=True):
        client.check(tokens, parameters, answer, began)
    return "200"


async def stopped(client: Client) -> str:
    """A stop sequence, as text or as token ids, at a place that is known."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = client.parameters(len(prompt)) | {"max_new_tokens": 120}
    first, length = client.chance.randint(0, 60), client.chance.randint(1, 3)
    run = client.closed.dye.continuation(prompt[-1], first + length)[first:]
    as_text = all(32 <= token < 127 for token in run) and client.chance.random() < 0.7
    parameters["stop_sequences"] = [bytes(run).decode()] if as_text else [run]
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began, stops=first + length)
    return "200"


async def scored(client: Client) -> str:
    """No new tokens: all P rows of the prompt."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = {"max_new_tokens": 0, "return_routed_experts": True}
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began)
    return "200"


async def coded(client: Client) -> str:
    """Routes in a container. The codec `set` gives ids that ascend, so it is left to other tests."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = _routed(client, len(prompt), True)
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began)
    return "200"


async def kept(client: Client) -> str:
    """Routes by reference, fetched whole or in two ranges, and now and then deleted."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = _routed(client, len(prompt), "reference")
    answer = await client.ask("/generate", {"inputs": inputs, "parameters": parameters})
    if answer is None:
        return "429"
    reference = answer["routed_experts"]["reference"]
    path, size = reference["path"], reference["num_bytes"]
    cut, pieces = client.chance.choice((0, size // 2)), b""
    for first, last in [(0, cut), (cut, size)] if cut else [(0, size)]:
        headers = {"Range": f"bytes={first}-{last - 1}"} if cut else {}
        response = await client.http.get(path, headers=headers)
        if response.status_code == 404:
            return "evicted"
        if response.status_code != (206 if cut else 200):
            raise SoakError(f"{path} answered {response.status_code}")
        pieces += response.content
    answer["routed_experts"] = {"data": base64.b64encode(pieces).decode()}
    client.check(prompt, parameters, answer, began)
    if client.chance.random() < 0.3:
        response = await client.http.delete(path)
        if response.status_code not in (204, 404):
            raise SoakError(f"DELETE {path} answered {response.status_code}")
    return "200"


def _routed(client: Client, prompt_length: int, how: bool | str) -> Body:
    parameters: Body = {"max_new_tokens": client.chance.randint(1, 120), "return_routed_experts": how}
    parameters["routed_experts_codec"] = client.chance.choice(("raw", "bits", "auto"))
    if client.chance.random() < 0.4:
        parameters["routed_experts_start"] = client.chance.randint(0, prompt_length)
    return parameters


async def sglang(client: Client) -> str:
    """SGLang's dialect, whose payload has no word for what it holds."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    asked, start = client.chance.randint(1, 60), client.chance.randint(0, len(prompt))
    body = {"text" if isinstance(inputs, str) else "input_ids": inputs, "return_routed_experts": True}
    body |= {"sampling_params": {"max_new_tokens": asked, "temperature": 0}, "routed_experts_start_len": start}
    answer = await client.ask("/sglang/generate", body)
    if answer is None:
        return "429"
    client.check_sglang(prompt, asked, start, answer, began)
    return "200"


async def openai(client: Client) -> str:
    """OpenAI's completions: text only."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    asked = client.chance.randint(1, 60)
    body = {"model": "dye", "prompt": inputs, "max_tokens": asked, "temperature": 0}
    answer = await client.ask("/v1/completions", body)
    if answer is None:
        return "429"
    choice, count = answer["choices"][0], answer["usage"]["completion_tokens"]
    expected = bytes(token for token in client.closed.dye.continuation(prompt[-1], count) if token < 256)
    if choice["text"] != expected.decode(errors="replace"):
        raise SoakError(f"{choice['text']!r} is not what the model says")
    if count != asked and client.aborted_all_at < began:
        raise SoakError(f"{count} tokens of {asked}, and nobody aborted")
    client.ledger.tokens += count
    return "200"


async def left(client: Client) -> str:
    """The client goes away before the answer."""
    prompt, inputs = client.prompt()
    body = {"inputs": inputs, "parameters": client.parameters(len(prompt)) | {"max_new_tokens": 300}}
    try:
        async with asyncio.timeout(client.chance.uniform(0, 0.5)):
            await client.http.post("/generate", json=body)
    except TimeoutError:
        return "left"
    return "answered first"


async def stream_left(client: Client) -> str:
    """The client goes away in the middle of a stream."""
    prompt, inputs = client.prompt()
    parameters = _streamed(client.parameters(len(prompt)), client) | {"max_new_tokens": 300}
    body = {"inputs": inputs, "parameters": parameters}
    return await client.stream(body, parameters, prompt, leave_after=client.chance.randint(1, 40))


async def aborted(client: Client) -> str:
    """Abort by id, from another connection: the client that waits gets what there is."""
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = {"max_new_tokens": 300, "return_routed_experts": True}
    name = f"abort-{client.chance.getrandbits(60):x}"
    waiting = asyncio.ensure_future(
        client.ask("/generate", {"inputs": inputs, "parameters": parameters}, X_Request_Id=name)
    )
    try:
        await asyncio.sleep(client.chance.uniform(0, 0.6))
        ids = [name, "nobody"]
        done = await client.ask("/abort", {"request_ids": ids}, (200,))
        if sorted(done["aborted"] + done["unknown"]) != sorted(ids):
            raise SoakError(f"an abort of {ids} said {done}")
        answer = await waiting
    finally:
        waiting.cancel()
    if answer is None:
        return "429"
    client.check(prompt, parameters, answer, began, own_abort=True)
    return "200"


async def twins(client: Client) -> str:
    """Two requests of one id: both are answered, at least one with a sequence, and none twice at a time."""
    name = f"twin-{client.chance.getrandbits(60):x}"
    began, (prompt, inputs) = time.monotonic(), client.prompt()
    parameters = {"max_new_tokens": 30}
    body = {"inputs": inputs, "parameters": parameters}
    answers = await asyncio.gather(
        *(client.ask("/generate", body, (200, 409, 429), X_Request_Id=name) for _ in range(2))
    )
    whole = [answer for answer in answers if answer is not None and "error" not in answer]
    for answer in whole:
        client.check(prompt, parameters, answer, began)
    if not whole and None not in answers:
        raise SoakError("both twins were refused")
    return f"{len(whole)} answered" if whole else "429"


async def malformed(client: Client) -> str:
    """Nothing that can be served: refused with the right status."""
    content, kind, allowed = client.chance.choice(MALFORMED)
    path = client.chance.choice(("/generate", "/generate_stream"))
    response = await client.http.post(path, content=content, headers={"Content-Type": kind})
    if response.status_code == 200 and 200 in allowed:
        client.ledger.answered[path, 200] += 1
        return "200"
    busy = (429,) if 400 in allowed else ()  # what parses may find no place before it is looked at
    client.judge(path, response.status_code, response.headers, response.content, allowed + busy)
    return str(response.status_code)


async def endless(client: Client) -> str:
    """A body that does not say its length and is too large."""

    async def pieces() -> Any:
        for _ in range(10):
            yield b" " * (MAX_BODY_BYTES // 8)

    response = await client.http.post("/generate", content=pieces(), headers={"Content-Type": "application/json"})
    client.judge("/generate", response.status_code, response.headers, response.content, (413,))
    return str(response.status_code)


async def half_sent(client: Client) -> str:
    """The client sends a part, waits, and goes away or sends the rest."""
    host, _, port = client.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        body = json.dumps({"inputs": [5], "parameters": {"max_new_tokens": 2}}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        message = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        cut = client.chance.randrange(1, len(message))
        writer.write(message[:cut])
        await writer.drain()
        await asyncio.sleep(client.chance.uniform(0, 1.5))
        if client.chance.random() < 0.6:
            return "left"
        writer.write(message[cut:])
        await writer.drain()
        status = (await reader.read()).split(b" ", 2)[1]
        client.ledger.answered["/generate", int(status)] += 1
        if status not in (b"200", b"429"):
            raise SoakError(f"status {status!r} for a request in two pieces")
        return status.decode()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def garbage(client: Client) -> str:
    """No HTTP at all."""
    host, _, port = client.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(client.chance.randbytes(200) + b"\r\n\r\n")
        await writer.drain()
        answer = await reader.read()
        if not answer.startswith(b"HTTP/1.1 400"):
            raise SoakError(f"{answer[:100]!r} to what is no HTTP")
        return "400"
    except ConnectionResetError:
        return "left"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def asked(client: Client) -> str:
    """What operators ask."""
    path = client.chance.choice(("/health", "/model", "/metrics", "/openapi.json"))
    response = await client.http.get(path)
    if response.status_code != 200:
        raise SoakError(f"{path} answered {response.status_code}")
    return "200"


async def fill_tokenizer(client: Client) -> None:
    """Let the server's tokenizer learn as many words as it ever keeps, or it learns them all along, and that looks like
    a leak. They come in texts that are tokenised together with one that is too long, so that all are refused."""

    async def learn(first: int) -> None:
        words = [f"word {number:05}" for number in range(first, first + 1000)]
        body = {"inputs": [*words, "x" * (WINDOW + 1)], "parameters": {"max_new_tokens": 1}}
        answer = await client.ask("/generate", body, (400,))
        if answer["error"].get("got") != f"{WINDOW + 1} tokens":
            raise SoakError(f"the words were not refused for the text that is too long: {answer}")

    for first in range(0, 4 * TOKENIZER_KEEPS, 2000):  # both threads are busy, and each learns about half
        await asyncio.gather(learn(first), learn(first + 1000))


Kind = Callable[[Client], Awaitable[str]]
KINDS: dict[str, tuple[int, Kind]] = {
    "plain": (20, plain),
    "stream": (14, streamed),
    "n": (8, forked),
    "batch": (8, batched),
    "stop": (8, stopped),
    "score": (6, scored),
    "codec": (5, coded),
    "reference": (6, kept),
    "sglang": (6, sglang),
    "openai": (4, openai),
    "leave": (5, left),
    "leave stream": (5, stream_left),
    "abort one": (5, aborted),
    "twins": (3, twins),
    "malformed": (8, malformed),
    "endless": (1, endless),
    "half sent": (3, half_sent),
    "garbage": (1, garbage),
    "ask": (3, asked),
}
"""Kinds of requests by name, each with how often it is chosen."""


class Traffic:
    """All that goes on at once."""

    def __init__(self, client: Client, folder: Path, stop: asyncio.Event, kinds: list[str]) -> None:
        self._client, self._folder, self._stop, self._kinds = client, folder, stop, kinds

    def tasks(self, clients: int) -> Iterator[Coroutine[Any, Any, None]]:
        """Each to run until the end."""
        for _ in range(clients):
            yield self._clients()
        yield self._every(15, "pause", self._pause)
        yield self._every(12, "update weights", self._update)
        yield self._every(25, "abort all", self._abort_all)
        yield self._bursts(20)

    async def _clients(self) -> None:
        weights = [KINDS[kind][0] for kind in self._kinds]
        while not self._stop.is_set():
            kind = self._client.chance.choices(self._kinds, weights)[0]
            outcome = await self._client.perform(kind, lambda kind=kind: KINDS[kind][1](self._client))
            if outcome == "429":
                await self._stopped_within(self._client.chance.uniform(0.2, 1))

    async def _every(self, seconds: float, kind: str, work: Callable[[int], Awaitable[str]]) -> None:
        number = 0
        while not await self._stopped_within(self._client.chance.uniform(0.5, 1.5) * seconds):
            number += 1
            await self._client.perform(kind, lambda number=number: work(number))

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    async def _pause(self, number: int) -> str:
        for path, paused, ready in (("/pause", True, 503), ("/resume", False, 200)):
            if (await self._client.ask(path, None, (200,))) != {"paused": paused}:
                raise SoakError(f"{path} did not say so")
            if (await self._client.http.get("/ready")).status_code != ready:
                raise SoakError(f"/ready does not know of {path}")
            if paused:
                await asyncio.sleep(self._client.chance.uniform(0.1, 1.5))
        return "200"

    async def _update(self, number: int) -> str:
        if number % 5 == 0:
            body = {"path": str(self._folder / "nowhere"), "version": "c"}
            await self._client.ask("/update_weights", body, (400,))
            return "400"
        letter = "ab"[number % 2]
        path = self._folder / letter
        body = {"path": str(path if number % 3 else path / "model.safetensors"), "version": f"{letter}{number}"}
        if await self._client.ask("/update_weights", body, (200,)) != {"weight_version": body["version"]}:
            raise SoakError("/update_weights did not say which")
        return "200"

    async def _abort_all(self, number: int) -> str:
        self._client.aborted_all_at = float("inf")
        try:
            await self._client.ask("/abort", {"all": True}, (200,))
        finally:
            self._client.aborted_all_at = time.monotonic()
        return "200"

    async def _bursts(self, seconds: float) -> None:
        while not await self._stopped_within(self._client.chance.uniform(0.5, 1.5) * seconds):
            await asyncio.gather(*(self._client.perform("burst", lambda: plain(self._client)) for _ in range(BURST)))
