"""What a run needs to go on to the bit, saved into its checkpoints and restored from them.

The order of samples, their augmentation and the learning rate are pure functions of (seed, step), so the position of a
run is one number. What else has a state: weights, their average, optimizer, loss scale, the generators of every rank,
the open averages of the log, the best metric, the steps skipped in a row, of which too many end the run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import torch
from accelerate.utils import gather_object

from aml import __version__, checkpoint
from aml.config import Config, differences, load, to_yaml
from aml.data.dataset import RISDataset
from aml.errors import NonFiniteLoss, ResumeError
from aml.files import require_no_file
from aml.learner import Learner
from aml.runlog import source_commit
from aml.training_window import Window

# Changes that --resume refuses unless --allow-change names them.
ALLOWABLE = ("data", "batch", "seed", "world")


@dataclass
class Progress:
    """Where a run is. `step` counts finished optimizer steps, skipped ones too.

    best, best_step, stale: the best metric, its step, and the evaluations since. skipped: steps without a finite
    gradient up to the last log line; skipped_in_a_row: those directly before it.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def starting_point(out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from. Neither starts over in a directory that holds a run, nor the reverse."""
    require_no_file(out)
    found, skipped = checkpoint.newest(out)
    if found is None and skipped:
        raise ResumeError(
            f"{out} holds a run whose checkpoints cannot be read ({'; '.join(skipped)}): "
            "give another --out, or remove that folder"
        )
    for line in skipped:
        print(f"skipped checkpoint {line}", file=sys.stderr)
    if resume and found is None:
        raise ResumeError(f"{out} has no complete checkpoint to resume from; start it without --resume")
    if not resume and found is not None:
        raise ResumeError(f"{out} already holds a run ({found.name}): add --resume, or give another --out")
    return found


class RunState:
    def __init__(self, config: Config, accelerator: accelerate.Accelerator, train_set: RISDataset, val_set: RISDataset):
        self.config, self.accelerator, self.out = config, accelerator, Path(config.train.out)
        self.progress, self.window = Progress(), Window()
        data = hashlib.sha256(f"{train_set.fingerprint} {val_set.fingerprint}".encode()).hexdigest()
        settings = config.train
        # What must stay the same for a resumed run to go on as it would have.
        self.identity = {
            "data": data,
            "batch": f"{settings.batch_size} x {settings.accumulate}",
            "seed": settings.seed,
            "world": accelerator.num_processes,
        }
        self.versions = {"aml": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}
        self.source = source_commit()
        self._latest: Path | None = None  # the last checkpoint that this process wrote or read

    def save(self, learner: Learner) -> None:
        """Collective."""
        own = {"cpu": torch.get_rng_state(), "window": self.window.state()}
        if self.accelerator.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state()
        ranks = gather_object([own])
        weights, optimizer = learner.weights(), learner.optimizer_state()
        if self.accelerator.is_main_process:
            self._latest = checkpoint.save(
                self.out,
                self.progress.step,
                weights=weights,
                optimizer=optimizer,
                ranks=ranks,
                state={
                    "progress": asdict(self.progress),
                    "identity": self.identity,
                    "scaler": learner.scaler.state_dict() if learner.scaler is not None else None,
                    "versions": self.versions,
                    "source": self.source,
                },
                config=to_yaml(self.config),
                best_step=self.progress.best_step,
                keep=self.config.train.keep,
                frozen_in=self._latest,
            )
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path, learner: Learner, allow_change: Sequence[str]) -> list[str]:
        """Go on from a checkpoint, and return what has changed since. Other data or another metric: without its best.

        Raises ResumeError where data, batch, seed or world has changed and `allow_change` does not name it.
        """
        snapshot = checkpoint.read(path)
        old, new = snapshot.state["identity"], self.identity
        changed = {name: f"{name}: {old[name]} -> {new[name]}" for name in ALLOWABLE if old[name] != new[name]}
        refused = [name for name in changed if name not in allow_change]
        if refused:
            allow = " ".join(f"--allow-change {name}" for name in refused)
            raise ResumeError(
                f"{path} is of a run that went otherwise:\n  "
                + "\n  ".join(changed[name] for name in refused)
                + f"\nRestore that, or accept the change with {allow}"
            )
        learner.load(path, snapshot.optimizer, snapshot.state["scaler"])
        self.progress = Progress(**snapshot.state["progress"])
        self._latest = path
        before = load(path / "config.yaml")
        if self.accelerator.is_main_process:
            # With the best of that checkpoint, even if it is forgotten below: a resume as before may follow.
            checkpoint.settle(path, self.progress.best_step, self.config.train.keep)
        if len(snapshot.ranks) == self.accelerator.num_processes:
            own = snapshot.ranks[self.accelerator.process_index]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"])
            if "batch" not in changed:  # its steps had as many batches as the present ones
                self.window.load(own["window"], self.accelerator.device)
        notes = [*changed.values(), *differences(before, self.config)]
        if before.eval.metric != self.config.eval.metric:
            notes += self._forget_best("eval.metric")
        elif "data" in changed:
            notes += self._forget_best("the data")
        return notes

    def _forget_best(self, cause: str) -> list[str]:
        """Scores from now on are not comparable with the best so far. Returns a line about it, if there is one."""
        position = self.progress
        best, step = position.best, position.best_step
        position.best, position.best_step, position.stale = None, None, 0
        return [] if best is None else [f"best: {best:.4f} at step {step} -> none yet, as {cause} changed"]

    def checked_skips(self) -> list[int]:
        """`Window.skipped_in_a_row` of the open window; too many end the run. Collective."""
        position, window, limit = self.progress, self.window, self.config.train.max_skips
        in_a_row = window.skipped_in_a_row(position.skipped_in_a_row)
        index = next((index for index, length in enumerate(in_a_row) if length >= limit), None)
        if index is not None:
            step = position.step - len(in_a_row) + index + 1
            saved = checkpoint.read_pointer(self.out / "checkpoints" / "last") or "no checkpoint yet"
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite in {limit} step(s) in a row, the last of them step "
                f"{step}. Its samples: {', '.join(window.culprits(index))}. Last good state: {saved}. Look at "
                f"these samples, or try a lower optim.lr, a longer optim.warmup, train.precision=no"
            )
        return in_a_row
