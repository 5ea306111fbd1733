"""Gradient checkpointing: forget activations in the forward pass, and compute them again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, run again in the backward pass if `active`; dropout draws the same numbers both times."""
    if active and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
