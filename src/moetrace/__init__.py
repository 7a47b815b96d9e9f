"""moetrace: record the experts a Mixture-of-Experts model chose at rollout, and replay them in training.

Importing this package imports numpy only; names that need torch load it when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "moetrace.client",
    "Client": "moetrace.client",
    "MoeLayout": "moetrace.layout",
    "RoutingTrace": "moetrace.trace",
    "WeightSpan": "moetrace.spans",
    "token_sha256": "moetrace.tokens",
    "RoutingComparison": "moetrace.comparison",
    "compare": "moetrace.comparison",
    "extreme_token_ratio": "moetrace.comparison",
    "kl_k3": "moetrace.comparison",
    "load": "moetrace.format",
    "load_file": "moetrace.format",
    "open_file": "moetrace.format",
    "save": "moetrace.format",
    "save_file": "moetrace.format",
    "layout_of": "moetrace.routers",
    "record": "moetrace.recorder",
    "replay": "moetrace.replayer",
}

__all__ = ["__version__", "errors", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("moetrace.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'moetrace' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "moetrace":
            raise
        from moetrace.errors import MissingExtraError

        raise MissingExtraError.of(error, "transformers") from error


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from moetrace import errors as errors
    from moetrace.client import AsyncClient as AsyncClient
    from moetrace.client import Client as Client
    from moetrace.comparison import RoutingComparison as RoutingComparison
    from moetrace.comparison import compare as compare
    from moetrace.comparison import extreme_token_ratio as extreme_token_ratio
    from moetrace.comparison import kl_k3 as kl_k3
    from moetrace.format import load as load
    from moetrace.format import load_file as load_file
    from moetrace.format import open_file as open_file
    from moetrace.format import save as save
    from moetrace.format import save_file as save_file
    from moetrace.layout import MoeLayout as MoeLayout
    from moetrace.recorder import record as record
    from moetrace.replayer import replay as replay
    from moetrace.routers import layout_of as layout_of
    from moetrace.spans import WeightSpan as WeightSpan
    from moetrace.tokens import token_sha256 as token_sha256
    from moetrace.trace import RoutingTrace as RoutingTrace
