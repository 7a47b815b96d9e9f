"""The insides of transformers' continuous batching, in every supported release (5.17 to 5.23): its loop.

`BatchLoop` stands beside a manager: it says where the tokens of a step go, tells a listener what becomes of a request's
pages, and lets other threads act between two steps. What is joined and where:

    prepare_next_batch          between two steps: run what other threads asked for
      schedule_batch            nothing is scheduled while paused
      clear_cancelled_requests  a cancelled request is over, and its partial output is delivered
      offload, restore          a request is preempted; keys return from the host
    _generation_step            a step is launched
      _get_forward_fn           the forward and then the listener's commit; both inside the CUDA graph
      _get_graph_key            which has a commit or none
    update_batch                results of a step (with asynchronous batching, of the one before)
      mark_*_complete           equal pages become one
      copy                      a fork copies pages
    search_prefix_match         no shared page is written again
    free_blocks                 a request gives its pages back: finished, cancelled or preempted
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from moetrace.engines.transformers.pages import PageListener, PageMap, name_of, require
from moetrace.errors import EngineError
from moetrace.shadows import shadowed


class BatchLoop:
    """One manager's loop. Joins it at once; `close` leaves it as it was.

    Args:
        manager: a `ContinuousBatchingManager` whose batch processor exists and whose thread has not been started.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._processor = require(manager, "batch_processor")
        self._cache = require(self._processor, "cache")
        self._scheduler = require(self._processor, "scheduler")
        self._runner = require(self._processor, "model_runner")
        self._offloading = require(self._processor, "offloading_manager")
        self._wake_up = getattr(manager, "_wake_up_loop", None) or require(manager, "_has_new_requests")
        self.pages = PageMap(self._cache)
        self.offloads_to_host = bool(getattr(manager.continuous_batching_config, "cpu_offload_space", 0))
        self.paused = False
        self.at_rest = threading.Event()
        """Set while the generation thread waits for the device or has nothing to launch: whoever takes Python's lock
        then makes no step late. Always set without asynchronous batching, where that thread waits inside its steps."""
        self.at_rest.set()
        self._listener: PageListener | None = None
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._cancelled: dict[str, Any] = {}
        self._preempting = False
        self._stale: set[str] = set()
        self._joined = ExitStack()
        self._finish_this_thread()
        with self.on_compute_stream():  # where the warm-up comes next
            _clear(self._cache)
        self.join(self._processor, "prepare_next_batch", self._between_steps)
        self.join(self._scheduler, "schedule_batch", self._schedule)
        self.join(self._scheduler, "clear_cancelled_requests", self._cancel)
        self.join(self._cache, _mark_complete_name(self._cache), self._mark_complete)
        if not hasattr(self._cache, "cache_allocators"):
            self.join(self._cache, "search_prefix_match", self._match_prefix)
        self.join(self._cache, "free_blocks", self._free)
        self.join(self._offloading, "offload_requests", self._preempt)
        if self.device.type == "cuda":
            self.join(self._processor, "_generation_step", self._after_this_thread)
        if self._processor.use_async_batching:
            self.join(self._processor.inputs_and_outputs, "prepare_batch_update", self._wait)

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return torch.device(self._cache.device)

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of one step, padding included."""
        return self._cache.max_batch_tokens

    def listen(self, listener: PageListener) -> None:
        """Tell `listener` everything from now on."""
        self._finish_this_thread()
        self._listener = listener
        self.join(self._processor, "_generation_step", self._launch)
        self.join(self._processor, "update_batch", self._update)
        self.join(self._runner, "_get_forward_fn", self._forward_fn)
        for device_io in self._device_ios():
            self.join(device_io, "_get_graph_key", lambda own: (*own(), listener.is_on))
        copy = "perform_cache_copy" if hasattr(self._cache, "perform_cache_copy") else "copy_cache"
        self.join(self._cache, copy, self._copy)
        self.join(self._offloading, "restore_scheduled_requests", self._restore)

    def call(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` on the generation thread between two steps, on the compute stream; its result is the future's."""
        future: Future[Any] = Future()
        self._tasks.put((task, future))
        self._wake_up.set()
        return future

    def pause(self) -> None:
        """Launch no further step until `resume`; requests stay, and new ones wait."""
        self.paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False
        self._wake_up.set()

    def close(self) -> None:
        """Leave the manager as it was; tasks that were never run fail. CUDA graphs go now, before their memory pool:
        garbage collection keeps no order, and comes at any time."""
        self._joined.close()
        self.at_rest.set()
        for device_io in self._device_ios():
            device_io.graphs = type(device_io.graphs)()
        while not self._tasks.empty():
            self._tasks.get()[1].set_exception(EngineError("the engine stopped before this was done"))

    def forget_prefixes(self) -> None:
        """Share no page that exists now with a later request: its keys are of other weights, or their rows are not
        there. To be run by `call`."""
        scheduler = self._scheduler
        offloaded = {name: state for name, state in scheduler.waiting_requests.items() if state.is_cpu_offloaded}
        computed = scheduler.active_requests | offloaded
        self._stale = {  # with what will be forked from them
            name_of(request_id, sequence)
            for request_id, state in computed.items()
            for sequence in range(state.num_children + 1)
        }
        if hasattr(self._cache, "cache_allocators"):  # 5.18 and later
            self._cache.evict_cached_blocks()
            for allocator in self._cache.cache_allocators.values():
                allocator.ledger.hash_to_block.clear()
                allocator.ledger.block_to_hash.clear()
            return
        blocks = self._cache._block_manager
        for unused in blocks._init_block_ids:
            blocks._id_to_block.pop(unused)
            blocks._uninit_block_ids.append(unused)
        blocks._init_block_ids.clear()
        blocks._hash_to_id.clear()
        for block in blocks._id_to_block.values():
            block.hash = None

    def running(self) -> dict[str, tuple[list[int], int]]:
        """The pages of each running request, and how many of its positions hold what its tokens were really sampled
        from. To be run by `call`."""
        return {name: self.pages_of(name) for name in self._scheduler.active_requests}

    def pages_of(self, request_id: str) -> tuple[list[int], int]:
        """The same of one request; none and 0 where it does not run."""
        state = self._scheduler.active_requests.get(request_id)
        if state is None:
            return [], 0
        return list(self.pages.table.get(request_id, ())), _settled(state)

    @contextmanager
    def on_compute_stream(self) -> Any:
        """The stream that steps run on, or nothing on a CPU."""
        stream = self._processor.inputs_and_outputs.compute_stream
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            yield

    def join(self, owner: Any, name: str, step_in: Callable[..., Any]) -> None:
        """Call `step_in(own, *args)` wherever the loop calls `owner.name(*args)`; who joins last is called first."""
        own = require(owner, name)

        def joined(*args: Any, **kwargs: Any) -> Any:
            return step_in(own, *args, **kwargs)

        self._joined.enter_context(shadowed(owner, name, joined))

    def _device_ios(self) -> list[Any]:
        """Where CUDA graphs are kept: two with asynchronous batching."""
        io = self._processor.inputs_and_outputs
        return [pair.device_io for pair in io.io_pairs] if hasattr(io, "io_pairs") else [io]

    def _between_steps(self, own: Callable[[], bool]) -> bool:
        while not self._tasks.empty():
            task, future = self._tasks.get()
            try:
                with self.on_compute_stream(), torch.no_grad():
                    future.set_result(task())
            except Exception as error:  # the caller's error, not the loop's
                future.set_exception(error)
        has_work = own()
        if not has_work:
            self.at_rest.set()
        return has_work

    def _wait(self, own: Callable[[], Any]) -> Any:
        self.at_rest.set()
        try:
            return own()
        finally:
            self.at_rest.clear()

    def _schedule(self, own: Callable[..., Any], *budgets: int) -> Any:
        if self.paused:
            return [], False, 0, 0
        requests, *rest = own(*budgets)
        if not requests:
            return requests, *rest
        computing = [request for request in requests if request.query_length]  # others have no place for their logits
        if not computing:
            self._fork()
            return self._schedule(own, *budgets)
        return computing, *rest

    def _fork(self) -> None:
        """A request is forked once all of its prompt but one token is computed, when the results of a step are looked
        at. Before that there is nothing to compute where a shared prefix brought that much at once, or where this is
        the first step after the one that computed it. A step without tokens fails on a CPU; on a GPU it samples from
        what lay in memory, which may be NaN. So: fork now, beside whatever step is running."""
        with shadowed(self._processor.inputs_and_outputs, "prepare_batch_update", lambda: ([], [], None)):
            type(self._processor).update_batch(self._processor)

    def _match_prefix(self, own: Callable[..., int], request_id: str, tokens: list[int]) -> int:
        """Of a prompt that lies in shared pages as a whole 5.17 computes the last position again, in a page that others
        read. Later releases leave that page out."""
        return own(request_id, tokens[:-1])

    def _cancel(self, own: Callable[[], list[Any]]) -> list[Any]:
        scheduler = self._scheduler
        asked = set(scheduler._requests_to_cancel)
        if not asked:
            return own()
        known = scheduler.active_requests | scheduler.waiting_requests
        self._cancelled = {request_id: known[request_id] for request_id in asked & set(known)}
        scheduler._requests_to_fork = [s for s in scheduler._requests_to_fork if s.request_id not in asked]
        states = own()
        scheduler.block_new_requests = False  # as when a request finishes: what was preempted has room now
        for state in states:
            state._status = RequestStatus.FINISHED  # a step in flight must not go on with it
            self.deliver(state.to_generation_output())
        for request_id in asked - set(self._cancelled):  # it is over already, or was to be forked later
            if self._listener is not None:
                self._listener.freed(request_id, [], 0, over=True)
            self.deliver(GenerationOutput(request_id, status=RequestStatus.FINISHED))
        self._cancelled = {}
        if self._listener is not None:
            with self.on_compute_stream():
                self._listener.settle()
        return states

    def deliver(self, output: Any) -> None:
        """Through the engine's own queue, so that what it delivered before comes first."""
        self._processor.output_router.output_queue.put(output)

    def _preempt(self, own: Callable[[], Any]) -> Any:
        self._preempting = True
        host_pool = getattr(self._offloading, "_cpu_pool", None)
        if host_pool is not None:
            host_pool.try_to_free_sectors()  # later releases count what is free on the host before they do this
        try:
            return own()
        finally:
            self._preempting = False

    def _free(self, own: Callable[..., None], request_id: str, *args: Any, **kwargs: Any) -> None:
        if not (self._preempting and self.offloads_to_host):
            self._stale.discard(request_id)  # what comes back is computed anew
        if self._listener is not None:
            pages = list(self.pages.table.get(request_id, ()))
            if request_id in self._cancelled:
                computed = self._cancelled[request_id].position_offset
                self._listener.freed(request_id, pages, computed, over=True)
            elif self._preempting:
                computed = _settled(self._scheduler.active_requests[request_id])
                self._listener.freed(request_id, pages, computed, over=False)
            else:
                self._listener.freed(request_id, pages, None, over=True)
        own(request_id, *args, **kwargs)

    def _mark_complete(self, own: Callable[..., None], state: Any, complete: Any) -> None:
        if not complete or state.request_id in self._stale:
            return
        table = self.pages.table.get(state.request_id, [])
        before = list(table)
        own(state, complete)
        if self._listener is not None:
            for index, (was, now) in enumerate(zip(before, table, strict=True)):
                if was != now:
                    self._listener.replaced(state.request_id, index, was)

    def _after_this_thread(self, own: Callable[..., None], model: nn.Module) -> None:
        """The engine copies forked pages, and without asynchronous batching writes a step's inputs, on this thread's
        current stream; the compute stream reads them and does not wait. Under load a step would compute the tokens of
        the step before it again, and a fork read what its pages held before."""
        self._processor.inputs_and_outputs.compute_stream.wait_stream(torch.cuda.current_stream(self.device))
        own(model)

    def _finish_this_thread(self) -> None:
        """Wait until this thread's current stream has done all it was given: the engine's static inputs, and a
        listener's buffers, are filled there, and the warm-up uses them on other streams, which do not wait. On a busy
        GPU staging would be emptied while experts read their ids from it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _launch(self, own: Callable[..., None], model: nn.Module) -> None:
        assert self._listener is not None
        with self.on_compute_stream():
            self._listener.settle()
        own(model)

    def _update(self, own: Callable[[], None]) -> None:
        assert self._listener is not None
        try:
            own()
        finally:
            with self.on_compute_stream():
                self._listener.settle(computed=True)  # the host has waited for this step, and the next one runs already

    def _forward_fn(self, own: Callable[..., tuple[Callable, bool]], use_block_table: bool) -> tuple[Callable, bool]:
        forward, in_graph = own(use_block_table)

        def forward_and_commit(model: nn.Module, batch_data: dict[str, Any], *rest: Any) -> None:
            assert self._listener is not None
            with self._listener.forwards():
                forward(model, batch_data, *rest)
            self._listener.after_forward(self.pages.slots_of(batch_data))

        return forward_and_commit, in_graph

    def _copy(self, own: Callable[..., None], *blocks: Any) -> None:
        assert self._listener is not None
        sources, targets = blocks[0][self.pages.kind] if len(blocks) == 1 else blocks
        if sources:
            self._listener.copied(list(sources), list(targets))
        own(*blocks)

    def _restore(self, own: Callable[[list[Any]], None], requests: list[Any]) -> None:
        returning = [request.state for request in requests if request.state.is_cpu_offloaded]
        own(requests)
        for state in returning:
            with self.on_compute_stream():
                assert self._listener is not None
                self._listener.restored(state.request_id, list(self.pages.table[state.request_id]))


def _settled(state: Any) -> int:
    """Positions whose rows count if the request is computed again: the result of a step in flight is thrown away then,
    and its token sampled again."""
    return min(state.position_offset, len(state.initial_tokens) + len(state.generated_tokens) - 1)


def _mark_complete_name(cache: Any) -> str:
    return "mark_complete_blocks" if hasattr(cache, "mark_complete_blocks") else "mark_shareable_blocks_as_complete"


def _clear(cache: Any) -> None:
    """Zero the keys and values. What was never written is read too, with a weight of zero, and zero times what happens
    to lie in memory may be NaN. Releases after 5.17 do it themselves."""
    for tensor in (*getattr(cache, "key_cache", ()), *getattr(cache, "value_cache", ())):
        tensor.zero_()
