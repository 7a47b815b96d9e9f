"""From chat messages to a prompt, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from moetrace.errors import RequestError

_ROLES = ("system", "developer", "user", "assistant")
_KEYS = ("role", "content", "name", "refusal", "tool_calls", "function_call", "audio", "annotations")
_NOT_TEXT = ("tool_calls", "function_call", "audio", "refusal", "annotations")


def chat_tokens(messages: Sequence[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to where the assistant is to answer.

    Raises:
        RequestError: a message is not text, or the checkpoint has no chat template or one that refuses the messages.
    """
    plain = [_plain(message, f"messages.{number}") for number, message in enumerate(messages)]
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "this checkpoint has no chat template",
            expected="one in tokenizer_config.json or chat_template.jinja",
            got="none",
            fix="Send the prompt to /v1/completions, or give the checkpoint its template.",
            param="messages",
        )
    try:
        text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        text.encode()
    except (TemplateError, UnicodeEncodeError) as error:
        raise RequestError(
            f"the chat template does not take these messages ({error})",
            expected="messages as the checkpoint was trained on",
            param="messages",
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)  # the template has its own


def _plain(message: dict[str, Any], place: str) -> dict[str, str]:
    """A message with nothing but text."""
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(
            f"{place}.role is not supported", expected=" or ".join(_ROLES), got=repr(role), param="messages"
        )
    for name in message:
        if name not in _KEYS or (name in _NOT_TEXT and message[name]):
            raise RequestError(
                f"{place}.{name} is not supported", expected="role, content and name", got=name, param="messages"
            )
    facts = {"role": role, "content": _text(message.get("content"), f"{place}.content")}
    return facts | ({"name": _text(message["name"], f"{place}.name")} if message.get("name") else {})


def _text(content: object, place: str) -> str:
    """Text, or the texts of parts one after the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{place}.{number}") for number, part in enumerate(content))
    raise RequestError(
        f"{place} is wrong", expected="a text, or a list of parts", got=type(content).__name__, param="messages"
    )


def _part(part: object, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RequestError(
        f"{place} is not text, and this server takes nothing else",
        expected='{"type": "text", "text": ...}',
        got=f"a part of type {kind!r}",
        param="messages",
    )
