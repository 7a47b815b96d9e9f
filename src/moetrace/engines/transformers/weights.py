"""New weights for a running model: checked first, then copied in place, so that CUDA graphs stay valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from moetrace.errors import WeightsError


def check_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (the model's tensor, its new value), nothing changed yet.

    Args:
        model: the running model.
        weights: tensors by the names of `model.state_dict()`, every one of them, floats of any precision.

    Raises:
        WeightsError: a name is missing or unknown, or a shape, kind or value does not fit.
    """
    own = model.state_dict()
    for names, problem in (
        (own.keys() - weights.keys(), "is missing from"),
        (weights.keys() - own.keys(), "is not the model's, but in"),
    ):
        if names:
            raise WeightsError(
                f"{sorted(names)[0]} {problem} the new weights",
                expected=f"the model's {len(own)} tensors",
                got=f"{len(weights)} tensors, {len(names)} such",
                fix="The old weights are still in use; pass the whole state dict of the same architecture.",
            )
    for name, tensor in weights.items():
        for what, expected, got in (
            ("shape", tuple(own[name].shape), tuple(tensor.shape)),
            ("kind of numbers", own[name].is_floating_point(), tensor.is_floating_point()),
        ):
            if expected != got:
                raise WeightsError(f"{name} has another {what}; the old weights stay", expected=expected, got=got)
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} holds a number that is not finite; the old weights stay")
    return [(own[name], tensor) for name, tensor in weights.items()]


def apply_weights(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """Copy the new values in, on the current stream.

    Returns:
        What waits for it: until then the new values must stay as they are.
    """
    for tensor, value in pairs:
        tensor.copy_(value, non_blocking=True)
    devices = {tensor.device for tensor, _ in pairs if tensor.is_cuda}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait
