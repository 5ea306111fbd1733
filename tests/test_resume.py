"""A run that is killed or stopped goes on to the bit; one that would go otherwise is not resumed unawares."""

import os
import random
import shutil
import signal
import time

import pytest
import tiny
import torch
from runs import assert_same_run, lines

from aml import checkpoint, training
from aml.config import load
from aml.errors import CheckpointError, ResumeError, Stopped
from aml.runlog import read_log
from aml.training import train

# 4 epochs of 4 steps; evaluated at 4, 8, ...; saved at 3, 6, 9, ... too, where the log's averages are open. With an
# average of the weights, and batch norm and dropout in training.
STEPS = 16
SETTINGS = ("train.ema=0.9", f"train.steps={STEPS}", "train.save_every=3", "train.keep=3", "optim.lr=0.01")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the loop see SIGTERM after each of the given steps."""

    def arrange(*steps: int) -> None:
        monkeypatch.setattr(
            training._Trainer, "_agreed", lambda self, _: signal.SIGTERM * (self.state.progress.step in steps)
        )

    return arrange


# ---------------------------------------------------------------------------------------- killed and stopped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_again_and_again_goes_on_to_the_bit(tmp_path, words, straight, workers):
    """kill -9 at random moments: amid a step, amid any write of a checkpoint, before the first checkpoint too."""
    draw, kills = random.Random(workers), 0
    given = words(tmp_path, f"train.workers={workers}")
    while True:
        resume = ["--resume"] if checkpoint.newest(tmp_path)[0] else []
        process = tiny.start(tiny.train, [*resume, *given], draw.randrange(30, 200))
        process.join(60)
        if process.exitcode != -signal.SIGKILL:
            break
        kills += 1
    assert process.exitcode == 0 and kills >= 2
    assert_same_run(tmp_path, straight)


def test_runs_that_are_killed_in_mid_epoch_go_on_to_the_bit(tmp_path, words, straight):
    """kill -9 with 0 and with 2 worker processes; SIGTERM to main process and workers, as schedulers send it.

    The three runs go at once, to save time.
    """
    ends = {"0": (0, signal.SIGKILL), "2": (2, signal.SIGKILL), "group": (2, signal.SIGTERM)}
    runs = {name: words(tmp_path / name, f"train.workers={workers}") for name, (workers, _) in ends.items()}
    processes = {name: tiny.start(tiny.train, given) for name, given in runs.items()}
    deadline = time.monotonic() + 120
    waiting = set(runs)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.001)
        for name in list(waiting):
            if len(read_log(tmp_path / name / "metrics.jsonl")) >= 5:
                os.killpg(processes[name].pid, ends[name][1])
                waiting.remove(name)
    for process in processes.values():
        process.join(60)
    assert not waiting
    assert [processes[name].exitcode for name in ends] == [
        -signal.SIGKILL,
        -signal.SIGKILL,
        128 + signal.SIGTERM,
    ]
    for name, given in runs.items():
        stopped_at = lines(tmp_path / name)[-1]["step"]
        assert stopped_at < STEPS and checkpoint.newest(tmp_path / name)[0], "killed too late or too early"
        train(load(None, given), resume=True)
        assert_same_run(tmp_path / name, straight)


@pytest.mark.parametrize("stops", [(4,), (5, 6), (1, 4, 7, 15)], ids=str)
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, words, straight, stop_at, stops):
    """At an epoch's edge, twice in one epoch, at the ends."""
    stop_at(*stops)
    for attempt, stop in enumerate(stops):
        with pytest.raises(Stopped, match=f"saved at step {stop}; go on with\n  aml train --resume --out"):
            train(load(None, words(tmp_path)), resume=attempt > 0)
    train(load(None, words(tmp_path)), resume=True)
    assert_same_run(tmp_path, straight)


def test_sigterm_saves_and_leaves(tmp_path, words, straight, monkeypatch):
    def step(self, batches, original=training._Trainer._step):
        original(self, batches)
        if self.state.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="SIGTERM and saved at step 5") as stopped,
    ):
        patch.setattr(training._Trainer, "_step", step)
        train(load(None, words(tmp_path)))
    assert stopped.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    train(load(None, words(tmp_path)), resume=True)
    assert_same_run(tmp_path, straight)


def test_accumulation_and_mixed_precision_go_on_to_the_bit(tmp_path, words, stop_at):
    more = ("train.accumulate=2", "train.precision=bf16", "train.steps=7")
    train(load(None, words(tmp_path / "a", *more)))
    stop_at(3)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path / "b", *more)))
    train(load(None, words(tmp_path / "b", *more)), resume=True)
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_the_loss_scale_goes_on_to_the_bit(tmp_path, words, monkeypatch, stop_at):
    """A scaler that soon overflows, so that steps are skipped, in fp32: half precision takes a GPU."""

    def open_accelerator(config, original=training.open_accelerator):
        made = original(config)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**118, growth_interval=2)
        return made

    monkeypatch.setattr(training, "open_accelerator", open_accelerator)
    large = "alignment.bce_weight=100"
    train(load(None, words(tmp_path / "a", large)))
    for attempt, stop in enumerate((3, 9, 0)):
        stop_at(stop)
        try:
            train(load(None, words(tmp_path / "b", large)), resume=attempt > 0)
        except Stopped:
            continue
    assert_same_run(tmp_path / "b", tmp_path / "a")
    steps = [line for line in lines(tmp_path / "a") if line["kind"] == "train"]
    assert 2 <= sum(line["skipped"] for line in steps) <= STEPS / 2
    scales = [line["loss_scale"] for line in steps]
    assert min(scales) >= 2.0**118 and len(set(scales)) > 1


def test_best_and_patience_survive(tmp_path, words, monkeypatch, stop_at):
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.6, 1.0])
    metrics = training.evaluation.metrics
    monkeypatch.setattr(training.evaluation, "metrics", lambda *args: metrics(*args) | {"mIoU": next(scores)})
    stop_at(13)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path, "train.patience=3", "train.steps=24")))
    train(load(None, words(tmp_path, "train.patience=3", "train.steps=24")), resume=True)
    progress = checkpoint.read(checkpoint.newest(tmp_path)[0]).state["progress"]
    assert (progress["step"], progress["best"], progress["best_step"], progress["stale"]) == (20, 0.9, 8, 3)
    assert checkpoint.resolve(tmp_path).name == "step-00000008"


@pytest.mark.parametrize("change", ["metric", "data"])
def test_the_best_is_forgotten_where_scores_are_not_comparable(tmp_path, words, monkeypatch, capsys, stop_at, change):
    """Even if the old one scored higher; until the next evaluation there is no best."""
    scores = iter([0.9, 0.1, 0.05, 0.04])
    metrics = training.evaluation.metrics

    def scored(*args):
        score = next(scores)
        return metrics(*args) | {"mIoU": score, "oIoU": score}

    monkeypatch.setattr(training.evaluation, "metrics", scored)
    run = tmp_path / "run"
    stop_at(6)
    with pytest.raises(Stopped):
        train(load(None, words(run, "train.patience=2", "train.keep=1")))
    assert checkpoint.resolve(run).name == "step-00000004"
    more = ["eval.metric=oIoU" if change == "metric" else f"data.root={tiny.write_data(tmp_path / 'data', train=7)}"]
    changed = load(None, words(run, "train.patience=2", "train.keep=1", *more))
    stop_at(7)
    with pytest.raises(Stopped):
        train(changed, resume=True, allow_change=["data"] if change == "data" else [])
    cause = "eval.metric" if change == "metric" else "the data"
    assert f"changed: best: 0.9000 at step 4 -> none yet, as {cause} changed" in capsys.readouterr().out
    assert checkpoint.resolve(run).name == "step-00000007" and not (run / "checkpoints/best").exists()
    stop_at()
    train(changed, resume=True)
    progress = checkpoint.read(checkpoint.newest(run)[0]).state["progress"]
    assert (progress["step"], progress["best"], progress["best_step"], progress["stale"]) == (16, 0.1, 8, 2)
    assert checkpoint.resolve(run).name == "step-00000008"


def test_a_finished_run_keeps_its_best_when_asked_for_another_metric(tmp_path, words, straight, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    best = checkpoint.resolve(run)
    train(load(None, words(run, "eval.metric=oIoU")), resume=True)
    assert "the best oIoU is not known" in capsys.readouterr().out and checkpoint.resolve(run) == best


@pytest.mark.parametrize(
    ("change", "name"),
    [("train.batch_size=2", "batch"), ("train.accumulate=2", "batch"), ("train.seed=1", "seed")],
)
def test_a_changed_run_is_not_resumed_unawares(tmp_path, words, stop_at, change, name):
    stop_at(2)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path)))
    changed = load(None, words(tmp_path, change, "train.steps=4"))
    with pytest.raises(ResumeError, match=rf"(?s)  {name}: .* -> .*--allow-change {name}$"):
        train(changed, resume=True)
    stop_at()
    train(changed, resume=True, allow_change=[name])
    assert lines(tmp_path)[-1]["step"] == 4


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_batches_in_a_step_begins_the_averages_of_the_log_anew(
    tmp_path, words, stop_at, before, after
):
    more = ("train.log_every=20", "train.steps=6")
    stop_at(3)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path, *more, f"train.accumulate={before}")))
    stop_at()
    train(load(None, words(tmp_path, *more, f"train.accumulate={after}")), resume=True, allow_change=["batch"])
    assert lines(tmp_path)[-1]["step"] == 6


def test_changed_data_is_refused(tmp_path, words, stop_at):
    stop_at(2)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path / "run")))
    other = tiny.write_data(tmp_path / "data", train=7)
    with pytest.raises(ResumeError, match=r"(?s)  data: .*--allow-change data$"):
        train(load(None, words(tmp_path / "run", f"data.root={other}")), resume=True)


def test_other_trained_parameters_are_told(tmp_path, words, stop_at):
    stop_at(2)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path)))
    frozen = load(None, words(tmp_path, "model.freeze_encoders=true"))
    with pytest.raises(CheckpointError, match=r"optimizer.pt is of a run .*other parameters.*freeze_encoders, from"):
        train(frozen, resume=True)


def test_settings_given_on_resume_count(tmp_path, words, stop_at, capsys):
    stop_at(2)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path)))
    with pytest.raises(Stopped):
        stop_at(3)
        train(load(None, words(tmp_path, "optim.weight_decay=0.3", "optim.lr=1e-9")), resume=True)
    printed = capsys.readouterr().out
    assert (
        "changed: optim.weight_decay: 0.01 -> 0.3" in printed
        and "changed: optim.lr: 0.01 -> 1e-09" in printed
    )
    groups = checkpoint.read(checkpoint.newest(tmp_path)[0]).optimizer["param_groups"]
    assert max(group["lr"] for group in groups) <= 1e-9
    assert max(group["weight_decay"] for group in groups) == 0.3


