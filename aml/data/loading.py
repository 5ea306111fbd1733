"""Batches read ahead by worker processes, so that the device does not wait for them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from aml.data.dataset import collate


def read_batches(
    dataset: Dataset, batches: Iterable[Any], workers: int, device: torch.device | str
) -> Generator[dict[str, Any], None, None]:
    """Collated batches of `dataset`, one for each list of keys in `batches`.

    workers: processes that read ahead, two batches each; 0 reads in this process. For a CUDA device the batches lie in
    pinned memory, from where `.to(device, non_blocking=True)` copies while the device computes.

    The processes end with the generator: close it in any case (`contextlib.closing`), or they keep Python from leaving.
    They end too when this process is killed.

    Raises the OSError or ValueError of a sample with its own message, from whichever process.
    """
    loader = DataLoader(
        _Batches(dataset),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        worker_init_fn=_follow_the_parent,
        pin_memory=torch.device(device).type == "cuda",
        # A generator of its own: the loader would draw from the global one, which belongs to dropout.
        generator=torch.Generator(),
    )
    read = iter(loader)
    try:
        for batch in read:
            if isinstance(batch, _Unread):
                raise batch.kind(batch.message)
            yield batch
    finally:
        if workers:
            # PyTorch would do it when nothing refers to `read` any more, but the traceback of an error may for long.
            read._shutdown_workers()  # type: ignore[attr-defined]


@dataclass
class _Unread:
    """What is wrong with a batch. An error that a worker raised would have its whole traceback as its message."""

    kind: type[OSError] | type[ValueError]
    message: str


class _Batches(Dataset):
    """Batches by lists of keys."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, keys: list[Any]) -> dict[str, Any] | _Unread:
        try:
            return collate([self.samples[key] for key in keys])
        except (OSError, ValueError) as error:
            if get_worker_info() is None:
                raise
            return _Unread(OSError if isinstance(error, OSError) else ValueError, str(error))


def _follow_the_parent(_: int) -> None:
    """A worker stops when the main process says so, or with it, and not before."""

    def ignore_once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    # Ctrl-C and job schedulers signal all processes, but the main one decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore_once)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Ends this process when the main one is killed.

    PyTorch asks every 5 s whether the process above is another one than before. A forked worker holds the connections
    between ranks open for so long, and the other ranks wait; under a fork server it never changes, and workers remain.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
