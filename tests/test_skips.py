"""A step whose loss or gradient is not finite changes nothing, is counted and told, and too many end the run."""

import pytest
import torch
from runs import assert_equal, assert_same_run, lines
from torch.utils._python_dispatch import TorchDispatchMode

from aml import checkpoint, learner, training
from aml.assembly import open_data
from aml.config import load
from aml.errors import NonFiniteLoss, Stopped
from aml.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
FINITE, NAN, INF, GRADIENT = "finite", "nan", "inf", "gradient"
SETTINGS = ("train.steps=16", "train.save_every=3", "train.ema=0.9")


@pytest.fixture
def trainer(tmp_path, words):
    config = load(None, words(tmp_path))
    return training._Trainer(config, training.open_accelerator(config), open_data(config))


def break_at(monkeypatch, steps):
    """Make the loss NaN at these steps."""

    def forward(self, batch, step, draw, original=learner.TrainingStep.forward):
        loss, record = original(self, batch, step, draw)
        factor = float("nan") if step in steps else 1.0
        return loss * factor, record | {"loss": record["loss"] * factor}

    monkeypatch.setattr(learner.TrainingStep, "forward", forward)


def break_batch(learner, batch, how):
    """A batch, or a gradient, that is not finite in one place; returns how to mend the gradient."""
    if how == NAN:
        batch["image"][0, 0, 0, 0] = torch.nan
    elif how == INF:
        batch["image"][0] = 3e38
    elif how == GRADIENT:
        weight = next(p for p in learner.model.parameters() if p.requires_grad)
        return weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf)).remove
    return lambda: None


def everything(learner):
    """Copies of all that a step changes."""
    model, aligner = learner.average.modules
    states = {"average": model.state_dict(), "average of the aligner": aligner.state_dict()}
    states |= {"model": learner.model.state_dict(), "aligner": learner.aligner.state_dict()}
    states["optimizer"] = {str(i): dict(moments) for i, moments in learner.optimizer.state_dict()["state"].items()}
    return {name: {k: copied(v) for k, v in state.items()} for name, state in states.items()}


def copied(value):
    return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value.clone()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_a_skipped_step_changes_nothing(trainer, scaled):
    learner, batches = trainer.learner, trainer._batches()
    assert learner.statistics, "no batch norm in training: choose another backbone"
    if scaled:
        learner.scaler = learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    learner.set_rates(1.0)
    for step, how in enumerate([FINITE, NAN, FINITE, INF, GRADIENT, FINITE]):
        before = everything(learner)
        scale = learner.scaler.get_scale() if scaled else 1
        batch = next(batches)
        mend = break_batch(learner, batch, how)
        record = learner.learn(batch, step)
        mend()
        after = everything(learner)
        assert bool(learner.skipped) == (how != FINITE)
        if how == FINITE:
            assert record["loss"].isfinite() and record["gradient_norm"].isfinite()
            for name in before:
                with pytest.raises(AssertionError):
                    assert_equal(after[name], before[name])
        else:
            assert_equal(after, before)
            assert not scaled or learner.scaler.get_scale() == scale / 2
        for state in (learner.model.state_dict(), learner.average.modules[0].state_dict()):
            assert all(tensor.isfinite().all() for tensor in state.values())


def test_one_bad_batch_of_an_accumulated_step_spoils_the_step(tmp_path, words):
    config = load(None, words(tmp_path, "train.accumulate=2"))
    trainer = training._Trainer(config, training.open_accelerator(config), open_data(config))
    learner, batches = trainer.learner, trainer._batches()
    for step, pair in enumerate([(FINITE, FINITE), (NAN, FINITE)]):
        before = everything(learner)
        for how in pair:
            batch = next(batches)
            break_batch(learner, batch, how)
            learner.learn(batch, step)
    assert learner.skipped
    assert_equal(everything(learner), before)


class AskedForNumbers(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.asked.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_a_step_asks_the_device_for_nothing(trainer, scaled, monkeypatch):
    """Of the update, which decides whether to skip, and of what the log keeps. (The average counts on the host.)"""
    learner, window = trainer.learner, trainer.state.window
    learner.average = None
    if scaled:
        learner.scaler = learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    learner.set_rates(1.0)
    found = []

    def update(original=learner._update):
        with AskedForNumbers() as mode:
            norm = original()
            window.add({"gradient_norm": norm}, [])
            window.end_step(learner.skipped)
        found.append(mode.asked)
        return norm

    monkeypatch.setattr(learner, "_update", update)
    batches = trainer._batches()
    for step in range(2):
        learner.learn(next(batches), step)
    assert found == [[], []]
    with AskedForNumbers() as mode:
        bool(learner.skipped)
    assert mode.asked, "the test would not have seen it"


def test_skips_are_counted_and_told_and_survive_an_interruption(tmp_path, words, monkeypatch, capsys):
    break_at(monkeypatch, (3, 4, 9))
    log_every = "train.log_every=4"
    train(load(None, words(tmp_path / "a", log_every)))
    assert "skipped 1 of 4 steps, without a finite gradient" in capsys.readouterr().out
    steps = [line for line in lines(tmp_path / "a") if line["kind"] == "train"]
    assert [line["skipped"] for line in steps] == [1, 1, 1, 0]
    assert all(len(line["skipped_samples"]) == 4 for line in steps[:3]) and "skipped_samples" not in steps[3]
    assert all(line["loss"] is not None for line in steps)
    progress = checkpoint.read(checkpoint.newest(tmp_path / "a")[0]).state["progress"]
    assert (progress["step"], progress["skipped"], progress["skipped_in_a_row"]) == (16, 3, 0)
    agreed = training._Trainer._agreed
    monkeypatch.setattr(training._Trainer, "_agreed", lambda self, _: 15 * (self.state.progress.step == 6))
    with pytest.raises(Stopped):
        train(load(None, words(tmp_path / "b", log_every)))
    monkeypatch.setattr(training._Trainer, "_agreed", agreed)
    train(load(None, words(tmp_path / "b", log_every)), resume=True)
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_too_many_skips_in_a_row_end_the_run(tmp_path, words, monkeypatch):
    """Over the edges of log lines, and of an interruption; those before do not count."""
    break_at(monkeypatch, (2, *range(6, 16)))
    given = words(tmp_path, "train.max_skips=5")
    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "_agreed", lambda self, _: 15 * (self.state.progress.step == 9))
        with pytest.raises(Stopped):
            train(load(None, given))
    with pytest.raises(
        NonFiniteLoss,
        match=r"not finite in 5 step\(s\) in a row, the last of them step 11. Its samples: \d+-\d+, .*: step-00000009",
    ):
        train(load(None, given), resume=True)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000009"
