"""The HTTP server: a shell around an engine and a tokenizer that it is given. Importing it imports no web framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {"ServerConfig": "config", "create_app": "app", "serve": "run"}

__all__ = ["ServerConfig", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moetrace.server' has no attribute {name!r}")
    return getattr(import_module(f"moetrace.server.{_HOMES[name]}"), name)


if TYPE_CHECKING:
    from moetrace.server.app import create_app as create_app
    from moetrace.server.config import ServerConfig as ServerConfig
    from moetrace.server.run import serve as serve
