"""What a run writes besides checkpoints: metrics.jsonl, what goes into run.json, on request TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to `<folder>/metrics.jsonl`, one JSON object a line, flushed line by line.

    On opening, lines of steps after `step` go: a resumed run writes them again. NaN and infinite values are
    written as null, since JSON has no word for them.
    tensorboard: also write the numbers as events. Raises ImportError, with the remedy, if that is missing.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self._path = folder / "metrics.jsonl"
        self._events: Any = None
        if tensorboard:
            self._events = tensorboard_writer()(str(folder / "tensorboard"), purge_step=step + 1)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self._path) if line["step"] <= step]
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)  # not in place: a crash must not lose the log

    def write(self, line: dict[str, Any]) -> None:
        """line: has `step` and `kind`; its numbers become TensorBoard scalars "kind/name"."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{line['kind']}/{name}", value, line["step"])
            self._events.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; one that a killed run left half-written is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def source_commit() -> dict[str, Any] | None:
    """The git commit of this package's source, and whether tracked files differ from it; None if it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or the commit is that of what it is installed into
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def tensorboard_writer() -> Any:
    """The class SummaryWriter."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("train.tensorboard=true needs a package: pip install tensorboard") from error
    return SummaryWriter


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
