"""Record `model.generate`: a forward of all prompts, padded on the left, and then one of one token each.

Axes: B sequences, P columns of the prompts, N tokens of a forward, L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from moetrace.errors import RouterError, TokenMismatchError
from moetrace.routers import ModelTap, RoutingSession, Selection, tap_model
from moetrace.shadows import shadowed
from moetrace.trace import Order, RoutingTrace


class GenerationRecording(RoutingSession):
    """The routes of every forward of one `generate`, and the log-probabilities of what it sampled.

    Nothing here waits for the device before `traces`.
    """

    def __init__(self, tap: ModelTap, temperature: float) -> None:
        self._tap = tap
        self._forwards: list[dict[int, torch.Tensor]] = []
        self._order: Order = "rank"
        self._sampled = _SampledLogprobs(temperature)
        self._prompts_BP: torch.Tensor | None = None
        self._sequences_BS: torch.Tensor | None = None

    def on_selection(self, selection: Selection) -> None:
        if not self._forwards or selection.site.index in self._forwards[-1]:
            self._forwards.append({})
        narrow = torch.uint8 if self._tap.layout.dtype == np.uint8 else torch.int32
        self._forwards[-1][selection.site.index] = selection.indices_NK.to(narrow)
        if not selection.sorted:
            self._order = "set"

    def traces(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[RoutingTrace]:
        """One trace of P + O - 1 rows for each sequence.

        Args:
            prompts: token ids of each prompt, without padding.
            outputs: token ids that were generated after each, as far as they are wanted.

        Raises:
            RouterError: `generate` did not run once in the context, or not in forwards as described above.
            TokenMismatchError: it was given other prompts, or prompts with padding on their right.
        """
        columns = self._columns(prompts, outputs)
        prompts_BPLK, *steps_BLK = (self._experts(forward).cpu().numpy() for forward in self._forwards)
        prompts_BPLK = prompts_BPLK.reshape(len(prompts), columns, *prompts_BPLK.shape[1:])
        return [
            RoutingTrace.build(
                np.concatenate(
                    [prompts_BPLK[row, columns - len(prompt) :], *(ids[row, None] for ids in steps_BLK[: len(out) - 1])]
                ),
                self._tap.layout,
                [*prompt, *out],
                order=self._order,
                fingerprint=self._tap.fingerprint,
                engine=f"torch {torch.__version__}",
            )
            for row, (prompt, out) in enumerate(zip(prompts, outputs, strict=True))
        ]

    def logprobs(self, outputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of the tokens that were generated, by the logits over the temperature, before any truncation."""
        assert self._sequences_BS is not None
        logprobs_BO = self._sampled.of_all(self._sequences_BS).cpu()
        return [logprobs_BO[row, : len(out)].tolist() for row, out in enumerate(outputs)]

    def _experts(self, forward: dict[int, torch.Tensor]) -> torch.Tensor:
        """`[N, L, K]`"""
        return torch.stack([forward[index].to(forward[0].device) for index in range(len(forward))], 1)

    def _columns(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
        if self._prompts_BP is None or self._sequences_BS is None:
            raise RouterError("nothing was generated inside the context", expected="one call of model.generate")
        rows, columns = self._prompts_BP.shape
        steps = max(map(len, outputs), default=0)
        tokens = [next(iter(forward.values())).shape[0] for forward in self._forwards]
        whole = all(len(forward) == len(self._tap.sites) for forward in self._forwards)
        if rows != len(prompts) or tokens[:steps] != [rows * columns, *[rows] * (steps - 1)] or not whole:
            raise RouterError(
                "generate did not run as it is recorded: all prompts at once, then one token of each sequence",
                expected=f"{steps} forwards of {rows * columns} and then {rows} tokens",
                got=f"{len(tokens)} forwards of {tokens[:4]} ... tokens",
                fix="Use the cache, no beams, no assistant model and no chunks of the prompt.",
            )
        for row, (prompt, ids) in enumerate(zip(prompts, self._prompts_BP.tolist(), strict=True)):
            first = columns - len(prompt)
            if first < 0 or ids[first:] != list(prompt):
                raise TokenMismatchError(
                    f"prompt {row} is not the end of what generate was given in its row",
                    expected=f"a row that ends with the {len(prompt)} tokens of the prompt",
                    got=f"{columns} tokens that end otherwise",
                    fix="Pad prompts on the left, and pass them in the order of the batch.",
                )
        return columns


@contextmanager
def record_generation(model: nn.Module, temperature: float = 1.0) -> Iterator[GenerationRecording]:
    """Record the one call of `model.generate` that this thread makes inside the context.

    Args:
        model: a causal language model of transformers, or PEFT's wrapper of one.
        temperature: at which it samples; `logprobs` are of that distribution.

    Raises:
        NotMoeError, UnsupportedRouterError: the model cannot be recorded.
        RouterError: by `generate`, before it runs: it was given no token ids, or ran before.
    """
    tap = tap_model(model)
    own: Any = model.generate
    recording = GenerationRecording(tap, temperature)

    def generate(
        inputs: Any = None, generation_config: Any = None, logits_processor: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        ids_BP = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(ids_BP, torch.Tensor) or ids_BP.ndim != 2:
            raise RouterError(
                "generate was not given prompts that can be told apart from what it generates",
                expected="token ids [B, P], as input_ids or as the first argument",
                got=type(ids_BP).__name__ if not isinstance(ids_BP, torch.Tensor) else tuple(ids_BP.shape),
            )
        if recording._prompts_BP is not None:
            raise RouterError("a second generate inside the context", expected="one", fix="Record each by itself.")
        recording._prompts_BP = ids_BP.clone()  # the caller may use its own again before the traces are asked for
        processors = LogitsProcessorList([*(logits_processor or ()), recording._sampled])
        with tap.active(recording):
            output = own(inputs, generation_config, processors, *args, **kwargs)
        recording._sequences_BS = getattr(output, "sequences", output)  # with return_dict_in_generate an object
        return output

    with shadowed(model, "generate", generate):
        yield recording


class _SampledLogprobs(LogitsProcessor):
    """Sees the logits of each step before temperature and truncation, and one step later which token was drawn.

    It keeps the distribution of one step only: those of all steps would be larger than most models.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._next_BV: torch.Tensor | None = None
        self._drawn: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.drew(input_ids[:, -1])
        self._next_BV = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def drew(self, tokens_B: torch.Tensor) -> None:
        if self._next_BV is not None:
            self._drawn.append(self._next_BV.gather(1, tokens_B[:, None].to(self._next_BV.device))[:, 0])

    def of_all(self, sequences_BS: torch.Tensor) -> torch.Tensor:
        """`[B, O]`"""
        last = self._next_BV.gather(1, sequences_BS[:, -1:])  # type: ignore[union-attr]
        return torch.cat([*(drawn_B[:, None] for drawn_B in self._drawn), last], 1)
