"""A server with a dye checkpoint, and both clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from asking import DYE, Asker
from serving import serving
from transformers import AutoTokenizer

from moetrace.engines.base import EngineConfig
from moetrace.engines.transformers import TransformersEngine
from moetrace.server import create_app


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


@pytest.fixture(scope="session")
def dyed() -> Iterator[tuple[TransformersEngine, Any]]:
    """An engine and its tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained("models/tiny-qwen3-moe")
    engine = TransformersEngine(DYE.model(), EngineConfig(enable_return_routed_experts=True, seed=0), tokenizer)
    yield engine, tokenizer
    engine.close()


@pytest.fixture(scope="session")
def url(dyed: tuple[TransformersEngine, Any]) -> Iterator[str]:
    with serving(create_app(*dyed)) as url:
        yield url
