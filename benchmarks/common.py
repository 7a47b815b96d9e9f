"""What the benchmarks share: the large shape, the machine's name, a clock, and how a result is kept."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moetrace.shadows import shadowed


def large_shape(layers: int, **changes: Any) -> Any:
    """Qwen3-30B-A3B's configuration with so many layers; a `Qwen3MoeConfig`."""
    from transformers import Qwen3MoeConfig  # not by whoever only keeps results

    values: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    }
    return Qwen3MoeConfig(**values | changes)


def cpu_name() -> str:
    """The processor's name as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def timed(parts: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of every call of some functions inside the context, by name.

    Args:
        parts: owner and attribute of each.
    """
    times: dict[str, list[float]] = {name: [] for name in parts}
    with ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            own = getattr(owner, attribute)

            def clocked(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
                began = time.perf_counter()
                try:
                    return own(*args, **kwargs)
                finally:
                    times[name].append(1e3 * (time.perf_counter() - began))

            stack.enter_context(shadowed(owner, attribute, clocked))
        yield times


@contextmanager
def graphs_captured(engine: Any) -> Iterator[list[None]]:
    """A list that grows by each CUDA graph that an embedded engine captures, which takes it 75 to 200 ms."""
    runner, captured = engine._manager.batch_processor.model_runner, list[None]()
    own = runner._capture_graph

    def capture(*args: Any) -> None:
        captured.append(None)
        own(*args)

    with shadowed(runner, "_capture_graph", capture):
        yield captured


def roll_out(engine: Any, prompts: Sequence[Sequence[int]], samplings: Sequence[Any], routes: bool) -> list[Any]:
    """The results of an embedded engine for these requests, which all begin in one step: every round has the same steps
    then. With routes, each has all of its rows."""
    engine.pause()
    running = [
        engine.submit(prompt, sampling, return_routes=routes)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    engine.resume()
    results = [generation.result(600) for generation in running]
    assert not routes or all(result.trace is not None and result.trace.valid_T.all() for result in results)
    return results


def warm_up(engine: Any, rollout: Callable[[], Any], most: int = 6) -> None:
    """Roll out twice, and on until a round captures no CUDA graph: transformers captures one for each new shape, and
    keeps those of its two sets of buffers apart, so a round may begin with the other one."""
    for number in range(most):
        with graphs_captured(engine) as captured:
            rollout()
        if number and not captured:
            return


def keep(out: Path | None, **facts: Any) -> None:
    """Write what was measured to `out`, if given, after the command and the date."""
    if out is None:
        return
    record = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **facts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
