"""Full tensors of a model that FSDP (version 2) has divided among the ranks, and their way back.

Everything here leaves tensors that are not divided as they are, so that callers need not know which kind they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def gathered(value: Any) -> Any:
    """The full tensor, or what holds tensors with all of them full. Collective."""
    if isinstance(value, Mapping):
        return {name: gathered(inner) for name, inner in value.items()}
    return value.full_tensor() if _is_divided(value) else value


def divided_like(tensors: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's part of full tensors, where the tensor of that name in `like` is divided. No communication."""
    return {name: _divided(tensor, like.get(name)) for name, tensor in tensors.items()}


def optimizer_state_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A full `optimizer.state_dict()`, its moments divided as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return state | {
        "state": {
            index: {name: _divided(value, parameters[index]) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
    }


@contextmanager
def undivided(module: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights, and may run parts of the module by itself. Collective."""
    parts: list[Any] = [m for m in module.modules() if hasattr(m, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)  # FSDP's own default
            part.reshard()


def _divided(tensor: Any, like: Any) -> Any:
    if not _is_divided(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_divided(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")  # a DTensor, whose import takes long
