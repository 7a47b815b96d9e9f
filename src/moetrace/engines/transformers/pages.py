"""The pages of the KV cache: which slots hold which positions of whom, and who is told what becomes of them."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import AbstractContextManager
from typing import Any, Protocol

from moetrace.errors import CaptureError
from moetrace.recorder import StepSlots

SUPPORTED = "transformers 5.17 to 5.23"


class PageListener(Protocol):
    """Someone who must know what happens to pages. All calls come from the generation thread, in order."""

    is_on: bool
    """Whether steps commit. Changes between two steps only; CUDA graphs with and without a commit are kept apart."""

    def forwards(self) -> AbstractContextManager[None]:
        """Open while a step's forward runs, is traced, or is captured in a CUDA graph."""
        ...

    def after_forward(self, step: StepSlots) -> None:
        """A step's forward has been launched; part of the CUDA graph where there is one."""
        ...

    def settle(self, computed: bool = False) -> None:
        """Pages that were given back are about to be written, or nothing may happen for long: gather them now, in the
        order of the current stream.

        Args:
            computed: all that they hold was computed by steps whose end the host has seen.
        """
        ...

    def freed(self, request_id: str, pages: list[int], computed: int | None, over: bool) -> None:
        """A request gives its pages back.

        Args:
            request_id: the request.
            pages: its pages, in the order of its positions.
            computed: how many of its positions hold what its tokens were really sampled from; None for all.
            over: False if it will come back (preempted).
        """
        ...

    def replaced(self, request_id: str, index: int, page: int) -> None:
        """A request's page `index` was `page`; now it shares an equal one of another request."""
        ...

    def copied(self, sources: list[int], targets: list[int]) -> None:
        """Pages are being copied, on the current stream."""
        ...

    def restored(self, request_id: str, pages: list[int]) -> None:
        """A preempted request's keys have been moved from the host into these pages, on the current stream."""
        ...


class PageMap:
    """Which slots of the cache hold which positions. The full-attention layers keep every position; a model without
    any keeps the last `window` of them."""

    def __init__(self, cache: Any) -> None:
        self.window: int | None = None
        if hasattr(cache, "cache_allocators"):  # 5.18 and later
            self.kind = "full_attention" if "full_attention" in cache.cache_allocators else "sliding_attention"
            allocator = require(cache, "cache_allocators")[self.kind]
            self.page_size = require(allocator, "tokens_per_page")
            self._write_stride = require(allocator, "block_physical_stride")
            self._group = require(allocator, "index")
            self.num_pages = cache.cache_tensor.nbytes // allocator.bytes_per_block  # those for padding too
        else:
            allocators = require(cache, "group_cache_managers")
            full = [allocator for allocator in allocators if "Full" in type(allocator).__name__]
            allocator = (full or allocators)[0]
            self.kind = "full_attention" if full else "sliding_attention"
            self.page_size = self._write_stride = require(cache, "block_size")
            self._group = require(allocator, "_index")
            self.num_pages = cache.num_blocks + 2  # two for padding
        if self.kind == "sliding_attention":
            self.window = require(allocator, "sliding_window")
        self.table: dict[str, list[int]] = require(allocator, "block_table")

    def slots_of(self, batch_data: dict[str, Any]) -> StepSlots:
        """Where the tokens of a step go, from what the engine passes to the model."""
        tokens_N = batch_data["input_ids"].view(-1)
        if batch_data["block_table"] is not None:
            return StepSlots(
                tokens_N,
                self._write_stride // self.page_size,
                block_table_RB=batch_data["block_table"][self._group],
                positions_N=batch_data["position_ids"].view(-1),
            )
        return StepSlots(tokens_N, self._write_stride, write_index_N=batch_data["write_index"][self._group])


def name_of(request_id: str, sequence: int) -> str:
    """What continuous batching calls a sequence: forks are its children."""
    return f"{request_id}__child#{sequence - 1}" if sequence else request_id


def sequence_of(name: str) -> int:
    """The number of the sequence that continuous batching calls so."""
    _, forked, child = name.partition("__child#")
    return int(child) + 1 if forked else 0


def longest_sequence(cache: Any, page_size: int) -> int:
    """Tokens of the longest sequence that the cache can hold.

    5.17 gives each group of layers blocks of its own, and asks for one more where a sequence fills its last one: if
    there is none, the engine ends.
    """
    if hasattr(cache, "cache_allocators"):  # 5.18 and later
        return cache.num_blocks * page_size
    most = cache.num_blocks
    own_blocks = bisect_right(range(most + 1), most, key=lambda number: cache.blocks_needed(number, 0)) - 1
    return own_blocks * page_size - 2


def require(owner: Any, name: str) -> Any:
    """An attribute of something of transformers; `CaptureError` where this release has none."""
    if not hasattr(owner, name):
        raise CaptureError(
            f"transformers' {type(owner).__name__} has no {name!r}",
            expected=SUPPORTED,
            fix="Install a supported release, or open an issue with the version.",
        )
    return getattr(owner, name)
