"""What `record` keeps is what the experts received, for every family, batch shape and thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    EXPERTS_IMPLEMENTATIONS,
    FAMILIES,
    NAMES,
    ONE_OF_EACH,
    build,
    experts_spy,
    left_behind,
    loss_of,
    random_routes,
    random_tokens,
    routers_of,
    traces_of,
)
from torch.utils.checkpoint import checkpoint

from moetrace import record, replay
from moetrace.errors import RouterError, TokenMismatchError
from moetrace.routers import fingerprint_of, layout_of


def alone(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """`[T, L, K]` of one sequence in a batch of its own."""
    with torch.no_grad(), record(model) as recording:
        model(tokens[None], use_cache=False)
    return recording.experts_LNK.permute(1, 0, 2).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("experts", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_ids_are_those_the_experts_received(name: str, experts: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype, experts=experts)
    assert model.config._experts_implementation == experts
    with torch.no_grad(), record(model) as recording, experts_spy(model, name) as spy:
        model(random_tokens(2, 24))
    assert recording.experts_LNK.dtype == torch.int64
    assert torch.equal(recording.experts_LNK, spy.last())


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_models_route_diversely_enough_to_prove_anything(name: str) -> None:
    model = build(name)
    with torch.no_grad(), experts_spy(model, name) as spy:
        model(random_tokens(2, 24))
    for ids_NK in spy.last():
        assert len(ids_NK.unique()) >= FAMILIES[name].num_experts - 2
        assert len(ids_NK.sort(-1).values.unique(dim=0)) >= 10
    assert not torch.equal(*spy.last()[:2])


@pytest.mark.parametrize("name", NAMES)
def test_recording_changes_no_logit(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 24)
    with torch.no_grad():
        plain = model(tokens).logits
        with record(model):
            assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_states_order_layout_tokens_and_fingerprint(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 5)
    with torch.no_grad(), record(model) as recording, experts_spy(model, name) as spy:
        model(tokens)
    traces = recording.traces(tokens)
    assert [trace.order for trace in traces] == [FAMILIES[name].order] * 2
    for trace, sequence in zip(traces, tokens, strict=True):
        assert trace.layout == layout_of(model)
        assert trace.tokens is not None
        assert trace.tokens.tolist() == sequence.tolist()
        assert trace.fingerprint == fingerprint_of(model)
        assert trace.num_rows == trace.num_valid == 5
        assert trace.engine == f"torch {torch.__version__}"
    rows = np.stack([trace.experts_TLK for trace in traces])
    assert np.array_equal(rows.reshape(10, *rows.shape[2:]), spy.last().permute(1, 0, 2).numpy())


@pytest.mark.parametrize("name", ["mixtral", "mixtral_16", "qwen3_moe", "gpt_oss"])
def test_rank_order_is_best_first(name: str) -> None:
    model = build(name)
    with torch.no_grad(), experts_spy(model, name) as spy, record(model) as recording:
        model(random_tokens(1, 24))
    assert (spy.last(1).diff(dim=-1) <= 0).all()
    assert torch.equal(spy.last(0), recording.experts_LNK)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_sequence_the_rows_it_has_alone(name: str, side: str) -> None:
    model, lengths, width = build(name), (24, 9, 17, 1), 24
    sequences = [random_tokens(length, seed=length) for length in lengths]
    tokens, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, where], mask[row, where] = sequence, 1
    mask = mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), record(model) as recording:
        model(tokens, attention_mask=mask, position_ids=positions)
    traces = recording.traces(tokens, attention_mask=mask)
    assert len(traces) == len(sequences)
    for trace, sequence in zip(traces, sequences, strict=True):
        assert trace.tokens is not None
        assert trace.tokens.tolist() == sequence.tolist()
        assert np.array_equal(trace.experts_TLK, alone(model, sequence))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["position_ids", "cu_seqlens"])
def test_a_packed_batch_gives_each_sequence_the_rows_it_has_alone(name: str, by: str) -> None:
    model, lengths = build(name), (11, 1, 20, 7)
    sequences = [random_tokens(length, seed=length) for length in lengths]
    tokens = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if name == "gpt_oss":  # does not tell its attention masks apart by position_ids (transformers 5.23)
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        seen = (number[:, None] == number[None]) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        inputs["attention_mask"] = {"full_attention": mask, "sliding_attention": mask}
    with torch.no_grad(), record(model) as recording:
        model(tokens, **inputs)
    where = {"position_ids": positions} if by == "position_ids" else {"cu_seqlens": np.cumsum((0, *lengths))}
    traces = recording.traces(tokens, **where)
    assert [trace.num_rows for trace in traces] == list(lengths)
    for trace, sequence in zip(traces, sequences, strict=True):
        assert np.array_equal(trace.experts_TLK, alone(model, sequence))


def test_a_jagged_batch_gives_each_sequence_the_rows_it_has_as_a_packed_one() -> None:
    model, lengths = build("mixtral"), (5, 9, 3)
    packed, positions = random_tokens(1, sum(lengths)), torch.cat([torch.arange(length) for length in lengths])[None]
    rows = list(packed[0].split(lengths))
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with torch.no_grad(), record(model) as recording:
        model(nested.values()[None], position_ids=positions, use_cache=False)
    expected = recording.traces(packed, position_ids=positions)
    assert recording.traces(nested) == recording.traces(rows) == expected
    assert [len(trace) for trace in expected] == [5, 9, 3]


def test_a_recording_keeps_the_last_forward() -> None:
    model, first, second = build("mixtral"), random_tokens(1, 9, seed=1), random_tokens(1, 5, seed=2)
    with torch.no_grad(), record(model) as recording, experts_spy(model, "mixtral") as spy:
        model(first)
        assert torch.equal(recording.experts_LNK, spy.last())
        kept = recording.experts_LNK.clone()
        model(second)
    assert kept.shape[1] == 9
    assert torch.equal(recording.experts_LNK, spy.last())
    assert np.array_equal(recording.traces(second)[0].experts_TLK, alone(model, second[0]))


def test_a_recording_without_a_whole_forward_has_no_routes() -> None:
    model = build("mixtral")
    with record(model) as recording:
        pass
    with pytest.raises(RouterError, match="no whole forward"):
        _ = recording.experts_LNK

    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    with record(model) as recording:
        model(random_tokens(1, 4))
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="midway"):
            model(random_tokens(1, 4, seed=1))
        handle.remove()
    with pytest.raises(RouterError, match="expected 3 layers, got 1"):
        _ = recording.experts_LNK


def test_traces_of_another_batch_are_refused() -> None:
    model = build("mixtral")
    with record(model) as recording:
        model(random_tokens(2, 4))
    with pytest.raises(RouterError, match="not the one that ran: expected 8 tokens, got 6"):
        recording.traces(random_tokens(2, 3))


SAME_SIZE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], dict[str, Any]], str]] = {
    "padding on the other side": (
        lambda tokens, mask: {"input_ids": torch.stack([tokens[0].roll(2), tokens[1]]), "attention_mask": mask.flip(1)},
        "sequence 0: first difference at position 0",
    ),
    "rows in another order": (
        lambda tokens, mask: {"input_ids": tokens.flip(0), "attention_mask": mask.flip(0)},
        "sequence 0: first difference at position 0",
    ),
    "one token": (
        lambda tokens, mask: {"input_ids": tokens + (torch.arange(6) == 5), "attention_mask": mask},
        "sequence 1: first difference at position 5",
    ),
}


@pytest.mark.parametrize("wrong", SAME_SIZE)
def test_traces_of_another_batch_of_the_same_size_are_refused(wrong: str) -> None:
    """Its rows would be those of other tokens, each of them valid."""
    model, tokens, mask = build("mixtral"), random_tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    with torch.no_grad(), record(model) as recording:
        model(tokens, attention_mask=mask)
    batch, message = SAME_SIZE[wrong]
    with pytest.raises(TokenMismatchError, match=message):
        recording.traces(**batch(tokens, mask))
    padded = tokens.masked_fill(mask == 0, 3)
    assert [trace.num_rows for trace in recording.traces(padded, attention_mask=mask)] == [4, 6]


def test_tokens_of_a_recording_are_those_of_its_last_forward() -> None:
    model, first, second = build("mixtral"), random_tokens(1, 6), random_tokens(1, 6, seed=1)
    with torch.no_grad(), record(model) as outer:
        model(first)
        with replay(model, traces_of(model, random_routes(6, "mixtral"), second), input_ids=second, on_shift="ignore"):
            with record(model) as inner:
                model(second)
                ids = second.clone()
                second += 1  # the caller's to change
            with pytest.raises(TokenMismatchError, match="called with other tokens"):
                model(first)
    for recording in (outer, inner):
        assert np.array_equal(recording.traces(ids)[0].experts_TLK, random_routes(6, "mixtral"))
        with pytest.raises(TokenMismatchError):
            recording.traces(first)
    with torch.no_grad(), record(model) as recording:
        model(first)
        model(inputs_embeds=model.get_input_embeddings().weight[ids])
    assert recording.traces(ids)[0].num_rows == 6  # nobody knows
    model.config.image_token_id = int(first[0, 2])
    with torch.no_grad(), record(model) as recording:
        model(ids.where(torch.arange(6) == 2, first))
    recording.traces(first)  # some models look up others in an image's place


def test_two_models_recorded_at_once_do_not_mix() -> None:
    mixtral, qwen = build("mixtral"), build("qwen3_moe")
    same = build("mixtral", seed=1)
    tokens = random_tokens(1, 16)
    models = {"mixtral": (mixtral, "mixtral"), "qwen": (qwen, "qwen3_moe"), "same architecture": (same, "mixtral")}
    expected = {what: alone(model, tokens[0]) for what, (model, _) in models.items()}
    with torch.no_grad(), record(mixtral) as a, record(qwen) as b, record(same) as c:
        for model, _ in models.values():
            model(tokens)
    for recording, what in ((a, "mixtral"), (b, "qwen"), (c, "same architecture")):
        assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), expected[what])
    assert not np.array_equal(expected["mixtral"], expected["same architecture"])


def run_threads(*works: Callable[[], None]) -> None:
    """Run each function on a thread of its own; the first failure is raised here."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_threads_recording_one_model_do_not_mix(name: str) -> None:
    model = build(name)
    tokens = [random_tokens(12, seed=1), random_tokens(12, seed=2)]
    expected = [alone(model, sequence) for sequence in tokens]
    assert not np.array_equal(expected[0], expected[1])
    barrier = threading.Barrier(2, timeout=30)
    recorded: dict[int, np.ndarray] = {}

    def in_step(*_: Any) -> None:
        barrier.wait()

    def work(number: int) -> None:
        with torch.no_grad(), record(model) as recording:
            model(tokens[number][None])
            recorded[number] = recording.experts_LNK.permute(1, 0, 2).numpy()

    handles = [layer.register_forward_pre_hook(in_step) for layer in model.model.layers]
    run_threads(lambda: work(0), lambda: work(1))
    for handle in handles:
        handle.remove()
    for number in (0, 1):
        assert np.array_equal(recorded[number], expected[number])
    assert left_behind(model) == []


def test_a_thread_that_does_not_record_is_not_recorded() -> None:
    model, mine, other = build("mixtral"), random_tokens(1, 6, seed=1), random_tokens(1, 8, seed=2)
    with torch.no_grad(), record(model) as recording:
        model(mine)
        run_threads(lambda: model(other))
        assert recording.experts_LNK.shape[1] == 6


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_recording_leaves_nothing_behind(name: str) -> None:
    model = build(name)
    with record(model):
        assert all("forward" in vars(router) for router in routers_of(model, name))
        model(random_tokens(1, 4))
    assert left_behind(model) == []

    def fail() -> None:
        with record(model):
            model(random_tokens(1, 4))
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        fail()
    assert left_behind(model) == []


def test_a_forward_that_was_shadowed_before_is_restored() -> None:
    model = build("mixtral")
    router = model.model.layers[0].mlp.gate
    calls = []
    before = router.forward

    def shadow(hidden: torch.Tensor) -> Any:
        calls.append(1)
        return before(hidden)

    router.forward = shadow
    with record(model):
        model(random_tokens(1, 4))
    assert calls == [1]
    assert router.forward is shadow


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("outer", ["record", "replay"])
def test_a_recording_under_replay_keeps_the_ids_that_were_used(name: str, outer: str) -> None:
    model, tokens = build(name), random_tokens(2, 10)
    routes = random_routes(20, name)
    traces = traces_of(model, routes, tokens)
    with torch.no_grad(), experts_spy(model, name) as spy:
        if outer == "record":
            with record(model) as recording, replay(model, traces, input_ids=tokens, on_shift="ignore"):
                model(tokens)
        else:
            with replay(model, traces, input_ids=tokens, on_shift="ignore"), record(model) as recording:
                model(tokens)
    assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), routes)
    assert torch.equal(recording.experts_LNK, spy.last())
    assert left_behind(model) == []


@pytest.mark.parametrize("order", ["rank", "set"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_recording_under_replay_claims_no_rank_that_the_routes_do_not_have(name: str, order: str) -> None:
    """Ids of a set ascend; the live router's would have come best first."""
    model, tokens = build(name), random_tokens(2, 10)
    traces = traces_of(model, random_routes(20, name), tokens)
    if order == "set":
        traces = [trace.as_set() for trace in traces]
    with torch.no_grad(), replay(model, traces, input_ids=tokens, on_shift="ignore"), record(model) as recording:
        model(tokens)
    for used, given in zip(recording.traces(tokens), traces, strict=True):
        assert np.array_equal(used.experts_TLK, given.experts_TLK)
        assert used.order == ("rank" if order == FAMILIES[name].order == "rank" else "set")


@pytest.mark.parametrize("outer", ["whole model", "decoder"])
def test_recording_the_decoder_of_a_replayed_model_keeps_the_ids_that_were_used_or_is_refused(outer: str) -> None:
    model, tokens = build("qwen3_moe"), random_tokens(1, 10)
    routes = random_routes(10, "qwen3_moe")
    replaying = replay(model, traces_of(model, routes, tokens), input_ids=tokens, on_shift="ignore")
    recording = record(model.model)
    used = None
    with torch.no_grad(), suppress(RouterError), experts_spy(model, "qwen3_moe") as spy:
        if outer == "whole model":
            with replaying, recording as decoder:
                model(tokens)
                used = decoder.experts_LNK
        else:
            with recording as decoder, replaying:
                model(tokens)
                used = decoder.experts_LNK
    if used is not None:
        assert np.array_equal(used.permute(1, 0, 2).numpy(), routes)
        assert torch.equal(used, spy.last())
    assert left_behind(model) == []


def test_contexts_of_a_model_and_its_decoder_may_end_in_any_order_or_are_refused() -> None:
    model = build("mixtral")
    first, second = record(model), record(model.model)
    first.__enter__()
    recording = None
    with suppress(RouterError):
        recording = second.__enter__()
    first.__exit__(None, None, None)
    if recording is not None:
        model(random_tokens(1, 4))
        assert recording.experts_LNK.shape[1] == 4
        second.__exit__(None, None, None)
    assert left_behind(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("forward", ["inside", "before"])
def test_a_recomputation_is_never_recorded(reentrant: bool, forward: str) -> None:
    model, earlier, later = build("qwen3_moe").train(), random_tokens(1, 7, seed=1), random_tokens(1, 9, seed=2)
    expected = alone(model.eval(), later[0])
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})

    def loss() -> torch.Tensor:
        return loss_of(model(earlier, use_cache=False).logits)

    pending = loss() if forward == "before" else None
    with record(model) as recording:
        pending = loss() if pending is None else pending
        model(later, use_cache=False)
        pending.backward()
        assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), expected)
    assert left_behind(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_made_by_hand_does_not_spoil_a_recording(reentrant: bool) -> None:
    model, tokens = build("qwen3_moe").train(), random_tokens(1, 9)
    expected = alone(model, tokens[0])
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(
        lambda hidden: plain(hidden, **kwargs), hidden, use_reentrant=reentrant
    )
    with record(model) as recording:
        loss_of(model(tokens, use_cache=False).logits).backward()
        assert np.array_equal(recording.experts_LNK.permute(1, 0, 2).numpy(), expected)
