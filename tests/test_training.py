"""The training loop: what a run writes and keeps, and mistakes that have names."""

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch

from aml import checkpoint, distribution, runlog, training
from aml.config import ConfigError, load
from aml.data.refer import ReferDataset
from aml.errors import LaunchError, ResumeError
from aml.runlock import only_run
from aml.runlog import RunLog, read_log
from aml.training import train

# 4 epochs of 4 steps.
STEPS = 16
SETTINGS = (f"train.steps={STEPS}", "train.save_every=3", "train.keep=3", "optim.lr=0.01", "optim.warmup=0.2")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_directory_is_neither_overwritten_nor_invented(tmp_path, words, straight):
    with pytest.raises(ResumeError, match="already holds a run .*add --resume, or give another --out"):
        train(load(None, words(straight)))
    with pytest.raises(ResumeError, match="no complete checkpoint to resume from; start it without --resume"):
        train(load(None, words(tmp_path)), resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("damage", ["other format", "no marker"])
def test_a_run_whose_checkpoints_cannot_be_read_is_left_as_it_is(tmp_path, words, straight, damage, resume):
    run = shutil.copytree(straight, tmp_path / "run")
    for marker in run.glob("checkpoints/step-*/COMPLETE"):
        marker.write_text('{"format": 1, "files": {}}') if damage == "other format" else marker.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=r"whose checkpoints cannot be read \(step-0.*: give another --out") as told:
        train(load(None, words(run)), resume=resume)
    assert "--resume" not in str(told.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_stays_as_it_is(straight, words):
    before = (straight / "metrics.jsonl").read_bytes()
    train(load(None, words(straight)), resume=True)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_two_runs_do_not_write_to_one_folder(tmp_path, words):
    """A run that is killed, with worker processes that may live a moment longer, is no longer in the way."""
    first = tiny.start(tiny.train, words(tmp_path, "train.workers=2", "train.steps=100000"))
    deadline = time.monotonic() + 120
    while checkpoint.newest(tmp_path)[0] is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(first.pid).children()
    message = rf"^{tmp_path}: another run is writing there; .* give another --out$"
    try:
        for resume in (False, True):
            with pytest.raises(LaunchError, match=message):
                train(load(None, words(tmp_path)), resume=resume)
        assert len(workers) == 2 and first.is_alive()
        for worker in workers:
            worker.suspend()
    finally:
        first.kill()
        first.join(60)
    try:
        train(load(None, words(tmp_path, "train.steps=1")), resume=True)
        assert all(worker.status() == psutil.STATUS_STOPPED for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_free_when_its_run_has_ended(tmp_path, fails):
    with pytest.raises(RuntimeError, match="as if") if fails else nullcontext(), only_run(tmp_path):
        assert refused(tmp_path)
        if fails:
            raise RuntimeError("as if by mistake")
    assert not refused(tmp_path) and not list(tmp_path.iterdir())


def refused(folder) -> bool:
    """Whether another process may not have the folder."""
    process = tiny.start(tiny.have_alone, folder)
    process.join(60)
    return process.exitcode == 3


def test_a_lock_that_is_removed_while_it_is_opened_does_not_count(tmp_path, monkeypatch):
    """By a run that ends at that moment: a third one would lock a new file."""
    removed = []

    def lock(file, how, original=fcntl.lockf):
        if not removed:
            removed.append(os.unlink(file.name))
        original(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with only_run(tmp_path):
        assert removed and refused(tmp_path)


def test_a_file_system_without_locks_does_not_keep_from_training(tmp_path, words, monkeypatch):
    def unsupported(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    train(load(None, words(tmp_path, "train.steps=1")))
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"


def test_one_of_several_ranks_has_the_folder_for_all(tmp_path, monkeypatch):
    with only_run(tmp_path):
        assert refused(tmp_path)
        monkeypatch.setenv("RANK", "1")
        with only_run(tmp_path):
            pass
        assert refused(tmp_path)


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path, words):
    with pytest.raises(FileNotFoundError, match="no folder"):
        train(load(None, words(tmp_path / "runs" / "first", "data.root=/nowhere")))
    assert not list(tmp_path.iterdir())


def test_no_process_outlives_a_failed_run(tmp_path, words, monkeypatch):
    def fail(self):
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("as if by mistake")

    monkeypatch.setattr(training._Trainer, "_evaluate", fail)
    with pytest.raises(RuntimeError, match="as if"):
        train(load(None, words(tmp_path, "train.workers=2")))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_photograph_that_cannot_be_read_ends_the_command(tmp_path, words, straight, split):
    """Though processes read ahead: the command tells it in a line, and leaves."""
    data = ReferDataset(tiny.write_data(tmp_path / "data"))
    photograph = data.expressions(split)[0].image_path
    photograph.write_bytes(photograph.read_bytes()[:200])
    settings = [f"data.root={tmp_path / 'data'}", "train.workers=2"]
    commands = {"train": ["train", *words(tmp_path / "run", *settings)]}
    if split == "val":
        commands["eval"] = ["eval", "--checkpoint", str(straight), "--out", str(tmp_path / "found"), *settings]
    processes = {name: tiny.start(tiny.command, each, tmp_path / name) for name, each in commands.items()}
    for name, process in processes.items():
        process.join(120)
        code = process.exitcode
        process.kill()
        assert code == 2, f"aml {name} hangs" if code is None else (tmp_path / name).read_text()
        (error,) = (tmp_path / name).read_text().splitlines()
        assert re.fullmatch(rf"error: sample [\d-]+: image .*{photograph.name} was not read .*leaves them out", error)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_environment_does_not_change_how_many_batches_a_step_has(tmp_path, words, monkeypatch, accumulate):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    more = (f"train.accumulate={accumulate}", "train.steps=2", "train.log_every=1")
    train(load(None, words(tmp_path, *more)))
    steps = [line for line in read_log(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert len(steps) == 2 and all("gradient_norm" in line for line in steps)


# ------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_writes(straight):
    log = read_log(straight / "metrics.jsonl")
    evaluations = [line for line in log if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [4, 8, 12, 16]
    wanted = {
        "mIoU",
        "oIoU",
        "full_mIoU",
        "auc",
        "auc_wrong_sentence",
        "target_left_out",
        "area_ratio",
        "P@0.5",
    }
    assert wanted <= evaluations[0].keys()
    steps = [line for line in log if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(2, STEPS + 1, 2))
    assert {"loss", "gradient_norm", "kept", "lr", "speed"} <= steps[0].keys()
    assert load(straight / "config.yaml").train.steps == STEPS
    assert load(checkpoint.resolve(straight) / "config.yaml") == load(straight / "config.yaml")
    run = json.loads((straight / "run.json").read_text())
    assert run["world"] == 1 and run["source"] == runlog.source_commit()
    assert checkpoint.read(checkpoint.resolve(straight)).state["source"] == run["source"]


def test_the_loss_falls(straight):
    losses = [line["loss"] for line in read_log(straight / "metrics.jsonl") if line["kind"] == "train"]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_the_last_checkpoints_and_the_best_are_kept(straight):
    best = checkpoint.read_pointer(straight / "checkpoints/best")
    kept = {path.name for path in (straight / "checkpoints").glob("step-*")}
    assert kept == {best, "step-00000012", "step-00000015", "step-00000016"}


def test_weights_that_are_not_trained_are_written_once(tmp_path, words):
    """The checkpoints of a run and of its continuation share one file."""
    more = ("model.freeze_encoders=true", "train.keep=9")
    for steps in (4, 8):
        train(load(None, words(tmp_path, *more, f"train.steps={steps}")), resume=steps > 4)
    first, *others = sorted(tmp_path.glob("checkpoints/step-*/frozen.safetensors"))
    assert len(others) == 3 and all(first.samefile(other) for other in others)
    assert first.stat().st_size > 2 * (first.parent / "model.safetensors").stat().st_size / 3


def test_the_commit_is_that_of_the_source_alone(tmp_path, monkeypatch):
    """Not that of a repository into which the package is installed, as an untracked file."""
    assert runlog.source_commit() is None or len(runlog.source_commit()["commit"]) == 40

    def git(*command):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *command], check=True)

    module = tmp_path / "runlog.py"
    module.write_text("")
    monkeypatch.setattr(runlog, "__file__", str(module))
    assert runlog.source_commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    assert runlog.source_commit() is None
    git("add", "runlog.py")
    git("commit", "-q", "-m", "this one")
    assert runlog.source_commit()["dirty"] is False
    module.write_text("# changed")
    assert runlog.source_commit()["dirty"] is True


def test_half_a_line_and_later_lines_go_when_the_log_is_opened(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, 2)
    log.write({"kind": "train", "step": 3, "loss": float("nan")})
    assert read_log(tmp_path / "metrics.jsonl") == [
        {"step": 1},
        {"step": 2},
        {"kind": "train", "step": 3, "loss": None},
    ]


# ----------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_found_before_a_model_is_built(tmp_path, words, monkeypatch):
    monkeypatch.setattr(training, "build_model", lambda **_: pytest.fail("too late"))
    with pytest.raises(ConfigError, match="data.root: no data given; use --data"):
        train(load(None, words(tmp_path, "data.root=")))
    with pytest.raises(FileNotFoundError, match="no folder"):
        train(load(None, words(tmp_path, "data.root=/nowhere")))


def test_half_precision_takes_a_gpu(tmp_path, words):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="train.precision=fp16: takes a GPU; give bf16 or no"):
        train(load(None, words(tmp_path, "train.precision=fp16")))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.resize=letterbox", "alignment.strategy=released knows no padding; give data.resize=squash"),
        ("model.image_size=72", "model.image_size=72: alignment.strategy=released fills squares of 32"),
    ],
)
def test_what_the_released_filter_cannot_have_is_refused_before_the_first_step(tmp_path, words, word, message):
    with pytest.raises(ConfigError, match=message):
        train(load(None, words(tmp_path / "run", "alignment.strategy=released", "alignment.warmup=1", word)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("version", "ema", "error", "message"),
    [
        (1, None, LaunchError, "FSDP version 1 is not supported: launch with --fsdp_version 2"),
        (2, 0.9, ConfigError, "train.ema: not with FSDP"),
    ],
)
def test_what_fsdp_cannot_have_is_refused(words, tmp_path, version, ema, error, message):
    config = load(None, words(tmp_path, *[f"train.ema={ema}"] * bool(ema)))
    with pytest.raises(error, match=message):
        distribution._prepare_fsdp(SimpleNamespace(is_fsdp2=version == 2), config)


def test_an_epoch_shorter_than_a_step_is_refused(tmp_path, words):
    with pytest.raises(ConfigError, match="train.accumulate=9: an epoch has 4 batches"):
        train(load(None, words(tmp_path, "train.accumulate=9")))


