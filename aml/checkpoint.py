"""Checkpoints that are complete or do not count.

    <run>/checkpoints/step-00000123/  model.safetensors  frozen.safetensors  aligner.safetensors
                                      ema.safetensors  ema-aligner.safetensors  (if train.ema is set)
                                      optimizer.pt  rng-rank<N>.pt  state.json  config.yaml  COMPLETE
    <run>/checkpoints/last, best      one line each: the name of a checkpoint

A checkpoint is written to `step-*.tmp`, every file flushed to the disk, then listed in COMPLETE with its size
and SHA-256, then renamed; the pointers are replaced after that, and old checkpoints are removed last. So at
whatever moment the process dies, the newest complete checkpoint is whole, and no older one is given up for
one that is not yet there. Nothing is unpickled but tensors (`weights_only=True`).

Weights of the model that are not trained are in frozen.safetensors. A run writes it once; later checkpoints hold the
same file by another name (a hard link). So a checkpoint needs nothing beside it, no installed package of encoders
either, and costs the disk only what has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from aml import sharding
from aml.errors import CheckpointError
from aml.files import digest, flush, hard_linked

FORMAT = 2
FROZEN = "frozen"
_MARKER = "COMPLETE"
_AVERAGED = {"model": "ema", "aligner": "ema-aligner"}


@dataclass
class Snapshot:
    """What a checkpoint holds besides weights: `state` (JSON), the optimizer's state, one dict per rank."""

    path: Path
    state: dict[str, Any]
    optimizer: dict[str, Any]
    ranks: list[dict[str, Any]]


# --------------------------------------------------------------------------------------------------- writing


def save(
    run: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: dict[str, Any],
    ranks: Sequence[dict[str, Any]],
    state: dict[str, Any],
    config: str,
    best_step: int | None = None,
    keep: int = 2,
    frozen_in: Path | None = None,
) -> Path:
    """Write the checkpoint of `step`, set the pointers, remove old ones. Only one process may call this.

    weights: per file, names and full tensors: "model", "aligner", and, if there are any, "frozen", "ema",
    "ema-aligner". ranks: per rank a dict of tensors and plain values. keep: how many of the newest to keep; the one of
    `best_step` stays besides. frozen_in: a complete checkpoint that holds the same frozen weights.
    A checkpoint of that step which is already complete is left as it is. Raises OSError if the disk is full;
    the earlier checkpoints are then untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if problem(final):
        shutil.rmtree(final, ignore_errors=True)
        linked: dict[str, Any] = {}
        with written_whole(final, linked) as temporary:
            for name, tensors in weights.items():
                path = temporary / f"{name}.safetensors"
                if name == FROZEN and frozen_in is not None and hard_linked(frozen_in / path.name, path):
                    # With the digest of when it was written: one taken now would seal damage of the meantime.
                    linked[path.name] = _listed(frozen_in)[path.name]
                else:
                    write_weights(tensors, path)
            torch.save(optimizer, temporary / "optimizer.pt")
            for rank, values in enumerate(ranks):
                torch.save(values, temporary / f"rng-rank{rank}.pt")
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            (temporary / "config.yaml").write_text(config, encoding="utf-8")
    settle(final, best_step, keep)
    return final


def settle(path: Path, best_step: int | None, keep: int) -> None:
    """Point to a complete checkpoint as the last one, and remove old ones. Only one process may call this.

    best_step: None if no evaluation counts. Then, and where its checkpoint is gone, as a better one that damage took
    had replaced it, there is no pointer to a best one.
    `save` ends with it; a run that resumes does it again, as it may have died just before.
    """
    _point(path.parent, "last", path.name)
    best = None if best_step is None else path.with_name(f"step-{best_step:08d}")
    if best is not None and best.is_dir():
        _point(path.parent, "best", best.name)
    else:
        (path.parent / "best").unlink(missing_ok=True)
    _prune(path, keep, best_step)


@contextlib.contextmanager
def written_whole(final: Path, linked: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder to write files into, which becomes `final`, complete, at the end of the block, or does not appear.

    linked: what COMPLETE is to say of files that were written before, for another folder.
    """
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _seal(temporary, linked or {})
    except Exception as error:
        if type(error) not in (RuntimeError, safetensors.SafetensorError):  # PyTorch's and safetensors' for a full disk
            raise
        free = shutil.disk_usage(temporary).free / 1e9
        raise OSError(f"{final} was not written; {free:.3f} GB are free on its disk ({error})") from error
    os.rename(temporary, final)
    flush(final.parent)


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tied weights are stored once; the metadata of the file maps their other names to the stored one."""
    if any("_orig_mod." in name or name.startswith("module.") for name in tensors):
        raise CheckpointError("save the module itself, not the wrapper of torch.compile or DDP around it")
    if path.stem == "model" and not tensors:
        raise CheckpointError("the model has no weights to save")
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
            stored[name] = tensor.contiguous()
    safetensors.torch.save_file(stored, str(path), metadata={"format": "pt", **tied})


def _seal(folder: Path, linked: Mapping[str, Any]) -> None:
    """Flush every file to the disk, then list them, with size and digest, in COMPLETE, the last one."""
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = linked.get(path.name) or {"bytes": path.stat().st_size, "sha256": digest(path)}
    flush(folder)
    marker = folder / _MARKER
    marker.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    flush(marker)
    flush(folder)


def _point(folder: Path, name: str, target: str) -> None:
    if read_pointer(folder / name) != target:
        temporary = folder / f"{name}.tmp"
        temporary.write_text(target + "\n", encoding="utf-8")
        flush(temporary)
        os.replace(temporary, folder / name)
        flush(folder)


def _prune(latest: Path, keep: int, best_step: int | None) -> None:
    folder = latest.parent
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    # Those of later steps are damaged, or the run would have gone on from them: they must not count as kept.
    for path in [path for path in _by_step(folder) if _step(path) <= _step(latest)][keep:]:
        if _step(path) != best_step:
            # The marker goes first, so that a removal cut short leaves nothing that looks complete.
            (path / _MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- finding


def problem(path: Path) -> str | None:
    """Why the folder is not a complete checkpoint, or None. Reads every file, to compare digests."""
    try:
        marker = json.loads((path / _MARKER).read_text(encoding="utf-8"))
        files = marker["files"].items()
    except FileNotFoundError:
        return f"no {_MARKER} file: it was not written to the end" if path.is_dir() else "no such folder"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{_MARKER} cannot be read ({error})"
    if marker.get("format") != FORMAT:
        return f"format {marker.get('format')}; this version reads format {FORMAT}"
    for name, expected in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if digest(file) != expected["sha256"]:
            return f"{name} is damaged: its SHA-256 is not the one in {_MARKER}"
    return None


def _listed(path: Path) -> dict[str, Any]:
    """File name -> size and digest, of a complete checkpoint."""
    return json.loads((path / _MARKER).read_text(encoding="utf-8"))["files"]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint of a run directory or None, what was skipped and why)."""
    skipped: list[str] = []
    for path in _by_step(run / "checkpoints"):
        reason = problem(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def resolve(path: str | Path) -> Path:
    """The checkpoint that is meant: by its folder, a pointer, or its run directory (the best or the newest).

    Raises CheckpointError, saying what was found and what is accepted.
    """
    path = Path(path)
    target = path
    if (path / "checkpoints").is_dir():
        best = read_pointer(path / "checkpoints" / "best")
        target = path / "checkpoints" / best if best else newest(path)[0] or path / "checkpoints"
    elif path.is_file() and read_pointer(path):
        target = path.parent / str(read_pointer(path))
    reason = problem(target)
    if reason:
        raise CheckpointError(
            f"{target} is not a complete checkpoint: {reason}. "
            "Give a run directory, or one of its checkpoints/step-* folders"
        )
    return target


def read_pointer(path: Path) -> str | None:
    """The name in a `last` or `best` file; None if there is no such file or it names no checkpoint."""
    if not path.is_file() or path.stat().st_size > 100:
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    return name if name.startswith("step-") and name[5:].isdigit() else None


def _by_step(folder: Path) -> list[Path]:
    """Folders step-<number>, newest first; by number, as names of different length sort wrongly as text."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


# --------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Snapshot:
    """All but the weights of a checkpoint that `newest` or `resolve` has found; tensors on the CPU."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    ranks = [
        torch.load(path / f"rng-rank{rank}.pt", map_location="cpu", weights_only=True)
        for rank in range(len(list(path.glob("rng-rank*.pt"))))
    ]
    return Snapshot(path, state, optimizer, ranks)


def load_weights(path: Path, averaged: bool = True, **modules: nn.Module) -> None:
    """Fill modules: `load_weights(path, model=model, aligner=aligner)`. Raises if a name or shape differs.

    averaged: with the averaged weights where the checkpoint has them, as they were the ones evaluated in training.
    """
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        if averaged and (path / f"{_AVERAGED[name]}.safetensors").is_file():
            file = path / f"{_AVERAGED[name]}.safetensors"
        tensors = _read_weights(file)
        frozen = path / f"{FROZEN}.safetensors"
        if name == "model" and frozen.is_file():
            tensors |= _read_weights(frozen)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        try:
            module.load_state_dict(sharding.divided_like(tensors, parameters), strict=True)
        except RuntimeError as error:
            settings = path / "config.yaml"
            raise CheckpointError(f"{file} does not fit this {name}, see {settings}: {error}") from error


def _read_weights(file: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(str(file), framework="pt") as stored:
        metadata = stored.metadata() or {}
    tensors: dict[str, Tensor] = safetensors.torch.load_file(str(file))
    return tensors | {tied: tensors[kept] for tied, kept in metadata.items() if kept in tensors}
