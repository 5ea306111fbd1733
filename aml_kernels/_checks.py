"""Argument checks of the public functions: each error names the argument, what was given and what is accepted."""

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_TYPES = (torch.bool,)


def tensor(name: str, value: object, dims: tuple[int, ...], types: Sequence[torch.dtype], layout: str) -> None:
    """`value` is a tensor with one of the numbers of dimensions `dims` and one of `types`; nothing is empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor {layout}, got a nested one or one of layout {value.layout}")
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
PYTHONS = (int, float, torch.SymFloat, torch.SymInt)  # the last two: a number that is traced
ACCEPTED = (*PYTHONS, numbers.Real)


def number(name: str, value: Any, low: float = -LARGEST, high: float = LARGEST) -> float:
    """A finite real number in [low, high]; NumPy's scalars are, and come back as Python's."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, ACCEPTED):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = value if isinstance(value, PYTHONS) else float(value)
    if not low <= value <= high:  # neither is NaN
        bounds = "a finite number" if low == -high == -LARGEST else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {bounds}, got {value}")
    return value


def whole_number(name: str, value: Any, accepted: str, low: int, below: float = math.inf) -> int:
    """An integer in [low, below), which `accepted` says in words; NumPy's come back as Python's."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= value < below:
        raise ValueError(f"{name}: expected {accepted}, got {value!r}")
    return value if isinstance(value, int) else int(value)


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def at_most_one_limit(
    quantile: float | None, threshold: float | Tensor | None, samples: int
) -> tuple[float | None, float | Tensor | None]:
    """The two ways of saying from which similarity on a pixel is kept; numbers come back as Python's."""
    if quantile is not None:
        if threshold is not None:
            raise ValueError(
                f"quantile, threshold: expected at most one of them, got quantile={quantile} and a threshold"
            )
        quantile = number("quantile", quantile, 0.0, 1.0)
    elif isinstance(threshold, Tensor):
        tensor("threshold", threshold, (1,), FLOAT_TYPES, "[B]")
        shape("threshold", threshold, (samples,), "one per sample")
    elif threshold is not None:
        threshold = number("threshold", threshold)
    return quantile, threshold


def no_gradient(name: str, value: Tensor | None, why: str) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that does not require grad ({why}); pass {name}.detach()")
