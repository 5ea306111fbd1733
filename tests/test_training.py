"""The training loop: a killed run goes on to the bit, ranks share the work, mistakes have names."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from aml import checkpoint, cli, training
from aml.config import ConfigError, load
from aml.errors import NonFiniteLoss, ResumeError, Stopped
from aml.runlog import RunLog, read_log
from aml.training import learning_rate_factor, train

# 4 epochs of 4 steps; evaluated at 4, 8, ...; saved at 3, 6, 9, ... too, where the log's averages are open.
STEPS = 16
SETTINGS = (f"train.steps={STEPS}", "train.save_every=3", "train.keep=3", "optim.lr=0.01", "optim.warmup=0.2")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny.write_data(folder / "data")
    tiny.write_text_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def words(place):
    def make(out: Path, *more: str) -> list[str]:
        return tiny.settings(place / "data", place / "encoder", out, *SETTINGS, *more)

    return make


@pytest.fixture(scope="module")
def straight(place, words):
    """The uninterrupted run that others are compared with."""
    return train(load(None, words(place / "straight")))


def lines(run: Path) -> list[dict]:
    """The log without its timings."""
    return [{k: v for k, v in line.items() if k != "speed"} for line in read_log(run / "metrics.jsonl")]


def assert_same_run(run: Path, expected: Path) -> None:
    assert lines(run) == lines(expected)
    for name in ("best", "last"):
        a, b = (checkpoint.resolve(folder / "checkpoints" / name) for folder in (run, expected))
        assert a.name == b.name
        for weights in ("model.safetensors", "aligner.safetensors"):
            assert (a / weights).read_bytes() == (b / weights).read_bytes()
        first, second = checkpoint.read(a), checkpoint.read(b)
        assert first.state["progress"] == second.state["progress"]
        assert_equal(first.optimizer, second.optimizer)
        assert_equal(first.ranks, second.ranks)


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the loop see SIGTERM after each of the given steps."""

    def arrange(*steps: int) -> None:
        monkeypatch.setattr(
            training._Trainer, "_agreed", lambda self, _: signal.SIGTERM * (self.progress.step in steps)
        )

    return arrange


# ------------------------------------------------------------------------------------------------ resuming


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
        if self.progress.step == 4:
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


def test_best_and_patience_survive(tmp_path, words, monkeypatch, stop_at):
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.6, 1.0])
    metrics = training.evaluation.metrics
    monkeypatch.setattr(training.evaluation, "metrics", lambda *args: metrics(*args) | {"mIoU": next(scores)})
    stop_at(13)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path, "train.patience=3", "train.steps=24")))
    train(load(None, words(tmp_path, "train.patience=3", "train.steps=24")), resume=True)
    progress = checkpoint.read(checkpoint.newest(tmp_path)[0]).state["progress"]
    assert progress == {"step": 20, "best": 0.9, "best_step": 8, "stale": 3}
    assert checkpoint.resolve(tmp_path).name == "step-00000008"


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


def test_changed_data_is_refused(tmp_path, words, stop_at):
    stop_at(2)
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path / "run")))
    other = tiny.write_data(tmp_path / "data", train=7)
    with pytest.raises(ResumeError, match=r"(?s)  data: .*--allow-change data$"):
        train(load(None, words(tmp_path / "run", f"data.root={other}")), resume=True)


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


def test_a_run_directory_is_neither_overwritten_nor_invented(tmp_path, words, straight):
    with pytest.raises(ResumeError, match="already holds a run .*add --resume, or give another --out"):
        train(load(None, words(straight)))
    with pytest.raises(ResumeError, match="no complete checkpoint to resume from; start it without --resume"):
        train(load(None, words(tmp_path)), resume=True)


def test_a_finished_run_stays_as_it_is(straight, words):
    before = (straight / "metrics.jsonl").read_bytes()
    train(load(None, words(straight)), resume=True)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_no_process_outlives_a_failed_run(tmp_path, words, monkeypatch):
    def fail(self):
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("as if by mistake")

    monkeypatch.setattr(training._Trainer, "_evaluate", fail)
    with pytest.raises(RuntimeError, match="as if"):
        train(load(None, words(tmp_path, "train.workers=2")))
    assert not multiprocessing.active_children()


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
    assert json.loads((straight / "run.json").read_text())["world"] == 1


def test_the_loss_falls(straight):
    losses = [line["loss"] for line in read_log(straight / "metrics.jsonl") if line["kind"] == "train"]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_the_last_checkpoints_and_the_best_are_kept(straight):
    best = checkpoint.read_pointer(straight / "checkpoints/best")
    kept = {path.name for path in (straight / "checkpoints").glob("step-*")}
    assert kept == {best, "step-00000012", "step-00000015", "step-00000016"}


def test_half_a_line_and_later_lines_go_when_the_log_is_opened(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, 2)
    log.write({"kind": "train", "step": 3, "loss": float("nan")})
    assert read_log(tmp_path / "metrics.jsonl") == [
        {"step": 1},
        {"step": 2},
        {"kind": "train", "step": 3, "loss": None},
    ]


def test_the_schedule():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == pytest.approx(0.91**0.9)
    assert all(a > b for a, b in zip(factors[9:], factors[10:], strict=False))
    assert factors[-1] == pytest.approx(0.01**0.9)
    assert learning_rate_factor(0, 5, 0.0) == 1.0


# ----------------------------------------------------------------------------------------------- mistakes


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_samples(tmp_path, words, monkeypatch):
    def forward(self, batch, step, original=training.TrainingStep.forward):
        loss, record = original(self, batch, step)
        factor = float("nan") if step == 4 else 1.0
        return loss * factor, record | {"loss": record["loss"] * factor}

    monkeypatch.setattr(training.TrainingStep, "forward", forward)
    with pytest.raises(
        NonFiniteLoss, match=r"from step 5 on. Its samples: \d+-\d+, .*good state: step-00000004"
    ):
        train(load(None, words(tmp_path)))
    assert checkpoint.newest(tmp_path)[0].name == "step-00000004"


def test_mistakes_are_found_before_a_model_is_built(tmp_path, words, monkeypatch):
    monkeypatch.setattr(training, "build_model", lambda **_: pytest.fail("too late"))
    with pytest.raises(ConfigError, match="data.root: no data given; use --data"):
        train(load(None, words(tmp_path, "data.root=")))
    with pytest.raises(FileNotFoundError, match="no folder"):
        train(load(None, words(tmp_path, "data.root=/nowhere")))


def test_an_epoch_shorter_than_a_step_is_refused(tmp_path, words):
    with pytest.raises(ConfigError, match="train.accumulate=9: an epoch has 4 batches"):
        train(load(None, words(tmp_path, "train.accumulate=9")))


# ---------------------------------------------------------------------------------------------- two ranks


def test_two_ranks_share_the_samples_and_merge_the_evaluation(tmp_path, words, stop_at):
    """Their batches together are those of one rank with the doubled batch; and they resume to the bit."""
    common = ("train.steps=8", "train.log_every=8")
    two, again, one = tmp_path / "two", tmp_path / "again", tmp_path / "one"
    more = ("train.batch_size=2", "train.keep=9", *common)
    jobs = [
        (words(two, *more), None, False),
        (words(again, *more), 3, False),
        (words(again, *more), None, True),
    ]
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    ranks = [tiny.start(tiny.train_as_rank, rank, rendezvous, jobs) for rank in (0, 1)]
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert_same_run(again, two)
    # What two ranks have found together is what one finds with the saved weights.
    assert (
        cli.main(["eval", "--checkpoint", str(two / "checkpoints/last"), "--out", str(tmp_path / "one.json")])
        == 0
    )
    metrics = json.loads((tmp_path / "one.json").read_text())["metrics"]
    assert metrics == pytest.approx({name: lines(two)[-1][name] for name in metrics}, abs=1e-6)
    with pytest.raises(ResumeError, match="world: 2 -> 1"):
        train(load(None, jobs[2][0]), resume=True)

    stop_at(3)
    with pytest.raises(Stopped):
        train(load(None, words(one, "train.batch_size=4", *common)))
    halves = [rank["samples"] for rank in checkpoint.read(again / "checkpoints/step-00000003").ranks]
    (whole,) = (rank["samples"] for rank in checkpoint.read(one / "checkpoints/step-00000003").ranks)
    assert len(halves) == 2 and [a + b for a, b in zip(*halves, strict=True)] == whole
    assert max(Counter(sum(whole, [])).values()) == 1
