"""Training: one loop over optimizer steps, on one device or many (Accelerate), resumable to the bit.

The order of samples, their augmentation and the learning rate are pure functions of (seed, step), so the
position of a run is one number. What else has a state goes into each checkpoint: weights, optimizer, the
generators of every rank, the open averages of the log, the best metric. The data loader is not handed to
Accelerate, whose own ways to resume in mid-epoch are not exact.

Functions that communicate between ranks say "collective": all ranks must call them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from aml import __version__, checkpoint, evaluation
from aml.alignment import AlignmentLoss
from aml.assembly import build_aligner, build_dataset, open_data
from aml.config import Config, ConfigError, differences, load, to_yaml
from aml.console import StopSignals, on_terminal
from aml.data.dataset import EpochBatches
from aml.data.loading import loader
from aml.data.union import Annotations
from aml.errors import NonFiniteLoss, ResumeError, Stopped
from aml.models import RISModel, build_model
from aml.runlog import RunLog, tensorboard_writer

ALLOWABLE = (
    "data",
    "batch",
    "seed",
    "world",
)  # changes that --resume refuses unless --allow-change names them
SIGNAL_CHECK = 10  # steps between agreements of several ranks on whether to stop


@dataclass
class Progress:
    """Where a run is. `step` counts finished optimizer steps; `stale` the evaluations since the best one."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0


class TrainingStep(nn.Module):
    """Model and loss as one module, so that DDP sees a single forward pass."""

    def __init__(self, model: RISModel, aligner: AlignmentLoss):
        super().__init__()
        self.model, self.aligner = model, aligner

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.aligner.training_step(self.model, batch, step)


def train(config: Config, *, resume: bool = False, allow_change: Sequence[str] = ()) -> Path:
    """Train to the end and return the run directory, `config.train.out`. Collective.

    resume: go on from the newest complete checkpoint of that directory.
    allow_change: names of ALLOWABLE in which the run may differ from its checkpoint; it then goes on from the
        same step, but not as it would have.

    Raises Stopped after SIGINT or SIGTERM, NonFiniteLoss, ResumeError, ConfigError, and what reading the data
    raises. Settings and annotations are checked before any process group is formed or model built.
    """
    start = _starting_point(config, resume)
    refer = open_data(config)
    if config.train.tensorboard:
        tensorboard_writer()
    accelerator = _accelerator(config)
    trainer = _Trainer(config, accelerator, refer)
    if start is not None:
        trainer.restore(start, allow_change)
    trainer.run()
    return trainer.out


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, times the polynomial fall usual in RIS."""
    rise = min(1.0, (step + 1) / max(1, round(warmup * total)))
    return rise * (1 - step / total) ** 0.9


class _Trainer:
    """The state of one run, and what is done with it: step, log, evaluate, save, restore."""

    def __init__(self, config: Config, accelerator: accelerate.Accelerator, refer: Annotations):
        settings = config.train
        self.config, self.accelerator, self.out = config, accelerator, Path(settings.out)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        torch.manual_seed(settings.seed)
        self.model = build_model(**config.model.options())
        self.train_set = build_dataset(config, refer, self.model, "train", train=True)
        self.val_set = build_dataset(config, refer, self.model, "val", train=False)
        per_epoch = len(self._epoch(0, 0))
        self.steps_per_epoch = per_epoch // settings.accumulate  # batches that do not fill a step are dropped
        if not self.steps_per_epoch:
            raise ConfigError([f"train.accumulate={settings.accumulate}: an epoch has {per_epoch} batches"])
        self.total = settings.steps or settings.epochs * self.steps_per_epoch
        self.aligner = build_aligner(config, self.model, round((config.alignment.warmup or 0) * self.total))
        groups = self._parameter_groups()
        self.fixed = [{name: group[name] for name in ("lr", "weight_decay")} for group in groups]
        if settings.compile:
            self.model.compile()
        self.module, self.optimizer = accelerator.prepare(
            TrainingStep(self.model, self.aligner), torch.optim.AdamW(groups)
        )
        torch.manual_seed(settings.seed + self.rank)  # dropout differs between ranks
        self.progress = Progress()
        # Since the last log line, per batch: the loss's records, on the device, and the sample ids.
        self.window: dict[str, list[Tensor]] = {}
        self.samples: list[list[str]] = []
        self._restart_clock()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        optim = self.config.optim
        groups = self.model.parameter_groups(optim.lr, optim.weight_decay)
        own = list(self.aligner.parameters())
        return groups + [{"name": "aligner", "params": own, "lr": optim.lr, "weight_decay": 0.0}] * bool(own)

    def run(self) -> None:
        """From the present step to the last one. Collective."""
        settings, position = self.config.train, self.progress
        self._open_directory()
        # Closed in any case, so that its processes end: Python would wait for them.
        with closing(self._batches()) as batches, StopSignals() as signals, self._bar() as self.bar:
            while not self._finished():
                self._step(batches)
                position.step += 1
                self.bar.update()
                at_end = position.step == self.total
                if at_end or position.step % settings.log_every == 0:
                    self._log()
                evaluate = at_end or position.step % (self.steps_per_epoch * self.config.eval.every) == 0
                if evaluate:
                    self._evaluate()
                stop = self._agreed(signals.received)
                if evaluate or stop or position.step % settings.save_every == 0:
                    self._save()
                if stop and not self._finished():
                    raise Stopped(
                        stop,
                        f"stopped by {signal.Signals(stop).name} and saved at step {position.step}; "
                        f"go on with\n  aml train --resume --out {shlex.quote(str(self.out))}",
                    )
        self._print(
            f"finished at step {position.step}; the best {self.config.eval.metric} was "
            f"{_shown(position.best)} at step {position.best_step}. Next:\n"
            f"  aml eval --checkpoint {shlex.quote(str(self.out))}"
        )

    def _finished(self) -> bool:
        patience = self.config.train.patience
        return self.progress.step >= self.total or (patience is not None and self.progress.stale >= patience)

    # -------------------------------------------------------------------------------------------- one step

    def _epoch(self, epoch: int, start: int) -> EpochBatches:
        settings = self.config.train
        length = len(self.train_set)
        return EpochBatches(length, settings.batch_size, settings.seed, epoch, self.rank, self.world, start)

    def _batches(self) -> Generator[dict[str, Any], None, None]:
        """Batches from the present step on, without end; one loader for all epochs: its workers live on."""
        accumulate = self.config.train.accumulate

        def keys() -> Iterator[list[tuple[int, int]]]:
            first, done = divmod(self.progress.step, self.steps_per_epoch)
            for epoch in count(first):
                batches = self._epoch(epoch, done * accumulate)
                yield from islice(batches, (self.steps_per_epoch - done) * accumulate)
                done = 0

        yield from loader(self.train_set, keys(), self.config.train.workers, self.device)

    def _step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step of `accumulate` batches. Nothing here waits for the device."""
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates(), strict=True):
            group["lr"] = rate
        for _ in range(self.config.train.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            with self.accelerator.accumulate(self.module):
                names = ("image", "tokens", "text_mask", "target", "valid")
                tensors = {n: batch[n].to(self.device, non_blocking=True) for n in names if n in batch}
                loss, record = self.module(tensors, self.progress.step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    limit = self.config.optim.clip_norm
                    norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
                    record = record | {"gradient_norm": norm}
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.samples.append(batch["sample_id"])
            for name, value in record.items():
                self.window.setdefault(name, []).append(value.detach().float())
        self.timed += 1

    def _learning_rates(self) -> list[float]:
        factor = learning_rate_factor(self.progress.step, self.total, self.config.optim.warmup)
        return [fixed["lr"] * factor for fixed in self.fixed]

    # ------------------------------------------------------------------------------ logging and evaluation

    def _log(self) -> None:
        """A line of means since the last one, over all ranks; times are of the slowest rank. Collective."""
        means = self._window_means()
        self.window, self.samples = {}, []
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        own = [(time.perf_counter() - self.began) / self.timed, self.waited / self.timed, memory]
        slowest = self.accelerator.gather(torch.tensor([own], device=self.device)).amax(0).tolist()
        self._restart_clock()
        speed = dict(zip(("step_s", "data_s", "device_gib"), slowest, strict=True))
        speed["samples_per_s"] = self._effective_batch() / speed["step_s"]
        self._write(
            "train", **means, lr=max(group["lr"] for group in self.optimizer.param_groups), speed=speed
        )
        line = f"loss {_shown(means['loss'])}  {speed['samples_per_s']:.1f} samples/s"
        self.bar.set_postfix_str(line)
        if self.bar.disable:
            self._print(f"step {self.progress.step}/{self.total}  {line}")

    def _window_means(self) -> dict[str, float]:
        """Means over the open window and all ranks; refuses values that are not finite. Collective."""
        names = sorted(self.window)
        if not names:
            return {}
        own = torch.stack([torch.stack(self.window[name]).mean() for name in names])
        means = dict(zip(names, self.accelerator.reduce(own, "mean").tolist(), strict=True))
        if not all(math.isfinite(means[name]) for name in ("loss", "gradient_norm")):
            raise NonFiniteLoss(self._first_non_finite())
        return means

    def _first_non_finite(self) -> str:
        losses = torch.stack(self.window["loss"])
        first = next(iter((~losses.isfinite()).nonzero().flatten().tolist()), len(losses) - 1)
        step = self.progress.step - (len(losses) - 1 - first) // self.config.train.accumulate
        saved = checkpoint.read_pointer(self.out / "checkpoints" / "last") or "no checkpoint yet"
        return (
            f"the loss or its gradient is not finite from step {step} on. Its samples: "
            f"{', '.join(self.samples[first])}. Last good state: {saved}. Look at these samples, or try a "
            f"lower optim.lr, a longer optim.warmup, train.precision=no"
        )

    def _evaluate(self) -> None:
        """Metrics of the validation split, by sample id over all ranks; remembers the best. Collective."""
        if self.world > 1:
            for buffer in self.model.buffers():  # batch norm's statistics have moved apart in the last step
                torch.distributed.broadcast(buffer, src=0)
        records = evaluation.evaluate(
            self.model,
            self.val_set,
            device=self.device,
            batch_size=self.config.train.batch_size,
            aligner=self.aligner,
            indices=range(self.rank, len(self.val_set), self.world),
            workers=self.config.train.workers,
            progress=self.is_main and on_terminal(),
        )
        metrics = evaluation.metrics(gather_object(records), self.val_set.sample_ids)
        score, position = metrics[self.config.eval.metric], self.progress
        better = position.best is None or score > position.best
        if better:
            position.best, position.best_step, position.stale = score, position.step, 0
        else:
            position.stale += 1
        self._write("eval", **metrics)
        shown = (f"{name} {_shown(metrics[name])}" for name in ("mIoU", "oIoU", "auc", "area_ratio"))
        self._print(f"step {position.step}/{self.total}  val  {'  '.join(shown)}{'  (best)' * better}")
        self._restart_clock()

    def _write(self, kind: str, **values: Any) -> None:
        if self.is_main:
            step = self.progress.step
            epoch = round(step / self.steps_per_epoch, 4)
            self.log.write({"kind": kind, "step": step, "epoch": epoch, **values})

    # ------------------------------------------------------------------------------------ save and restore

    def _save(self) -> None:
        """Collective."""
        self._window_means()  # no checkpoint of weights that are not finite
        windows = {name: torch.stack(values).cpu() for name, values in self.window.items()}
        own = {"cpu": torch.get_rng_state(), "window": windows, "samples": self.samples}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state()
        ranks = gather_object([own])
        if self.is_main:
            epoch, within = divmod(self.progress.step, self.steps_per_epoch)
            position = {"progress": asdict(self.progress), "epoch": epoch, "step_in_epoch": within}
            checkpoint.save(
                self.out,
                self.progress.step,
                model=self.model,
                aligner=self.aligner,
                optimizer=self.optimizer.state_dict(),
                ranks=ranks,
                state=position | {"identity": self._identity(), "versions": _versions()},
                config=to_yaml(self.config),
                best_step=self.progress.best_step,
                keep=self.config.train.keep,
            )
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def restore(self, path: Path, allow_change: Sequence[str]) -> None:
        """Go on from a checkpoint; a change of data, batch, seed or world is refused unless it is allowed."""
        snapshot = checkpoint.read(path)
        old, new = snapshot.state["identity"], self._identity()
        changed = {
            name: f"{name}: {old[name]} -> {new[name]}" for name in ALLOWABLE if old[name] != new[name]
        }
        refused = [name for name in changed if name not in allow_change]
        if refused:
            allow = " ".join(f"--allow-change {name}" for name in refused)
            raise ResumeError(
                f"{path} is of a run that went otherwise:\n  "
                + "\n  ".join(changed[name] for name in refused)
                + f"\nRestore that, or accept the change with {allow}"
            )
        checkpoint.load_weights(path, model=self.model, aligner=self.aligner)
        self.optimizer.load_state_dict(snapshot.optimizer)
        for group, fixed in zip(self.optimizer.param_groups, self.fixed, strict=True):
            group.update(fixed)  # the present settings, not those in the checkpoint
        self.progress = Progress(**snapshot.state["progress"])
        if len(snapshot.ranks) == self.world:
            own = snapshot.ranks[self.rank]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"])
            self.samples = own["samples"]
            self.window = {name: list(values.to(self.device)) for name, values in own["window"].items()}
        notes = [*changed.values(), *differences(load(path / "config.yaml"), self.config)]
        self._print(f"resumed {path}" + "".join(f"\n  changed: {note}" for note in notes))

    def _identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to go on as it would have."""
        settings = self.config.train
        data = hashlib.sha256(f"{self.train_set.fingerprint} {self.val_set.fingerprint}".encode()).hexdigest()
        batch = f"{settings.batch_size} x {settings.accumulate}"
        return {"data": data, "batch": batch, "seed": settings.seed, "world": self.world}

    def _open_directory(self) -> None:
        """Write what the run is, and open its log at the present step. Collective."""
        if self.is_main:
            self.log = RunLog(self.out, self.progress.step, self.config.train.tensorboard)
            (self.out / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            run = {"command": sys.argv, "versions": _versions(), **self._identity()}
            (self.out / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
        self._print(self._header())
        self.accelerator.wait_for_everyone()

    # -------------------------------------------------------------------------------------------- the rest

    def _agreed(self, received: int) -> int:
        """The signal that any rank has received, or 0. Collective."""
        if self.world == 1 or self.progress.step % SIGNAL_CHECK:
            return received * (self.world == 1)
        return int(self.accelerator.gather(torch.tensor([received], device=self.device)).max())

    def _restart_clock(self) -> None:
        """Steps are timed without evaluations and checkpoints."""
        self.began, self.waited, self.timed = time.perf_counter(), 0.0, 0

    def _effective_batch(self) -> int:
        return self.config.train.batch_size * self.world * self.config.train.accumulate

    def _header(self) -> str:
        sizes = [(p.numel(), p.requires_grad) for p in self.module.parameters()]
        settings = self.config.train
        return (
            f"{self.config.model.name}: {sum(n for n, _ in sizes):,} parameters, "
            f"{sum(n for n, trained in sizes if trained):,} of them trained; "
            f"alignment {self.config.alignment.strategy}\n"
            f"{len(self.train_set)} objects, {len(self.val_set)} validation sentences; {self.total} steps, "
            f"{self.steps_per_epoch} per epoch\n"
            f"batch {self._effective_batch()} = {settings.batch_size} x {self.world} {self.device.type} "
            f"x {settings.accumulate} accumulated; precision {settings.precision}; writing to {self.out}"
        )

    def _bar(self) -> tqdm:
        hidden = not (self.is_main and on_terminal())
        return tqdm(total=self.total, initial=self.progress.step, desc="train", unit="step", disable=hidden)

    def _print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()


def _accelerator(config: Config) -> accelerate.Accelerator:
    AcceleratorState._reset_state()  # or a second run in this process could not have another precision
    made = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(),  # untold, it takes CPU processes for separate runs
        mixed_precision=config.train.precision,
        gradient_accumulation_steps=config.train.accumulate,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != launched:
        raise RuntimeError(f"WORLD_SIZE={launched}, but Accelerate sees {made.num_processes} process(es)")
    return made


def _starting_point(config: Config, resume: bool) -> Path | None:
    """The checkpoint to resume from. Neither starts over in a directory that holds a run, nor the reverse."""
    out = Path(config.train.out)
    found, skipped = checkpoint.newest(out)
    for line in skipped:
        print(f"skipped checkpoint {line}", file=sys.stderr)
    if resume and found is None:
        raise ResumeError(f"{out} has no complete checkpoint to resume from; start it without --resume")
    if not resume and found is not None:
        raise ResumeError(f"{out} already holds a run ({found.name}): add --resume, or give another --out")
    return found


def _versions() -> dict[str, str]:
    return {"aml": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
