"""vLLM in this process as the conformance suite asks it: `AsyncLLM`, which `vllm serve` is built on."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import vllm
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.adapters.payloads import rows_of_vllm_array
from moetrace.conformance.suite.adapters.vllm import sampling_of
from moetrace.conformance.suite.asking import Answer, Ask
from moetrace.errors import CheckError, LackingError


class VLLMEngine:
    """An engine of `AsyncLLM`, started here.

    Args:
        folder: of a dye checkpoint.
        form: its form.
        arguments: of vLLM's `AsyncEngineArgs`.
    """

    dialect = "vllm in process"

    def __init__(self, folder: str, form: DyeForm, arguments: dict[str, Any]) -> None:
        self.name, self.window = f"vLLM {vllm.__version__}", arguments["max_model_len"]
        self._form, self._engine = form, AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **arguments))

    async def ask(self, ask: Ask) -> Sequence[Answer]:
        """See `Subject`. A stream's routes come with its last tokens."""
        if ask.max_new_tokens == 0:
            raise LackingError("vLLM generates at least one token")
        kind = RequestOutputKind.DELTA if ask.stream else RequestOutputKind.FINAL_ONLY
        if ask.abort_after is not None:
            kind = RequestOutputKind.CUMULATIVE
        sampling = SamplingParams(
            **sampling_of(ask, self._form),
            routed_experts_prompt_start=ask.start,
            output_kind=kind,
        )
        try:
            return await self._generate(ask, sampling)
        except ValueError as error:
            raise LackingError(str(error)) from error
        except (CheckError, TimeoutError):
            raise
        except Exception as error:
            raise CheckError("the engine failed", got=repr(error)) from error

    async def _generate(self, ask: Ask, sampling: SamplingParams) -> list[Answer]:
        name = uuid.uuid4().hex
        outputs: list[list[int]] = [[] for _ in range(ask.n)]
        reasons, routes = [""] * ask.n, [None] * ask.n
        prompt = TokensPrompt(prompt_token_ids=list(ask.prompt))
        aborted = False
        async for result in self._engine.generate(prompt, sampling, name):
            for output in result.outputs:
                earlier = outputs[output.index] if ask.stream else []
                outputs[output.index] = [*earlier, *output.token_ids]
                reasons[output.index] = output.finish_reason or ""
                if output.routed_experts is not None:
                    routes[output.index] = output.routed_experts
            enough = ask.abort_after is not None and len(outputs[0]) >= ask.abort_after
            if enough and not aborted and not result.finished:
                aborted = True
                await self._engine.abort(name)
        return [self._answer(ask, *each) for each in zip(outputs, reasons, routes, strict=True)]

    def _answer(self, ask: Ask, output: list[int], reason: str, routes: np.ndarray | None) -> Answer:
        if routes is None:
            return Answer(tuple(output), reason, None)
        return Answer(tuple(output), reason, rows_of_vllm_array(routes, [*ask.prompt, *output], self._form, ask.start))

    async def update_weights(self, folder: str, version: str) -> None:
        """As vLLM's documentation has it: running requests wait meanwhile, and what was cached is dropped."""
        try:
            await self._engine.pause_generation(mode="keep", clear_cache=True)
            await self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            await self._engine.resume_generation()
        except Exception as error:
            raise CheckError("the weights could not be updated", got=repr(error)) from error

    async def close(self) -> None:
        """End the engine."""
        self._engine.shutdown()
