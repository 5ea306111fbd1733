"""Training: one loop over optimizer steps, on one device or many (Accelerate), resumable to the bit.

    Learner  one optimizer step: forward, backward, update or skip      aml/learner.py
    Window   what the steps say between two lines of the log            aml/training_window.py
    RunState what goes into a checkpoint and comes back                 aml/training_state.py

The data loader is not handed to Accelerate, whose own ways to resume in mid-epoch are not exact. Functions that
communicate between ranks say "collective": all ranks must call them.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from aml import evaluation, sharding
from aml.assembly import build_aligner, build_dataset, open_data, training_problems
from aml.config import Config, ConfigError, to_yaml
from aml.console import StopSignals, on_terminal, reader_has_left
from aml.data.dataset import EpochBatches
from aml.data.loading import read_batches
from aml.data.union import Annotations
from aml.distribution import open_accelerator
from aml.errors import Stopped
from aml.files import write_json, write_whole
from aml.learner import Learner
from aml.models import build_model
from aml.runlock import only_run
from aml.runlog import RunLog, tensorboard_writer
from aml.schedule import learning_rate_factor
from aml.training_state import RunState, starting_point

SIGNAL_CHECK = 10  # steps between agreements of several ranks on whether to stop


def train(config: Config, *, resume: bool = False, allow_change: Sequence[str] = ()) -> Path:
    """Train to the end and return the run directory, `config.train.out`. Collective.

    resume: go on from the newest complete checkpoint of that directory.
    allow_change: names of `training_state.ALLOWABLE` in which the run may differ from its checkpoint; it then goes on
        from the same step, but not as it would have.

    Raises Stopped after SIGINT or SIGTERM, NonFiniteLoss, ResumeError, ConfigError, LaunchError where another run
    writes to that directory, and what reading the data raises. Settings and annotations are checked before any process
    group is formed or model built.
    """
    if problems := training_problems(config):
        raise ConfigError(problems)
    with only_run(Path(config.train.out)):
        start = starting_point(Path(config.train.out), resume)
        refer = open_data(config)
        if config.train.tensorboard:
            tensorboard_writer()
        trainer = _Trainer(config, open_accelerator(config), refer)
        if start is not None:
            trainer.restore(start, allow_change)
        trainer.run()
    return trainer.out


class _Trainer:
    """One run: step, log, evaluate, save."""

    def __init__(self, config: Config, accelerator: accelerate.Accelerator, refer: Annotations):
        settings = config.train
        self.config, self.accelerator, self.out = config, accelerator, Path(settings.out)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        torch.manual_seed(settings.seed)
        model = build_model(**config.model.options())
        self.train_set = build_dataset(config, refer, model, "train", train=True)
        self.val_set = build_dataset(config, refer, model, "val", train=False)
        per_epoch = len(self._epoch(0, 0))
        self.steps_per_epoch = per_epoch // settings.accumulate  # batches that do not fill a step are dropped
        if not self.steps_per_epoch:
            raise ConfigError([f"train.accumulate={settings.accumulate}: an epoch has {per_epoch} batches"])
        self.total = settings.steps or settings.epochs * self.steps_per_epoch
        warmup = config.optim.warmup_steps
        self.warmup_steps = round(config.optim.warmup * self.total) if warmup is None else warmup
        aligner = build_aligner(config, model, round((config.alignment.warmup or 0) * self.total))
        self.learner = Learner(config, accelerator, model, aligner)
        torch.manual_seed(settings.seed + self.rank)  # dropout differs between ranks
        self.state = RunState(config, accelerator, self.train_set, self.val_set)
        self._restart_clock()

    def restore(self, path: Path, allow_change: Sequence[str]) -> None:
        notes = self.state.restore(path, self.learner, allow_change)
        self._print(f"resumed {path}" + "".join(f"\n  changed: {note}" for note in notes))

    def run(self) -> None:
        """From the present step to the last one. Collective."""
        settings, position = self.config.train, self.state.progress
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
        skipped = f" {position.skipped} steps were skipped, see metrics.jsonl." if position.skipped else ""
        best = f"was {_shown(position.best)} at step {position.best_step}"
        self._print(
            f"finished at step {position.step}; the best {self.config.eval.metric} "
            f"{best if position.best is not None else 'is not known'}.{skipped} Next:\n"
            f"  aml eval --checkpoint {shlex.quote(str(self.out))}"
        )

    def _finished(self) -> bool:
        patience, position = self.config.train.patience, self.state.progress
        return position.step >= self.total or (patience is not None and position.stale >= patience)

    # -------------------------------------------------------------------------------------------- one step

    def _epoch(self, epoch: int, start: int) -> EpochBatches:
        settings = self.config.train
        length = len(self.train_set)
        return EpochBatches(length, settings.batch_size, settings.seed, epoch, self.rank, self.world, start)

    def _batches(self) -> Generator[dict[str, Any], None, None]:
        """Batches from the present step on, without end; one loader for all epochs: its workers live on."""
        accumulate = self.config.train.accumulate

        def keys() -> Iterator[list[tuple[int, int]]]:
            first, done = divmod(self.state.progress.step, self.steps_per_epoch)
            for epoch in count(first):
                batches = self._epoch(epoch, done * accumulate)
                yield from islice(batches, (self.steps_per_epoch - done) * accumulate)
                done = 0

        yield from read_batches(self.train_set, keys(), self.config.train.workers, self.device)

    def _step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step of `accumulate` batches. Nothing here waits for the device."""
        step, window = self.state.progress.step, self.state.window
        first = self.config.optim.full_rate_first
        self.learner.set_rates(learning_rate_factor(step, self.total, self.warmup_steps, first))
        for _ in range(self.config.train.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            names = ("image", "tokens", "text_mask", "target", "valid")
            tensors = {n: batch[n].to(self.device, non_blocking=True) for n in names if n in batch}
            window.add(self.learner.learn(tensors, step), batch["sample_id"])
        window.end_step(self.learner.skipped)
        self.timed += 1

    # ------------------------------------------------------------------------------ logging and evaluation

    def _log(self) -> None:
        """A line of means since the last one, over all ranks; times are of the slowest rank. Collective."""
        position, window = self.state.progress, self.state.window
        in_a_row = self.state.checked_skips()
        means = window.means(self.accelerator)
        skipped = [step for step, length in enumerate(in_a_row) if length]
        culprits = [sample for step in skipped for sample in window.culprits(step)]
        position.skipped += len(skipped)
        position.skipped_in_a_row = in_a_row[-1]
        window.clear()
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        own = [(time.perf_counter() - self.began) / self.timed, self.waited / self.timed, memory]
        slowest = self.accelerator.gather(torch.tensor([own], device=self.device)).amax(0).tolist()
        self._restart_clock()
        speed = dict(zip(("step_s", "data_s", "device_gib"), slowest, strict=True))
        speed["samples_per_s"] = self._effective_batch() / speed["step_s"]
        values = means | {"skipped": len(skipped), "lr": max(g["lr"] for g in self.learner.optimizer.param_groups)}
        if culprits:
            values["skipped_samples"] = culprits
        if self.learner.scaler is not None:
            values["loss_scale"] = self.learner.scaler.get_scale()
        self._write("train", **values, speed=speed)
        if culprits:
            shown = ", ".join(culprits[:8]) + ", ..." * (len(culprits) > 8)
            self._print(f"skipped {len(skipped)} of {len(in_a_row)} steps, without a finite gradient; samples {shown}")
        line = f"loss {_shown(means['loss'])}  {speed['samples_per_s']:.1f} samples/s"
        self.bar.set_postfix_str(line)
        if self.bar.disable:
            self._print(f"step {position.step}/{self.total}  {line}")

    def _evaluate(self) -> None:
        """Metrics of the validation split, by sample id over all ranks; remembers the best. Collective."""
        model, aligner = self.learner.evaluated
        if self.world > 1:
            for buffer in model.buffers():  # batch norm's statistics have moved apart in the last step
                torch.distributed.broadcast(buffer, src=0)
        with sharding.undivided(self.learner.module):
            records = evaluation.evaluate(
                model,
                self.val_set,
                device=self.device,
                batch_size=self.config.train.batch_size,
                aligner=aligner,
                indices=evaluation.part_of_rank(len(self.val_set), self.config.train.batch_size, self.rank, self.world),
                workers=self.config.train.workers,
                progress=self.is_main and on_terminal(),
            )
        metrics = evaluation.metrics(gather_object(records), self.val_set.sample_ids)
        score = metrics.get(self.config.eval.metric, metrics["mIoU"])  # which gIoU is where every sentence has a target
        position = self.state.progress
        better = position.best is None or score > position.best
        if better:
            position.best, position.best_step, position.stale = score, position.step, 0
        else:
            position.stale += 1
        self._write("eval", **metrics)
        shown = (f"{name} {_shown(metrics[name])}" for name in ("mIoU", "oIoU", "auc", "area_ratio"))
        self._print(f"step {position.step}/{self.total}  val  {'  '.join(shown)}{'  (best)' * better}")
        self._restart_clock()

    def _save(self) -> None:
        """Collective."""
        self.state.checked_skips()
        self.state.save(self.learner)
        self._restart_clock()

    # -------------------------------------------------------------------------------------------- the rest

    def _open_directory(self) -> None:
        """Write what the run is, and open its log at the present step. Collective."""
        if self.is_main:
            self.log = RunLog(self.out, self.state.progress.step, self.config.train.tensorboard)
            write_whole(self.out / "config.yaml", to_yaml(self.config))
            run = {"command": sys.argv, "source": self.state.source, "versions": self.state.versions}
            write_json(self.out / "run.json", run | self.state.identity)
        self._print(self._header())
        self.accelerator.wait_for_everyone()

    def _write(self, kind: str, **values: Any) -> None:
        if self.is_main:
            step = self.state.progress.step
            epoch = round(step / self.steps_per_epoch, 4)
            self.log.write({"kind": kind, "step": step, "epoch": epoch, **values})

    def _agreed(self, received: int) -> int:
        """The signal that any rank has received, or 0. Collective."""
        if self.world == 1 or self.state.progress.step % SIGNAL_CHECK:
            return received * (self.world == 1)
        return int(self.accelerator.gather(torch.tensor([received], device=self.device)).max())

    def _restart_clock(self) -> None:
        """Steps are timed without evaluations and checkpoints."""
        self.began, self.waited, self.timed = time.perf_counter(), 0.0, 0

    def _effective_batch(self) -> int:
        return self.config.train.batch_size * self.world * self.config.train.accumulate

    def _header(self) -> str:
        sizes = [(p.numel(), p.requires_grad) for p in self.learner.module.parameters()]
        settings = self.config.train
        return (
            f"{self.config.model.name}: {sum(n for n, _ in sizes):,} parameters, "
            f"{sum(n for n, trained in sizes if trained):,} of them trained; "
            f"alignment {self.config.alignment.strategy}\n"
            f"{self.train_set.refer.name}: {len(self.train_set)} objects, {len(self.val_set)} validation sentences; "
            f"{self.total} steps, {self.steps_per_epoch} per epoch\n"
            f"batch {self._effective_batch()} = {settings.batch_size} x {self.world} {self.device.type} "
            f"x {settings.accumulate} accumulated; precision {settings.precision}; writing to {self.out}"
        )

    def _bar(self) -> tqdm:
        hidden = not (self.is_main and on_terminal())
        return tqdm(total=self.total, initial=self.state.progress.step, desc="train", unit="step", disable=hidden)

    def _print(self, text: str) -> None:
        if self.is_main:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:  # of `| head`: training goes on unread
                if not reader_has_left():
                    raise


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
