"""Several processes that share the work of one command, as `torchrun` starts them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

# Ranks meet when each has done its part, which may be an hour's work. torchrun ends the others where one dies.
TIMEOUT = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` ones, and the device that is its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, own: list[Any]) -> list[Any] | None:
        """The lists of all ranks, one behind the other, on rank 0; None on the others. Collective."""
        if self.world == 1:
            return own
        parts: list[Any] | None = [None] * self.world if self.is_main else None
        torch.distributed.gather_object(own, parts)
        return None if parts is None else [each for part in parts for each in part]

    def as_on_main(self, value: Any) -> Any:
        """The value that rank 0 has. Collective."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this job, while the block runs. One process alone where the environment names no others.

    What is exchanged are Python objects, so gloo does it, beside any device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Several ranks may share a GPU, and a launcher may show each rank its own one only.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(torch.distributed.get_rank(), world, device)
    finally:
        torch.distributed.destroy_process_group()
