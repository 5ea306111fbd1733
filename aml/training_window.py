"""What training says between two lines of the log: records that stay on the device, and which steps were skipped."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from accelerate.utils import gather_object
from torch import Tensor


class Window:
    """The steps since the last log line. Only `means` and `skips` wait for the device; the rest queues."""

    def __init__(self) -> None:
        self.records: dict[str, list[Tensor]] = {}
        self.batches: dict[str, list[int]] = {}  # which batch each record is of; not every batch has all of them
        self.samples: list[list[str]] = []  # per batch
        self.skipped: list[Tensor] = []  # per step, bool []

    def add(self, record: dict[str, Tensor], samples: list[str]) -> None:
        """One batch: detached scalars, and the ids of its samples."""
        for name, value in record.items():
            self.records.setdefault(name, []).append(value.detach().float())
            self.batches.setdefault(name, []).append(len(self.samples))
        self.samples.append(samples)

    def end_step(self, skipped: Tensor) -> None:
        self.skipped.append(skipped)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def means(self, accelerator: accelerate.Accelerator) -> dict[str, float]:
        """Per record over the steps that were taken, of all ranks; NaN where none was. Collective."""
        names = sorted(self.records)
        taken = ~torch.stack(self.skipped)
        own = torch.stack([self._mean(name, taken) for name in names])
        return dict(zip(names, accelerator.reduce(own, "mean").tolist(), strict=True))

    def skips(self) -> list[bool]:
        """Per step. All ranks skip the same ones."""
        return torch.stack(self.skipped).tolist() if self.skipped else []

    def culprits(self, step: int) -> list[str]:
        """Samples of all ranks whose batches made the window's `step`, from 0, not finite. Collective.

        Those with a loss that is not finite; where each loss is, but not the gradient, all of the step.
        """
        per_step = self._batches_per_step()
        batches = range(step * per_step, (step + 1) * per_step)
        guilty = [batch for batch in batches if not self.records["loss"][batch].isfinite()]
        found = gather_object([(bool(guilty), [self.samples[batch] for batch in guilty or batches])])
        certain = any(is_certain for is_certain, _ in found)
        chosen = [ids for is_certain, batches in found if is_certain or not certain for ids in batches]
        return [sample for ids in chosen for sample in ids]

    def state(self) -> dict[str, Any]:
        """Tensors on the CPU, and lists."""
        records = {name: torch.stack(values).cpu() for name, values in self.records.items()}
        skipped = self.skips()
        return {"records": records, "batches": self.batches, "samples": self.samples, "skipped": skipped}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.records = {name: list(values.to(device)) for name, values in state["records"].items()}
        self.batches, self.samples = state["batches"], state["samples"]
        self.skipped = [torch.tensor(flag, device=device) for flag in state["skipped"]]

    def _mean(self, name: str, taken: Tensor) -> Tensor:
        per_step = self._batches_per_step()
        counts = taken[[batch // per_step for batch in self.batches[name]]]
        return torch.where(counts, torch.stack(self.records[name]), 0).sum() / counts.sum()

    def _batches_per_step(self) -> int:
        return len(self.samples) // len(self.skipped)
