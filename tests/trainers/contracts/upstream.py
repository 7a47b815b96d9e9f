"""What trainers' own code makes of routes: run where a trainer is installed, kept in `upstream.json` for all others.

`python upstream.py NAME ORIGIN` runs one and writes down what it saw; no trainer's code is here. The sequences are
those of `SEQUENCES`, an engine's rows of them are in closed form.

Axes: n tokens of a sequence, D decoder layers, K experts per token.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from documented import trace_of
from payloads import Case

from moetrace.trainers import contracts

PATH = Path(__file__).with_name("upstream.json")
PROMPTS, RESPONSES = [3, 2], [3, 4]
SEQUENCES = [
    Case("dense around", 12, 3, (1, 2, 4), 6, prompt + response)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
]
TRACES = [trace_of(case) for case in SEQUENCES]
TOKENS = [case.tokens for case in SEQUENCES]
PAD = 7
WIDTHS = 4, 5
"""Of prompts and responses, where a trainer pads to fixed widths."""


def engine_rows(case: Case, dtype: str) -> np.ndarray:
    """`[n - 1, D, K]` as an engine returns them, zeros in dense layers."""
    return np.array(case.all_ids(), dtype).reshape(-1, case.num_layers, case.top_k)


def padded(left: bool) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask`, padded on one side."""
    columns = max(map(len, TOKENS))
    rows = [([PAD] * (columns - len(ids)) + ids if left else ids + [PAD] * (columns - len(ids))) for ids in TOKENS]
    mask = [sorted([1] * len(ids) + [0] * (columns - len(ids)), reverse=not left) for ids in TOKENS]
    return np.array(rows), np.array(mask)


def prompts_left_responses_right() -> tuple[np.ndarray, np.ndarray]:
    rows, mask = [], []
    for ids, prompt, response in zip(TOKENS, PROMPTS, RESPONSES, strict=True):
        before, behind = WIDTHS[0] - prompt, WIDTHS[1] - response
        rows.append([PAD] * before + ids + [PAD] * behind)
        mask.append([0] * before + [1] * len(ids) + [0] * behind)
    return np.array(rows), np.array(mask)


def verl() -> dict[str, Any]:
    import torch

    TensorDict = import_module("tensordict").TensorDict
    AgentLoopMetrics = import_module("verl.experimental.agent_loop.agent_loop").AgentLoopMetrics
    AgentLoopOutput = import_module("verl.experimental.agent_loop.agent_loop").AgentLoopOutput
    _compute_rollout_moe_load_counts = import_module("verl.trainer.ppo.metric_utils")._compute_rollout_moe_load_counts
    align_r3_router_replay_data = import_module("verl.utils.megatron.router_replay_utils").align_r3_router_replay_data
    build_r3_replay_mask = import_module("verl.utils.megatron.router_replay_utils").build_r3_replay_mask
    left_right_2_no_padding = import_module("verl.workers.utils.padding").left_right_2_no_padding

    outputs = [
        AgentLoopOutput(
            prompt_ids=ids[:prompt],
            response_ids=ids[prompt:],
            response_mask=[1] * (len(ids) - prompt),
            routed_experts=engine_rows(case, "uint8"),
            metrics=AgentLoopMetrics(),
        )
        for case, ids, prompt in zip(SEQUENCES, TOKENS, PROMPTS, strict=True)
    ]
    input_ids, mask = prompts_left_responses_right()
    batch = torch.from_numpy(contracts.to_verl_batch(TRACES, input_ids, 6, attention_mask=mask))
    response_mask = torch.from_numpy(mask[:, WIDTHS[0] :])
    data = TensorDict(
        {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
            "response_mask": response_mask,
            "position_ids": torch.arange(sum(WIDTHS)).expand(2, -1),
            "routed_experts": batch.clone(),
        },
        batch_size=[2],
    )
    data = left_right_2_no_padding(data)
    rows = [torch.from_numpy(contracts.to_verl(trace, ids, 6)[:-1]) for trace, ids in zip(TRACES, TOKENS, strict=True)]
    ids = torch.nested.as_nested_tensor([torch.tensor(ids) for ids in TOKENS], layout=torch.jagged)
    counts = _compute_rollout_moe_load_counts(batch, response_mask, 12)
    assert counts is not None
    return {
        "as_dict": [output.as_dict()["routed_experts"].tolist() for output in outputs],
        "jagged": [part.tolist() for part in data["routed_experts"].unbind()],
        "aligned": [
            part.tolist()
            for part in align_r3_router_replay_data(
                torch.nested.as_nested_tensor(rows, layout=torch.jagged), ids
            ).unbind()
        ],
        "replayed": [part.tolist() for part in build_r3_replay_mask(ids, response_mask).unbind()],
        "load": counts.tolist(),
    }


def slime() -> dict[str, Any]:
    import torch

    cp_utils = import_module("slime.backends.megatron_utils.cp_utils")
    validate_rollout_routed_experts_for_replay = import_module(
        "slime.observability.rollout_data_utils"
    ).validate_rollout_routed_experts_for_replay
    Sample = import_module("slime.utils.types").Sample

    args = SimpleNamespace(num_layers=6, moe_router_topk=3, moe_layer_freq=[0, 1, 1, 0, 1, 0])
    produced = []
    for case, ids in zip(SEQUENCES, TOKENS, strict=True):
        sample = Sample(tokens=list(ids))
        routes = base64.b64encode(engine_rows(case, "int32").tobytes()).decode()
        sample._apply_meta_info(args, {"routed_experts": routes}, update_terminal_info=False)
        produced.append(sample.rollout_routed_experts.tolist())
    given = [torch.from_numpy(contracts.to_slime(trace, ids, 6)) for trace, ids in zip(TRACES, TOKENS, strict=True)]
    validate_rollout_routed_experts_for_replay(given, args)
    one_rank = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 1,
        get_context_parallel_world_size=lambda: 1,
        get_context_parallel_rank=lambda: 0,
    )
    with mock.patch.object(cp_utils, "mpu", one_rank):
        prepared = cp_utils.prepare_routed_experts_for_routing_replay(
            given,
            [torch.tensor(ids) for ids in TOKENS],
            num_experts=12,
            data_pad_size_multiplier=1,
            sequence_parallel=False,
            allgather_cp=False,
        )
    return {"produced": produced, "prepared": prepared.tolist()}


def miles() -> dict[str, Any]:
    import torch

    decode_samples_and_merge_input_sample = import_module(
        "miles.rollout.session.samples.codec"
    ).decode_samples_and_merge_input_sample
    encode_samples = import_module("miles.rollout.session.samples.codec").encode_samples
    RoutingReplayManager = import_module("miles.utils.replay_base").RoutingReplayManager
    Sample = import_module("miles.utils.types").Sample

    missing = trace_of(SEQUENCES[0], (1,))
    given = contracts.to_miles(missing, TOKENS[0], 6, missing="dummy")
    sample = Sample(tokens=TOKENS[0], response_length=RESPONSES[0], rollout_routed_experts=given)
    sample.validate()
    (decoded,) = decode_samples_and_merge_input_sample(encode_samples([sample], {}), Sample()).samples
    manager = RoutingReplayManager()
    manager.enabled, manager.stage = True, "replay_forward"
    rows = torch.from_numpy(given[:, 4])
    manager.current = SimpleNamespace(pop_forward=lambda: rows)
    _, used = manager.get_topk_fn(None, True)(torch.rand(len(rows), 12), 3)
    return {"decoded": decoded.rollout_routed_experts.tolist(), "used_in_layer_4": used.tolist()}


def nemo_rl() -> dict[str, Any]:
    import torch

    resolve_routed_experts_dtype = import_module("nemo_rl.models.generation.interfaces").resolve_routed_experts_dtype
    pad_and_align_routed_expert_indices = import_module(
        "nemo_rl.models.generation.vllm.utils"
    ).pad_and_align_routed_expert_indices
    _payload_indices_for_moe_layers = import_module(
        "nemo_rl.models.megatron.router_replay"
    )._payload_indices_for_moe_layers
    _validate_replay_tensor = import_module("nemo_rl.models.megatron.router_replay")._validate_replay_tensor
    decode_routed_experts = import_module("nemo_rl.utils.routed_experts_codec").decode_routed_experts
    encode_routed_experts = import_module("nemo_rl.utils.routed_experts_codec").encode_routed_experts

    def aligned(case: Case, rows: int) -> list:
        result = pad_and_align_routed_expert_indices(
            SimpleNamespace(),
            SimpleNamespace(routed_experts=engine_rows(case, "uint8")[:rows]),
            valid_length=case.num_tokens,
            padded_length=7,
            device=torch.device("cpu"),
            routed_experts_dtype=resolve_routed_experts_dtype(12),
        )
        assert isinstance(result, torch.Tensor)
        return result.tolist()

    input_ids, mask = padded(left=False)
    batch = torch.from_numpy(contracts.to_nemo_rl_batch(TRACES, input_ids, 6, attention_mask=mask))
    places = _payload_indices_for_moe_layers(global_moe_layers=[2, 3, 5], num_payload_layers=6, total_num_layers=6)
    with mock.patch.dict(os.environ, {"NRL_ROUTER_REPLAY_VALIDATE": "1"}):
        for number, place in places.items():
            rows = batch[:, :, place].reshape(-1, 3).long()
            _validate_replay_tensor(rows, SimpleNamespace(num_moe_experts=12), layer_number=number, payload_idx=place)
    return {
        "dtypes": {str(count): str(resolve_routed_experts_dtype(count)) for count in (127, 128, 129, 32768, 32769)},
        "aligned": [aligned(case, 99) for case in SEQUENCES],
        "aligned_of_3_rows": aligned(SEQUENCES[0], 3),
        "layers": places,
        "wire": decode_routed_experts(encode_routed_experts(batch[0]), batch.dtype).tolist(),
    }


def automodel() -> dict[str, Any]:
    import torch

    RouterReplay = import_module("nemo_automodel.components.moe.router_replay").RouterReplay

    gates = [RouterReplay() for _ in range(3)]
    input_ids, mask = padded(left=False)
    given = [torch.from_numpy(ids) for ids in contracts.to_automodel(TRACES, input_ids, attention_mask=mask)]
    live = torch.zeros_like(given[0])
    with RouterReplay.replay(given):
        used = [gate.apply(live) for gate in gates]
    with RouterReplay.record():
        for gate, ids in zip(gates, used, strict=True):
            gate.apply(ids)
    collected = RouterReplay.collect()
    RouterReplay.clear_registry()
    return {"used": [ids.tolist() for ids in used], "collected": [ids.tolist() for ids in collected]}


def skyrl() -> dict[str, Any]:
    convert_prompts_responses_to_batch_tensors = import_module(
        "skyrl.train.dataset.preprocess"
    ).convert_prompts_responses_to_batch_tensors
    make_router_padding_mask = import_module("skyrl.train.dataset.preprocess").make_router_padding_mask

    indices = [contracts.to_skyrl(trace, ids, 6) for trace, ids in zip(TRACES, TOKENS, strict=True)]
    sequences, attention_mask, *_, batch = convert_prompts_responses_to_batch_tensors(
        PAD,
        [ids[:prompt] for ids, prompt in zip(TOKENS, PROMPTS, strict=True)],
        [ids[prompt:] for ids, prompt in zip(TOKENS, PROMPTS, strict=True)],
        [[0.0] * length for length in RESPONSES],
        [[1] * length for length in RESPONSES],
        rollout_expert_indices=indices,
    )
    mask = make_router_padding_mask(attention_mask, [len(rows) for rows in indices])
    return {
        "sequences": sequences.tolist(),
        "attention_mask": attention_mask.tolist(),
        "dtype": str(batch.dtype),
        "rollout_expert_indices": batch.tolist(),
        "router_padding_mask": mask.tolist(),
    }


def prime_rl() -> dict[str, Any]:
    msgpack = import_module("msgspec").msgpack
    packed_samples_into_micro_bs = import_module("prime_rl.trainer.batch").packed_samples_into_micro_bs
    pad_micro_batch = import_module("prime_rl.trainer.batch").pad_micro_batch
    prepare_sample = import_module("prime_rl.trainer.batch").prepare_sample
    RoutedExperts = import_module("prime_rl.transports.rollouts.types").RoutedExperts
    TrainingSample = import_module("prime_rl.transports.rollouts.types").TrainingSample

    samples = [
        TrainingSample(
            token_ids=ids,
            mask=[True] * len(ids),
            logprobs=[0.0] * len(ids),
            temperatures=[1.0] * len(ids),
            env_name="",
            advantages=[1.0] * len(ids),
            routed_experts=RoutedExperts(**contracts.to_prime_rl(trace, ids, 6)),
        )
        for trace, ids in zip(TRACES, TOKENS, strict=True)
    ]
    samples = msgpack.decode(msgpack.encode(samples), type=list[TrainingSample])  # type: ignore[valid-type]
    cut = prepare_sample(samples[0], 4).routed_experts
    (batch,) = packed_samples_into_micro_bs([prepare_sample(sample, 16) for sample in samples], 16, 1, sum)
    batch = pad_micro_batch(batch, 16)
    packed = batch.routed_experts
    assert packed is not None
    assert cut is not None
    return {
        "input_ids": batch.input_ids,
        "packed": np.frombuffer(packed.data, packed.dtype).reshape(packed.shape).tolist(),
        "cut_to_4": np.frombuffer(cut.data, cut.dtype).reshape(cut.shape).tolist(),
    }


def maxtext() -> dict[str, Any]:
    align_routed_experts = import_module("tunix.rl.common").align_routed_experts

    rows = [contracts.to_maxtext(trace, ids, 6) for trace, ids in zip(TRACES, TOKENS, strict=True)]
    batch = align_routed_experts(rows, RESPONSES, *WIDTHS)
    short = align_routed_experts([engine_rows(case, "int32") for case in SEQUENCES], RESPONSES, *WIDTHS)
    assert batch is not None
    assert short is not None
    return {"dtype": str(batch.dtype), "aligned": batch.tolist(), "aligned_without_last_rows": short.tolist()}


SEEN: dict[str, Callable[[], dict[str, Any]]] = {
    "verl": verl,
    "slime": slime,
    "miles": miles,
    "nemo_rl": nemo_rl,
    "automodel": automodel,
    "skyrl": skyrl,
    "prime_rl": prime_rl,
    "maxtext": maxtext,
}

if __name__ == "__main__":
    kept = json.loads(PATH.read_text()) if PATH.exists() else {}
    name, origin = sys.argv[1:]
    kept[name] = {"origin": origin, **SEEN[name]()}
    entries = []
    for known in (known for known in SEEN if known in kept):
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in kept[known].items()]
        entries.append(f'  "{known}": {{\n' + ",\n".join(lines) + "\n  }")
    PATH.write_text("{\n" + ",\n".join(entries) + "\n}\n")
