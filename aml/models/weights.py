"""Reading weight files of others without running anything that they hold."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def read_checkpoint(path: Path) -> dict[Any, Any]:
    """What a .pth file of a dict holds: tensors, plain containers and numbers, and `argparse.Namespace` as inert data.

    Any other class or function that the pickle asks for is refused before it is called. Tensors stay in the file
    until they are read, so the optimizer's state that training checkpoints hold costs no memory.

    Raises FileNotFoundError, and UnpicklingError naming what was refused or why the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file raises nearly any type
        raise UnpicklingError(_refusal(path, error)) from error
    if not isinstance(content, dict):
        raise UnpicklingError(f"{path} holds a {type(content).__name__}; expected the dict that torch.save wrote")
    return content


def _refusal(path: Path, error: Exception) -> str:
    """torch's own message recommends to read the file again without protection; this one does not."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older or a damaged file: the error names what it met first
        asked = re.findall(r"GLOBAL ([\w.]+)", str(error))
    asked = sorted(set(asked) - {"argparse.Namespace"})
    if asked:
        return (
            f"{path} was not read, and nothing in it was run: it asks for {', '.join(asked)}. A checkpoint of weights "
            "needs tensors, containers, numbers and argparse.Namespace only; a file with anything else could run "
            "code: get it from a source you trust"
        )
    lines = [line for line in str(error).splitlines() if line and "weights_only" not in line]
    reason = lines[0].split(". ")[0] if lines else type(error).__name__
    return f"{path} was not read: it is no checkpoint that torch.save wrote, or it is damaged ({reason})"


def unwrap(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The state dict in a training checkpoint: under `state_dict` or `model`, or all of it; without DDP's `module.`."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not any(isinstance(value, Tensor) for value in content.values()):
        shown = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise ValueError(f"{path} holds no weights: expected names with tensors, found {shown}")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key).removeprefix("module.")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, expected a tensor")
        if name in tensors:
            raise ValueError(f"{path}: holds {name} twice, once behind module.")
        tensors[name] = value
    return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file."""
    if path.suffix != ".safetensors":
        return unwrap(read_checkpoint(path), path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
