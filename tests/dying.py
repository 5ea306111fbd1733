"""Ends a process, as kill -9 does, at a moment of one's choice: disk operations, half done, and parts of a step."""

import os
import shutil
import signal
from pathlib import Path

import safetensors.torch
import torch

#: What checkpoints and logs are written with: owner, name, and which argument is the file that it writes, if it does
DISK = [
    (torch, "save", 1), (safetensors.torch, "save_file", 1), (Path, "write_text", 0), (Path, "mkdir", None),
    (Path, "unlink", None), (shutil, "rmtree", None),
    *((os, name, None) for name in ("fsync", "link", "rename", "replace")),
]


def die_at(moment: int) -> None:
    """Count disk operations, steps and updates from now on, and die instead of number `moment`, from 0."""
    from aml.learner import Learner
    from aml.training import _Trainer

    left = moment

    def wrap(original, file):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                if file is not None:
                    half_write(args[file])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*args, **kwargs)

        return call

    for owner, name, file in [*DISK, (_Trainer, "_step", None), (Learner, "_update", None)]:
        setattr(owner, name, wrap(getattr(owner, name), file))


def half_write(path) -> None:
    with open(path, "wb") as file:
        file.write(b"half")
