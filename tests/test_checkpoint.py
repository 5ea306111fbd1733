"""Checkpoints: complete or not at all, whatever fails and whenever; kept, found and refused as documented."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from dying import DISK, half_write
from torch import nn

from aml import checkpoint
from aml.checkpoint import CheckpointError, newest, problem, read, resolve


class Tied(nn.Module):
    """Two names for one tensor, as embedding and output layers often have, and a part that is not trained."""

    def __init__(self, value):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        nn.init.constant_(self.a.weight, value)
        self.encoder = nn.Linear(4, 1, bias=False).requires_grad_(False)
        nn.init.constant_(self.encoder.weight, 7.0)


def save(run: Path, step: int, **options) -> Path:
    model = Tied(float(step))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.a(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    nn.init.constant_(model.a.weight, float(step))
    state = model.state_dict()
    weights = {"frozen": {"encoder.weight": state.pop("encoder.weight")}, "model": state, "aligner": {}}
    options = {"weights": weights, "config": "train: {}\n", "state": {"step": step}} | options
    return checkpoint.save(
        run,
        step,
        optimizer=optimizer.state_dict(),
        ranks=[{"cpu": torch.arange(step % 100)}],
        **options,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_loads(path: Path, step: int) -> None:
    assert problem(path) is None
    model = Tied(-1.0)
    checkpoint.load_weights(path, model=model, aligner=nn.Identity())
    assert torch.equal(model.b.weight, torch.full((2, 2), float(step)))
    assert torch.equal(model.encoder.weight, torch.full((1, 4), 7.0))
    assert read(path).state["step"] == step


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    assert_loads(path, 7)
    snapshot = read(path)
    assert len(snapshot.ranks) == 1 and torch.equal(snapshot.ranks[0]["cpu"], torch.arange(7))
    assert set(snapshot.optimizer) == {"state", "param_groups"}
    assert sorted(os.listdir(path)) == [
        "COMPLETE",
        "aligner.safetensors",
        "config.yaml",
        "frozen.safetensors",
        "model.safetensors",
        "optimizer.pt",
        "rng-rank0.pt",
        "state.json",
    ]


def test_frozen_weights_are_written_once(tmp_path):
    """One file under the names of all checkpoints, which outlives each of them, with the digest of its writing."""
    first = save(tmp_path, 1)
    second = save(tmp_path, 2, frozen_in=first, keep=1)
    third = save(tmp_path, 3, frozen_in=second)
    files = [path / "frozen.safetensors" for path in (second, third)]
    assert not first.exists() and files[0].samefile(files[1])
    assert_loads(second, 2)
    assert_loads(third, 3)
    flip(files[0])
    fourth = save(tmp_path, 4, frozen_in=third)
    assert problem(fourth) == "frozen.safetensors is damaged: its SHA-256 is not the one in COMPLETE"


def test_averaged_weights_are_read_where_there_are_some(tmp_path):
    raw, averaged = ({"weight": torch.full((1, 1), value), "bias": torch.zeros(1)} for value in (1.0, 2.0))
    path = save(tmp_path, 1, weights={"model": raw, "ema": averaged, "aligner": raw})
    model, aligner = nn.Linear(1, 1), nn.Linear(1, 1)
    checkpoint.load_weights(path, model=model, aligner=aligner)
    assert (model.weight, aligner.weight) == (2.0, 1.0)
    checkpoint.load_weights(path, averaged=False, model=model)
    assert model.weight == 1.0


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, best_step=5, keep=2)
    assert names(tmp_path) == ["best", "last", "step-00000005", "step-00000015", "step-00000100"]
    assert newest(tmp_path) == (tmp_path / "checkpoints/step-00000100", [])
    assert resolve(tmp_path).name == "step-00000005", "a run directory stands for its best checkpoint"
    assert resolve(tmp_path / "checkpoints/last").name == "step-00000100"


def test_a_best_checkpoint_that_is_gone_is_not_pointed_to(tmp_path):
    """Step 20 became the best and is damaged; the run goes on from step 10, for which step 5 was."""
    for step, best in ((5, 5), (10, 5), (20, 20)):
        save(tmp_path, step, best_step=best, keep=2)
    flip(tmp_path / "checkpoints/step-00000020/model.safetensors")
    found, _ = newest(tmp_path)
    assert found.name == "step-00000010"
    checkpoint.settle(found, 5, 2)
    assert resolve(tmp_path) == found
    save(tmp_path, 11, best_step=5)
    assert resolve(tmp_path).name == "step-00000011"
    save(tmp_path, 12, best_step=12)
    assert resolve(tmp_path).name == checkpoint.read_pointer(tmp_path / "checkpoints/best") == "step-00000012"


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(tmp_path):
    for step in (10, 20):
        flip(save(tmp_path, step, keep=1) / "model.safetensors")
    assert newest(tmp_path)[0] is None
    save(tmp_path, 15, keep=1)
    assert newest(tmp_path)[0].name == "step-00000015"


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest(tmp_path)[0].name == "step-100000000"


def test_a_complete_checkpoint_is_not_written_again(tmp_path):
    first = save(tmp_path, 3)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    save(tmp_path, 3)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "COMPLETE").unlink(), "no COMPLETE file"),
        (lambda p: (p / "COMPLETE").write_text("{"), "COMPLETE cannot be read"),
        (lambda p: (p / "COMPLETE").write_text("[]"), "COMPLETE cannot be read"),
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes instead of"),
        (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    path, skipped = newest(tmp_path)
    assert_loads(path, 1)
    assert len(skipped) == 1 and skipped[0].startswith(f"step-00000002: {reason}")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        resolve(tmp_path / "checkpoints/step-00000002")
    assert_loads(save(tmp_path, 2), 2)  # a damaged one gives way when its step comes again


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Failing:
    """Lets the first `after` disk operations pass and fails the next one, half done where it writes."""

    def __init__(self, monkeypatch, after: int):
        self.left, self.failed = after, None
        for owner, name, file in DISK:
            if name not in ("unlink", "rmtree"):  # removal: what fails to go is left behind
                monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name), file))

    def wrap(self, name, function, file):
        def call(*args, **kwargs):
            if self.left == 0 and self.failed is None:
                self.failed = name
                if file is not None:
                    half_write(args[file])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            return function(*args, **kwargs)

        return call


def test_a_failure_at_any_write_leaves_a_loadable_checkpoint(tmp_path):
    failures = []
    for after in range(1000):
        run = tmp_path / str(after)
        first = save(run, 1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, after)
            try:
                save(run, 2, keep=1, frozen_in=first)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        path, _ = newest(run)
        assert_loads(path, 2 if "step-00000002" in names(run) else 1)
        last = resolve(run / "checkpoints/last")
        assert_loads(last, int(last.name[5:]))
        if failing.failed is None:
            break
        failures.append(failing.failed)
        assert_loads(save(run, 2, keep=1), 2)  # and the next attempt works
        assert names(run) == ["last", "step-00000002"]
    assert set(failures) == {"save", "save_file", "write_text", "mkdir", "fsync", "link", "rename", "replace"}
    assert len(failures) > 20


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_an_error_of_the_system(tmp_path, file):
    """Unlike a faked one, as PyTorch and safetensors report it, neither as an OSError."""
    first = save(tmp_path, 1)
    tensors = {"model.safetensors": {"weights": {"model": {"a": torch.ones(9999)}}}, "optimizer.pt": {}}[file]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((first / file).stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002 was not written; \d+\.\d+ GB are free on its disk"):
            save(tmp_path, 2, **tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(tmp_path)[0] == first
    assert_loads(save(tmp_path, 2), 2)


def save_and_die(folder: Path) -> None:
    """Per moment a run and a process that dies then; until one lives to the end. Writes how each ended."""
    import dying

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a moment all the same, but for those who pull the plug
    first = save(folder / "first", 1, keep=1)
    ends: list[int] = []
    while 0 not in ends:
        if (child := os.fork()) == 0:
            run = folder / str(len(ends))
            shutil.copytree(folder / "first", run)
            dying.die_at(len(ends))
            save(run, 2, keep=1, frozen_in=first)
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
    (folder / "ends.json").write_text(json.dumps(ends))


def test_kill_9_at_each_write_leaves_a_loadable_checkpoint(tmp_path):
    """And the old checkpoint goes only when the new one is complete."""
    process = tiny.start(save_and_die, tmp_path)
    process.join(120)
    *ends, last = json.loads((tmp_path / "ends.json").read_text())
    assert set(ends) == {signal.SIGKILL} and last == 0 and len(ends) > 25
    steps = []
    for moment in range(len(ends) + 1):
        run = tmp_path / str(moment)
        path, _ = newest(run)
        steps.append(int(path.name[5:]))
        assert_loads(path, steps[-1])
        pointed = resolve(run / "checkpoints/last")
        assert_loads(pointed, int(pointed.name[5:]))
    assert steps == sorted(steps) and set(steps) == {1, 2}


def write_without_end(run: Path, said) -> None:
    model = nn.Linear(512, 512)
    optimizer = {"momentum": torch.zeros(512, 1024)}
    for step in range(1, 100_000):
        nn.init.constant_(model.bias, float(step))
        checkpoint.save(
            run,
            step,
            weights={"model": model.state_dict()},
            optimizer=optimizer,
            ranks=[{}],
            state={"step": step},
            config="",
            keep=1,
        )
        said.send(step)


def test_kill_9_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    for delay in (0.0, 0.003, 0.007, 0.013, 0.019):
        run = tmp_path / str(delay)
        hears, says = multiprocessing.Pipe(duplex=False)
        writer = tiny.start(write_without_end, run, says)
        says.close()
        saved = [hears.recv(), hears.recv()]
        time.sleep(delay)
        writer.kill()
        writer.join()
        try:
            while True:
                saved.append(hears.recv())
        except EOFError:
            pass
        path, _ = newest(run)
        step = read(path).state["step"]
        assert step in (saved[-1], saved[-1] + 1)
        model = nn.Linear(512, 512)
        checkpoint.load_weights(path, model=model)
        assert torch.equal(model.bias, torch.full((512,), float(step)))


def test_the_optimizer_file_is_not_a_pickle_that_runs(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"state": Path("x")}, path / "optimizer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        read(path)


def test_wrapped_or_empty_models_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1))
    for wrong, words in [(torch.compile(model), "wrapper"), (nn.Identity(), "no weights")]:
        with pytest.raises(CheckpointError, match=words):
            weights = {"model": wrong.state_dict()}
            checkpoint.save(tmp_path, 1, weights=weights, optimizer={}, ranks=[{}], state={}, config="")
    assert newest(tmp_path) == (None, [])


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit this model, see .*yaml"):
        checkpoint.load_weights(path, model=nn.Linear(3, 1))


def test_resolve_says_what_it_takes(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder.*Give a run directory"):
        resolve(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not written to the end"):
        resolve(tmp_path)


def test_the_marker_names_every_file(tmp_path):
    path = save(tmp_path, 1)
    listed = json.loads((path / "COMPLETE").read_text())["files"]
    assert sorted([*listed, "COMPLETE"]) == sorted(os.listdir(path))
