"""`ServerRollout`: generate on a moetrace server, as TRL's `rollout_func`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetrace.client import Client
from moetrace.errors import RolloutError

ROUTES = "routing_traces"
"""What a `rollout_func` returns beside TRL's own keys: a `RoutingTrace` for each sequence."""


class ServerRollout:
    """A `rollout_func` that asks a moetrace server for completions with their routes.

    Before the first generation after an optimizer step the server is given the new weights, as a checkpoint folder that
    both can read. Its sampling is TRL's: temperature, top_p, top_k, completion length, end-of-sequence tokens.

    Args:
        client: of the server.
        weights: folder to write checkpoints to, one over the other. None: the server's weights never change, and
            training is off-policy from its second step on.

    Raises:
        RolloutError: that is no client.
    """

    def __init__(self, client: Client, weights: str | Path | None) -> None:
        if not isinstance(client, Client):
            raise RolloutError("a server is asked by a client", expected="a moetrace.Client", got=repr(client))
        self._client, self._weights = client, None if weights is None else Path(weights)
        self._loaded_step = -1

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        """One completion for each prompt (TRL repeats a prompt for each of its generations)."""
        self._require_known(trainer)
        if self._weights is not None and trainer.state.global_step != self._loaded_step:
            self._push_weights(trainer, self._weights)
            self._loaded_step = trainer.state.global_step
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        completions = self._client.generate(
            prompt_ids,
            max_new_tokens=trainer.max_completion_length,
            do_sample=True,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or -1,
            stop_token_ids=list(trainer.eos_token_ids),
        )
        return {
            "prompt_ids": [completion.prompt_tokens for completion in completions],
            "completion_ids": [completion.tokens for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
            ROUTES: [completion.trace for completion in completions],
        }

    def _push_weights(self, trainer: Any, folder: Path) -> None:
        accelerator = trainer.accelerator
        state = accelerator.get_state_dict(trainer.model)  # of all ranks
        if accelerator.is_main_process:
            accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
            self._client.update_weights(str(folder.absolute()), f"step-{trainer.state.global_step}")
        accelerator.wait_for_everyone()

    def _require_known(self, trainer: Any) -> None:
        if hasattr(trainer.model, "peft_config"):
            raise RolloutError(
                "a server cannot be given the weights of a PEFT model: it has no adapters",
                expected="a full model",
                fix="Train all weights, or generate with transformers or vLLM.",
            )
        unknown = {"min_p": trainer.min_p or 0.0, "repetition_penalty": trainer.repetition_penalty - 1.0}
        if any(unknown.values()) or trainer.args.generation_kwargs:
            raise RolloutError(
                "the server does not sample as this configuration asks",
                expected="min_p and generation_kwargs not set, repetition_penalty=1.0",
                got={name for name, value in unknown.items() if value} or trainer.args.generation_kwargs,
            )
