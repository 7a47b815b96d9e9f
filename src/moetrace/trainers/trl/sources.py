"""Where routes come from: each way in which TRL generates, watched for the length of one turn.

Every source is a context manager over a trainer. It yields a function that is called after the turn with the prompts
and outputs of this process, and returns a trace and, where TRL does not keep them itself, log-probabilities for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from trl.generation import vllm_generation

from moetrace.dialects import from_vllm, from_vllm_http
from moetrace.engines.transformers.batches import record_batches
from moetrace.errors import EngineError, ReplayError
from moetrace.recorder.generation import record_generation
from moetrace.routers import tap_model
from moetrace.shadows import shadowed
from moetrace.trace import RoutingTrace

Tokens = Sequence[Sequence[int]]
Turn = list[tuple[RoutingTrace, list[float] | None]]
Source = Callable[[Any], AbstractContextManager[Callable[[Tokens, Tokens], Turn]]]


def source_of(trainer: Any) -> Source:
    """How this trainer generates."""
    if trainer.use_vllm:
        return vllm_server if trainer.vllm_mode == "server" else vllm_colocated
    return continuous_batching if trainer.use_transformers_continuous_batching else generate


@contextmanager
def generate(trainer: Any) -> Iterator[Callable[[Tokens, Tokens], Turn]]:
    """`model.generate`, one batch at a time."""
    with record_generation(trainer.model, trainer.temperature) as recording:
        yield lambda prompts, outputs: list(
            zip(recording.traces(prompts, outputs), recording.logprobs(outputs), strict=True)
        )


@contextmanager
def continuous_batching(trainer: Any) -> Iterator[Callable[[Tokens, Tokens], Turn]]:
    """`model.generate_batch`, transformers' continuous batching."""
    with record_batches(trainer.model) as recording:
        yield lambda prompts, outputs: [(sequence.trace, sequence.logprobs) for sequence in recording.sequences]


@contextmanager
def vllm_colocated(trainer: Any) -> Iterator[Callable[[Tokens, Tokens], Turn]]:
    """An `LLM` of vLLM in this process; with tensor parallelism it answers the prompts of all ranks of its group."""
    generation, answers = trainer.vllm_generation, list[Any]()
    llm, own = generation.llm, generation.llm.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        answers.extend(completion.routed_experts for output in outputs for completion in output.outputs)
        return outputs

    def turn(prompts: Tokens, outputs: Tokens) -> Turn:
        parallel = generation.tensor_parallel_size > 1
        rank = torch.distributed.get_rank(group=generation.tp_group) if parallel else 0
        return _read(trainer, from_vllm, answers[rank * len(outputs) :], prompts, outputs)

    with shadowed(llm, "generate", watched):
        yield turn


@contextmanager
def vllm_server(trainer: Any) -> Iterator[Callable[[Tokens, Tokens], Turn]]:
    """A server of vLLM, which the main process asks for all; the payloads go from it to the others."""
    answers: list[Any] = []
    main = trainer.accelerator.is_main_process

    def turn(prompts: Tokens, outputs: Tokens) -> Turn:
        all_answers = [answers]
        broadcast_object_list(all_answers, from_process=0)
        first = trainer.accelerator.process_index * len(outputs)
        return _read(trainer, from_vllm_http, all_answers[0][first:], prompts, outputs)

    if not main:
        yield turn
        return
    client = trainer.vllm_generation.vllm_client
    own = client._post

    def watched(url: str, **kwargs: Any) -> Any:
        answer = own(url, **kwargs)
        if "choices" in answer:
            answers.extend(choice.get("routed_experts") for choice in answer["choices"])
        return answer

    with shadowed(client, "_post", watched):
        yield turn


def returning_routes() -> AbstractContextManager[None]:
    """Inside, TRL starts a colocated `LLM` of vLLM that returns routes: there is no other way to ask it for that."""
    llm = getattr(vllm_generation, "LLM", None)  # only where vLLM is installed; TRL says so itself where it is not
    return shadowed(vllm_generation, "LLM", llm and partial(llm, enable_return_routed_experts=True))


def _read(trainer: Any, reader: Callable[..., RoutingTrace], answers: list, prompts: Tokens, outputs: Tokens) -> Turn:
    """Traces of vLLM's payloads for the first `len(outputs)` of `answers`."""
    if len(answers) < len(outputs):
        raise ReplayError("vLLM answered for fewer sequences than TRL has", expected=len(outputs), got=len(answers))
    tap = tap_model(trainer.model)
    num_layers = trainer.model.config.get_text_config().num_hidden_layers
    turn: Turn = []
    for answer, prompt, output in zip(answers, prompts, outputs, strict=False):
        if answer is None:
            raise EngineError(
                "vLLM returned a sequence without its routes",
                expected="routed_experts in each completion",
                fix="Start it as: vllm serve MODEL --enable-return-routed-experts",
            )
        tokens = [*prompt, *output]
        turn.append((reader(answer, tokens, tap.layout, num_layers, order="set", fingerprint=tap.fingerprint), None))
    return turn
