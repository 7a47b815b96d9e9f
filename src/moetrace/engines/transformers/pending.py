"""What the engine remembers of its requests, and what stands between their outputs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from moetrace.engines.requests import GenerateResult, SamplingParams
from moetrace.engines.transformers.prompt_scores import PromptScores
from moetrace.engines.transformers.stopping import Stops


@dataclass
class Pending:
    """A sequence that somebody waits for."""

    prompt: list[int]
    sampling: SamplingParams
    future: Future[GenerateResult]
    return_routes: bool
    stop_ids: frozenset[int]
    stops: Stops
    on_progress: Callable[[list[int], list[float]], None] | None
    scores: PromptScores | None = None
    aborted: bool = False
    failure: Exception | None = None
    """What it was ended for, before the engine itself would have."""


@dataclass(frozen=True)
class NewWeights:
    """Stands among the engine's outputs: what comes after it was finished by weights of this version."""

    version: str
