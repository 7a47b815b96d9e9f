"""A replayed step gives its routes to the device in one copy, and makes the host wait for nothing.

On a CPU by what torch dispatches: reading a number, or sizes that depend on values, is what makes a host wait for a
GPU, and so does indexing by a list, which is copied there first. On a GPU by torch's own synchronisation debug mode,
and by keeping the device busy: a host that waits for nothing is through before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from families import ONE_OF_EACH, build, random_routes, random_tokens, trace_of
from torch.utils._python_dispatch import TorchDispatchMode

from moetrace import record, replay
from moetrace.errors import ShiftedRoutesError
from moetrace.layout import MoeLayout
from moetrace.replayer import ReplayPolicy, ReplaySession, align, router_scores, router_shift
from moetrace.replayer import alarm as alarms
from moetrace.replayer.drift import RouterScores
from moetrace.replayer.upload import RoutesUpload
from moetrace.trace import RoutingTrace

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "lift_fresh",
    "index",
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
POLICIES = {"all": ReplayPolicy(), "margin": ReplayPolicy(margin=0.05), "mask": ReplayPolicy([[1, 0] * 10] * 2)}


class Watch(TorchDispatchMode):
    """Names of the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def around(monkeypatch: pytest.MonkeyPatch, kind: Any, context: Callable[[], Any]) -> Iterator[None]:
    """Run every `on_selection` of a kind of session inside a context."""
    plain = kind.on_selection

    def on_selection(self: Any, selection: Any) -> None:
        with context():
            plain(self, selection)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "on_selection", on_selection)
        yield


def traces(model: Any, name: str, tokens: torch.Tensor) -> list[RoutingTrace]:
    routes = random_routes(tokens.numel(), name).reshape(*tokens.shape, -1, random_routes(1, name).shape[-1])
    valid = np.arange(tokens.shape[1]) % 7 != 3
    return [trace_of(model, row, ids, valid_T=valid) for row, ids in zip(routes, tokens, strict=True)]


def run(model: Any, name: str, policy: ReplayPolicy, device: str = "cpu") -> ReplaySession:
    """Two forwards and backwards: the second one counts what the first one kept."""
    tokens = random_tokens(2, 20)
    with replay(
        model, traces(model, name, tokens), input_ids=tokens, missing="live", policy=policy, on_shift="ignore"
    ) as session:
        for _ in range(2):
            model(tokens.to(device)).logits.float().square().mean().backward()
    return session


def step(model: Any, tokens: torch.Tensor, context: Any = None, **inputs: Any) -> torch.Tensor:
    """The forward of a training step within a context, to its loss."""
    with context or nullcontext():
        return model(tokens, use_cache=False, **inputs).logits.float().square().mean()


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_whole_step_reads_no_more_values_than_without_replay(
    name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "defers", lambda device: True)
    model, tokens = build(name, experts="batched_mm").train(), random_tokens(2, 20)  # eager ones read the routes
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    read = []
    for context in (None, replay(model, traces(model, name, tokens), input_ids=tokens, missing="live")):
        with Watch() as watch:
            step(model, tokens, context).backward()
        read.append(Counter(operation for operation in watch.names if operation in WAITING))
    assert read[0] == read[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nothing_in_a_selection_reads_a_value(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    with around(monkeypatch, ReplaySession, lambda: watch):
        session = run(build(name), name, POLICIES[policy])
    assert len(watch.names) > 20
    assert WAITING.isdisjoint(watch.names)
    assert session.stats().forwards == 2


def test_nothing_in_collecting_router_scores_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, watch = build("mixtral"), random_tokens(1, 8), Watch()
    with torch.no_grad(), around(monkeypatch, RouterScores, lambda: watch):
        with router_scores(model) as old:
            model(tokens)
        with router_scores(model, of=old) as new:
            model(tokens)
    with watch:
        router_shift(old.log_probs_LNK, new.log_probs_LNK).weights_N(0.8)
    assert len(watch.names) > 10
    assert WAITING.isdisjoint(watch.names)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2]),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_watch_sees_what_makes_a_host_wait(wait: Callable) -> None:
    with Watch() as watch:
        wait(torch.ones(3))
    assert not WAITING.isdisjoint(watch.names)


def test_session_and_statistics_share_one_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    plain = RoutesUpload._upload

    def counted(self: RoutesUpload, device: torch.device) -> Any:
        uploads.append(device)
        return plain(self, device)

    monkeypatch.setattr(RoutesUpload, "_upload", counted)
    run(build("mixtral"), "mixtral", ReplayPolicy()).stats()
    assert uploads == [torch.device("cpu")]


@pytest.mark.parametrize("num_experts", [2, 256, 257, 32768, 32769, 65536])
def test_an_upload_is_views_of_one_buffer_with_every_id_as_it_was(num_experts: int) -> None:
    layout = MoeLayout((0, 3), num_experts, 2)
    ids_TLK = np.array([[[num_experts - 1, 0], [0, num_experts - 1]]] * 3)
    routes = align(
        [RoutingTrace.build(ids_TLK, layout, [1, 2, 3, 4])], [[9, 1, 2, 3, 4]], attention_mask=[[0, *[1] * 4]]
    )
    upload = RoutesUpload(routes)
    tokens_N, sequence_N, experts_LNK, replayed_N, follows_N = upload.on(torch.device("cpu"))
    assert tokens_N.tolist() == [-1, 1, 2, 3, 4]
    assert sequence_N.tolist() == [0] * 5
    assert experts_LNK.tolist() == routes.experts_LNK.tolist()
    assert replayed_N.tolist() == [False, True, True, True, False]
    assert follows_N.tolist() == [False, False, True, True, False]
    storages = {
        tensor.untyped_storage().data_ptr() for tensor in (tokens_N, sequence_N, experts_LNK, replayed_N, follows_N)
    }
    assert len(storages) == 1
    assert upload.on(torch.device("cpu")).experts_LNK is experts_LNK


@contextmanager
def refusing() -> Iterator[None]:
    """Let torch raise wherever its host would wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_on_a_gpu_no_selection_waits_and_one_pinned_copy_is_made(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, dtype=torch.bfloat16).cuda()
    with around(monkeypatch, ReplaySession, refusing):
        session = run(model, name, POLICIES[policy], "cuda")
    assert session.stats().forwards == 2
    routes = align(traces(model, name, random_tokens(2, 20)), random_tokens(2, 20), missing="live")
    with torch.profiler.profile() as profile:
        RoutesUpload(routes).on(torch.device("cuda"))
        torch.cuda.synchronize()
    copies = [event.name for event in profile.events() if "Memcpy HtoD" in event.name]
    assert len(copies) == 1
    assert "Pinned" in copies[0]


CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])


def on_gpu(reentrant: bool | None, by: int = 0) -> tuple[Callable[..., torch.Tensor], Callable[[], Any]]:
    """The step of a model that waits for nothing itself, and replays of its own routes, `by` tokens late."""
    model = build("mixtral", experts="batched_mm").cuda().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tokens = random_tokens(1, 64)
    causal = torch.full((1, 1, 64, 64), torch.finfo(torch.float32).min, device="cuda").triu(1)
    # with a whole mask the model does not look for packed sequences, and so does not wait
    own_step = partial(step, model, tokens.cuda(), attention_mask=causal)
    with torch.no_grad(), record(model) as recording:
        own_step()
    (own,) = recording.traces(tokens)
    ids_TLK = np.roll(own.experts_TLK, by, axis=0)
    given = RoutingTrace.build(ids_TLK, own.layout, tokens[0].numpy(), fingerprint=own.fingerprint)
    for _ in range(2):  # pinned memory, handles of libraries
        own_step(replay(model, given, input_ids=tokens, on_shift="warn")).backward()
    with refusing():
        own_step().backward()
    return own_step, lambda: replay(model, given, input_ids=tokens)


@NEEDS_GPU
@CHECKPOINTS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_on_a_gpu_a_step_whose_counts_are_ready_waits_for_nothing(
    reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_step, replaying = on_gpu(reentrant)
    with refusing():
        loss = own_step(replaying())
    torch.cuda.synchronize()  # the counts are ready
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _: pytest.fail("a wait that no debug mode sees"))
    with refusing():
        loss.backward()


@NEEDS_GPU
@CHECKPOINTS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_on_a_gpu_a_forward_is_over_before_the_device_has_begun_it(reentrant: bool | None) -> None:
    own_step, replaying = on_gpu(reentrant)
    torch.cuda._sleep(2_000_000_000)  # about a second
    began = torch.cuda.Event()
    began.record()
    loss = own_step(replaying())
    assert not began.query(), "the host waited for the device"
    loss.backward()
    assert began.query(), "the counts were judged before they were there"


@NEEDS_GPU
@CHECKPOINTS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_on_a_gpu_backward_raises_the_alarm(reentrant: bool | None) -> None:
    own_step, replaying = on_gpu(reentrant, by=1)
    loss = own_step(replaying())
    with pytest.raises(ShiftedRoutesError):
        loss.backward()
    with torch.no_grad(), pytest.raises(ShiftedRoutesError):
        own_step(replaying())
