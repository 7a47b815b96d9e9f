"""Capture in transformers' continuous batching: the one file that knows that engine's internals.

What is used of them, in every supported release (5.17 to 5.23): a batch processor has `inputs_and_outputs` with
`prepare_batch_tensors`, `retrieve_device_outputs` and `prepare_batch_update`, called in that order for every step (with
asynchronous batching, the third one step late), and `_generation_step(model)` around the forward. A packed step holds
its requests in the order given to the first; each has `position_offset` positions done and brings `query_length` more.

    prepare_batch_tensors     plan: which packed tokens belong to which positions; rows of reused prefixes are copied
    _generation_step          the tap writes expert ids to staging
    retrieve_device_outputs   commit: narrow staging to rows, start their copy to the host
    prepare_batch_update      harvest: the engine has waited for its own outputs, so the rows have arrived too

Axes: N tokens of a step, L MoE layers, K experts per token.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation.continuous_batching.requests import RequestStatus

from moetrace.errors import CaptureError
from moetrace.recorder import PagedRows, SequenceRows, Staging, commit_rows
from moetrace.routers import tap_model
from moetrace.trace import Order

logger = logging.getLogger(__name__)

_DISCARDED = (RequestStatus.FINISHED, RequestStatus.PENDING)
"""States in which the engine throws a step's result away: what it computed is not what was sampled from."""


@dataclass
class _Share:
    """The part of a step that belongs to one request: positions `start <= position < start + count`."""

    state: Any
    start: int
    count: int

    def tokens(self) -> list[int]:
        """The tokens at its positions; known once the step before has been harvested."""
        prompt, generated = self.state.initial_tokens, self.state.generated_tokens
        stop, split = self.start + self.count, len(prompt)
        return prompt[self.start : stop] + generated[max(self.start - split, 0) : max(stop - split, 0)]


@dataclass
class _Step:
    """One planned step; `rows_NLK` arrives between commit and harvest."""

    requests: list[Any]
    shares: list[_Share]
    rows_NLK: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return sum(share.count for share in self.shares)


@dataclass
class _Sequence:
    """A request's rows, and the engine's state object they were last planned for."""

    rows: SequenceRows
    state: Any = None


@dataclass
class CaptureCounts:
    """What capture did since it started."""

    steps: int = 0
    rows: int = 0
    reused_rows: int = 0
    missing_rows: int = 0


class StepCapture:
    """Records every token of every request of one continuous-batching processor."""

    def __init__(self, model: nn.Module, batch_processor: Any) -> None:
        self._tap = tap_model(model)
        self._installed = ExitStack()
        self._io = _require(batch_processor, "inputs_and_outputs")
        self._cache = _require(batch_processor, "cache")
        device = torch.device(_require(self._cache, "device"))
        self.layout = self._tap.layout
        self.fingerprint = self._tap.fingerprint
        self.counts = CaptureCounts()
        self._staging = Staging(self.layout, _require(self._cache, "max_batch_tokens"), device)
        self._steps: deque[_Step] = deque()
        self._sequences: dict[str, _Sequence] = {}
        self._processor = batch_processor
        page_size, self._block_table = _block_table_of(self._cache)
        self._pages = PagedRows(self.layout, page_size)
        logger.info(
            "capture on: staging %.1f MiB for steps of up to %d tokens, %d bytes a row on the host",
            self._staging.ids_LNK.nbytes / 2**20,
            self._staging.capacity,
            self.layout.row_bytes,
        )

    @property
    def order(self) -> Order:
        """Whether the captured ids are in rank order."""
        return self._staging.order

    def active(self) -> AbstractContextManager[None]:
        """While open, forwards of this thread write to staging (CUDA graphs captured now will always do)."""
        return self._tap.active(self._staging)

    def attach(self) -> None:
        """Follow the steps from now on. Warm-up must be over: its steps are never harvested."""
        io, processor = self._io, self._processor
        own_prepare = _require(io, "prepare_batch_tensors")
        own_step = _require(processor, "_generation_step")
        own_retrieve = _require(io, "retrieve_device_outputs")
        own_update = _require(io, "prepare_batch_update")

        def prepare(requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> Any:
            step = self._plan(requests_in_batch)  # before the engine moves the positions on
            result = own_prepare(requests_in_batch, *args, **kwargs)
            self._steps.append(step)
            return result

        def generation_step(model: nn.Module) -> Any:
            with self.active():
                return own_step(model)

        def retrieve() -> Any:
            self._commit(self._steps[-1])
            return own_retrieve()

        def update() -> Any:
            result = own_update()
            self._harvest(self._steps.popleft(), result[0])
            return result

        self._installed.enter_context(self._tap.installed())  # once: a step must not walk the model's modules
        io.prepare_batch_tensors, io.retrieve_device_outputs, io.prepare_batch_update = prepare, retrieve, update
        processor._generation_step = generation_step

    def detach(self) -> None:
        """Leave the engine as it was."""
        for owner, name in (
            (self._io, "prepare_batch_tensors"),
            (self._io, "retrieve_device_outputs"),
            (self._io, "prepare_batch_update"),
            (self._processor, "_generation_step"),
        ):
            vars(owner).pop(name, None)
        self._installed.close()

    def collect(self, request_id: str, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Take away a finished request's rows: `experts_TLK` and `valid_T`, both `num_rows` long."""
        sequence = self._sequences.pop(request_id, None)
        rows = SequenceRows(self.layout) if sequence is None else sequence.rows
        experts_TLK, valid_T = rows.read(0, num_rows)
        self.counts.missing_rows += int(num_rows - valid_T.sum())
        return experts_TLK, valid_T

    def _plan(self, requests: list[Any]) -> _Step:
        shares = [_Share(r.state, r.state.position_offset, r.query_length) for r in requests]
        for share in shares:
            self._admit(share)
        return _Step(list(requests), shares)

    def _admit(self, share: _Share) -> None:
        """When a request (or what a preempted one became) is first planned, positions before its share are not its own:
        it was given pages that hold them. Later, missing positions are steps in flight."""
        state = share.state
        sequence = self._sequences.setdefault(state.request_id, _Sequence(SequenceRows(self.layout)))
        if sequence.state is not state:
            sequence.state = state
            if share.start:
                pages = self._block_table.get(state.request_id, [])
                prefix = state.initial_tokens[: share.start]
                self.counts.reused_rows += self._pages.copy_to(sequence.rows, pages, prefix)

    def _commit(self, step: _Step) -> None:
        """Narrow on the compute stream, where the next step cannot overwrite staging first; copy beside it."""
        compute = self._io.compute_stream
        if compute is None:
            step.rows_NLK = commit_rows(self._staging, step.num_tokens)
            return
        copying = getattr(self._io, "d2h_stream", compute)  # the engine waits for this stream before it harvests
        with torch.cuda.stream(compute):
            rows_NLK = commit_rows(self._staging, step.num_tokens)
        copying.wait_stream(compute)
        with torch.cuda.stream(copying):
            step.rows_NLK = torch.empty(rows_NLK.shape, dtype=rows_NLK.dtype, pin_memory=True)
            step.rows_NLK.copy_(rows_NLK, non_blocking=True)
            rows_NLK.record_stream(copying)

    def _harvest(self, step: _Step, requests: list[Any]) -> None:
        if step.rows_NLK is None or [id(r) for r in requests] != [id(r) for r in step.requests]:
            raise CaptureError(
                "the engine finished another step than the one that was planned",
                expected=f"{len(step.requests)} requests of the oldest step in flight",
                got=f"{len(requests)} others",
                fix="This release of transformers is not supported; see the table in docs/architecture.md.",
            )
        rows_NLK = step.rows_NLK.numpy()
        self.counts.steps += 1
        first = 0
        for share in step.shares:
            if share.state.status not in _DISCARDED:
                share_rows = rows_NLK[first : first + share.count]
                self._sequences[share.state.request_id].rows.write(share.start, share_rows)
                if self._cache.use_prefix_sharing:
                    pages = self._block_table.get(share.state.request_id, [])
                    self._pages.write(pages, share.start, share.tokens(), share_rows)
                self.counts.rows += share.count
            first += share.count


def _require(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise CaptureError(
            f"transformers' {type(owner).__name__} has no {name!r}",
            expected="transformers 5.17 to 5.23",
            fix="Install a supported release, or open an issue with the version.",
        )
    return getattr(owner, name)


def _block_table_of(cache: Any) -> tuple[int, dict[str, list[int]]]:
    """Tokens of a page, and the live table request id -> physical pages, of the full-attention layers.

    Prefixes are shared only where all layers have full attention, so there is one such table wherever it matters.
    """
    if hasattr(cache, "cache_allocators"):  # 5.18 and later
        allocator = next(iter(cache.cache_allocators.values()))
        return _require(allocator, "tokens_per_page"), _require(allocator, "block_table")
    allocator = _require(cache, "group_cache_managers")[0]
    return _require(cache, "block_size"), _require(allocator, "block_table")
