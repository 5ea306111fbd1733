"""Batches read ahead by worker processes, so that the device does not wait for them."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from aml.data.dataset import collate


def loader(dataset: Dataset, batches: Iterable[Any], workers: int, device: torch.device | str) -> DataLoader:
    """A `DataLoader` of these batches, each a list of keys of `dataset`.

    workers: processes that read ahead, two batches each; 0 reads in this process. For a CUDA device the batches lie in
    pinned memory, from where `.to(device, non_blocking=True)` copies while the device computes.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # an iterable is all that is needed
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_let_the_parent_stop,
        pin_memory=torch.device(device).type == "cuda",
        # A generator of its own: the loader would draw from the global one, which belongs to dropout.
        generator=torch.Generator(),
    )


def _let_the_parent_stop(_: int) -> None:
    """Ctrl-C and job schedulers signal all processes, but the main one decides."""

    def ignore_once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore_once)
