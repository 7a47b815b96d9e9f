"""What the dialects over HTTP share: asking with httpx, and who is at fault when that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask
from moetrace.errors import CheckError, LackingError

_LATER = 429
SECONDS_TO_TELL = 30.0
"""In which an engine says what it is, without computing anything; requests have the plan's timeout."""
KEY_REFUSED = (401, 403)
"""Statuses of a server that wants a key, or another one."""


class HttpSubject:
    """An engine behind HTTP.

    Args:
        client: with the engine's address as its base, and its key in the headers if it wants one.
        form: the checkpoint: what the dialect leaves out must be known.
    """

    dialect = ""
    window: int | None = None

    def __init__(self, client: httpx.AsyncClient, form: DyeForm) -> None:
        self.name, self.client, self.form = self.dialect, client, form

    async def open(self) -> None:
        """Learn the engine's name and window, as far as it tells them."""

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`."""
        raise NotImplementedError

    async def update_weights(self, folder: str, version: str) -> None:
        """See `Subject`."""
        raise LackingError(f"{self.dialect} loads no checkpoint from disk through its public API")

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        """The JSON that is answered to a POST, or None for an empty answer; tries again while the engine is busy (429).

        Raises:
            LackingError: status 4xx.
            CheckError: anything else that is no JSON with status 200.
        """
        while True:
            try:
                response = await self.client.post(path, json=body, headers=headers)
            except httpx.HTTPError as error:
                raise CheckError(f"POST {path} failed", got=repr(error)) from error
            if response.status_code != _LATER:
                break
            await asyncio.sleep(0.2)
        require_ok(path, response)
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise CheckError(f"POST {path} answers no JSON", got=response.text[:200]) from error

    async def events(
        self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """The JSON of server-sent events; raises as `post`."""
        try:
            async with self.client.stream("POST", path, json=body, headers=headers) as response:
                if response.is_error:
                    await response.aread()
                require_ok(path, response)
                async for line in response.aiter_lines():
                    text = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if text and text != "[DONE]":
                        yield json.loads(text)
        except (httpx.HTTPError, ValueError) as error:
            raise CheckError(f"the stream of {path} failed", got=repr(error)) from error

    async def get(self, path: str) -> Any:
        """The JSON of a GET, or None where there is none."""
        try:
            response = await self.client.get(path, timeout=SECONDS_TO_TELL)
            return response.json() if response.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError):
            return None


def require_ok(path: str, response: httpx.Response) -> None:
    """Raise for an error status, with what the engine says of it."""
    if response.is_success:
        return
    try:
        told = response.json()
    except ValueError:
        told = response.text
    for key in ("error", "message", "detail"):
        told = told[key] if isinstance(told, dict) and key in told else told
    what = f"{path} answers {response.status_code}: {str(told)[:300].rstrip('.')}"
    fix = "Pass the server's key as --api-key." if response.status_code in KEY_REFUSED else None
    raise (LackingError if response.is_client_error else CheckError)(what, fix=fix)


def field(answer: Any, path: str, *keys: str | int) -> Any:
    """What lies at `keys` in an answer; raises `CheckError` where there is nothing."""
    for key in keys:
        try:
            answer = answer[key]
        except (KeyError, IndexError, TypeError) as error:
            raise CheckError(
                f"the answer of {path} has no {'.'.join(map(str, keys))}", got=str(answer)[:200]
            ) from error
    return answer
