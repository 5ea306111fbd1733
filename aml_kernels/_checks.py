"""Argument checks of the public functions: each error names the argument, what was given and what is accepted."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_TYPES = (torch.bool,)


def tensor(name: str, value: object, dims: tuple[int, ...], types: Sequence[torch.dtype], layout: str) -> None:
    """`value` is a tensor with one of the numbers of dimensions `dims` and one of `types`; nothing is empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {layout}, got shape {list(value.shape)}")
    if value.dtype not in types:
        accepted = ", ".join(str(t).removeprefix("torch.") for t in types)
        raise TypeError(f"{name}: expected dtype {accepted}, got {str(value.dtype).removeprefix('torch.')}")
    if 0 in value.shape:
        raise ValueError(f"{name}: expected {layout} with no empty dimension, got shape {list(value.shape)}")


def shape(name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({why}), got {list(value.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    first = None
    for name, value in tensors.items():
        if value is None:
            continue
        if first is None:
            first, device = name, value.device
        elif value.device != device:
            raise ValueError(f"{name}: expected device {device} (that of {first}), got {value.device}")


LARGEST = sys.float_info.max


def number(name: str, value: object, low: float = -LARGEST, high: float = LARGEST) -> None:
    """A finite real number in [low, high]."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:  # neither is NaN
        bounds = "a finite number" if low == -high == -LARGEST else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {bounds}, got {value}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def at_most_one_limit(quantile: float | None, threshold: float | Tensor | None, samples: int) -> None:
    """The two ways of saying from which similarity on a pixel is kept."""
    if quantile is not None:
        if threshold is not None:
            raise ValueError(
                f"quantile, threshold: expected at most one of them, got quantile={quantile} and a threshold"
            )
        number("quantile", quantile, 0.0, 1.0)
    elif isinstance(threshold, Tensor):
        tensor("threshold", threshold, (1,), FLOAT_TYPES, "[B]")
        shape("threshold", threshold, (samples,), "one per sample")
    elif threshold is not None:
        number("threshold", threshold)


def no_gradient(name: str, value: Tensor | None, why: str) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that does not require grad ({why}); pass {name}.detach()")
