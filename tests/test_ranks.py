"""Two processes, on the CPU: they train as one with the doubled batch, evaluate each sample once, and end together.

Most of it is done in one launch by torchrun, since starting Python takes longer than the work.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import launched
import pytest
import tiny
import torch
from runs import assert_same_run, lines
from safetensors.torch import load_file

from aml import checkpoint, cli, training
from aml.config import load
from aml.errors import LaunchError, ResumeError
from aml.models import build_model
from aml.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8
SIZES = (1, 2, 3, 5)  # of a set to evaluate: fewer than ranks, as many, one more, and a rest
# What two ranks must not differ in from one: no dropout, which draws by rank, and one image at a time in evaluation.
ALIKE = (
    "model.freeze_encoders=true", f"train.steps={STEPS}", "train.log_every=1", "train.save_every=3", "train.keep=9",
    "alignment.target_weight=20",  # or so short a training would find nothing anywhere
)
KILLED = ("train.batch_size=2", "model.freeze_encoders=false", "train.ema=0.9")
STRATEGIES = ("loss", "image", "released")  # of one pass, of one and a half, of two
# With what a GPU is short of memory for: bf16, and activations computed again in the backward pass.
CARIS = (
    "model.name=caris", "model.backbone=swin_tiny_patch4_window7_224", "model.layers=2",
    "model.gradient_checkpointing=true", "model.freeze_encoders=false", "train.precision=bf16", "train.steps=2",
    "train.batch_size=2", "alignment.warmup=0",
)
PRETRAINED = (
    "model.backbone=tf_efficientnet_lite0", "model.text_encoder=minilm", "model.pretrained=true", "train.steps=1",
    "train.batch_size=2",
)
SPREAD = ("train.steps=4", "train.log_every=8")  # whose checkpoint of step 3 tells the samples of all steps


@pytest.fixture(scope="module")
def words(place):
    def make(name, *more):
        return tiny.settings(place / "data", place / "encoder", place / name, *ALIKE, *more)

    return make


@pytest.fixture(scope="module")
def launch(place, words):
    """What torchrun printed and returned. Its last job is one in which rank 1 dies."""
    half = "train.batch_size=2"
    jobs = [
        {"do": "train", "words": words("two", half)},
        {"do": "train", "words": words("broken", half, "train.ema=0.5"), "breaks": 1},
        {"do": "train", "words": words("spread", half, *SPREAD)},
        {"do": "evaluate", "words": words("evaluated by two", "train.batch_size=1"), "sizes": SIZES},
        {"do": "train_divided", "words": words("divided", half)},
        {"do": "train_divided", "words": words("divided again", half), "stop": 4},
        {"do": "train_divided", "words": words("divided again", half), "resume": True},
        {"do": "train_caris", "words": words("caris", *CARIS), "divided": words("caris divided", *CARIS)},
        {"do": "train_divided", "words": words("pretrained", *PRETRAINED)},
        {"do": "train", "words": words("dead", half), "dies": 1},
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(tests / "launched.py"), str(place / "jobs.json")],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=300,
    )


@pytest.fixture(scope="module")
def one(words):
    return train(load(None, words("one", "train.batch_size=4")))


def assert_same_curve(run, expected):
    """In all that is logged of a step. Evaluation counts pixels, of which rounding may move one."""
    for line, wanted in zip(lines(run), lines(expected), strict=True):
        kind = wanted.pop("kind")
        assert line.pop("kind") == kind
        assert line == pytest.approx(wanted, rel=1e-5 if kind == "train" else 1e-3, abs=1e-9)


@pytest.mark.parametrize("run", ["two", "divided"])
def test_two_ranks_train_as_one_with_the_doubled_batch(place, launch, one, run):
    """By DDP, and by FSDP, whose checkpoints hold the full weights all the same."""
    assert (place / run / "checkpoints/last").exists(), launch.stdout + launch.stderr
    assert_same_curve(place / run, one)
    assert lines(one)[-1]["area_ratio"] > 0.1
    names = {file.name for file in checkpoint.resolve(one).iterdir()}
    assert {file.name for file in checkpoint.resolve(place / run).iterdir()} == names | {"rng-rank1.pt"}
    # What two ranks have found together is what one finds with the saved weights.
    found = place / f"{run}.json"
    assert cli.main(["eval", "--checkpoint", str(place / run / "checkpoints/last"), "--out", str(found)]) == 0
    metrics = json.loads(found.read_text())["metrics"]
    assert metrics == pytest.approx({name: lines(place / run)[-1][name] for name in metrics}, abs=1e-6)


def test_two_ranks_share_the_samples(place, launch, words):
    train(load(None, words("spread on one", "train.batch_size=4", *SPREAD)))
    runs = (checkpoint.read(place / name / "checkpoints/step-00000003") for name in ("spread", "spread on one"))
    halves, (whole,) = ([rank["window"]["samples"] for rank in run.ranks] for run in runs)
    assert len(halves) == 2 and [a + b for a, b in zip(*halves, strict=True)] == whole
    assert max(Counter(sum(whole, [])).values()) == 1


def test_fsdp_goes_on_to_the_bit(place, launch):
    assert_same_run(place / "divided again", place / "divided")


def test_fsdp_trains_caris_as_ddp_does(place, launch):
    """In bf16, which without FSDP is autocast."""
    assert_same_curve(place / "caris divided", place / "caris")


def test_fsdp_leaves_pretrained_encoders_whole(place, launch, words):
    """Its launcher would have rank 0 alone read them."""
    model = build_model(**load(None, words("pretrained", *PRETRAINED)).model.options())
    encoders = load_file(checkpoint.resolve(place / "pretrained") / f"{checkpoint.FROZEN}.safetensors")
    assert len(encoders) > 100
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(encoders[name], parameter)


def test_fsdp_where_accelerate_would_not_use_it_is_refused(words, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(LaunchError, match="FSDP was asked for, .* 1 process.* on cpu: launch without --use_fsdp"):
        train(load(None, words("refused")))


def test_what_is_not_finite_on_one_rank_is_skipped_by_both(place, launch):
    steps = {line["step"]: line for line in lines(place / "broken") if line["kind"] == "train"}
    assert [step for step, line in steps.items() if line["skipped"]] == [3]
    # Of the rank that had it, and of no other.
    assert len(steps[3]["skipped_samples"]) == 2
    assert all(line["loss"] is not None for step, line in steps.items() if step != 3)


def test_evaluation_counts_each_sample_once_whatever_the_number_of_ranks(place, launch, words):
    launched.evaluate(words("evaluated by one", "train.batch_size=1"), SIZES)
    expected = lines(place / "evaluated by one")
    assert [line["sentences"] for line in expected] == list(SIZES) and expected[0]["area_ratio"] > 0.1
    assert lines(place / "evaluated by two") == expected


def test_a_rank_that_dies_ends_the_job(place, launch):
    assert launch.returncode != 0
    assert "SIGKILL" in launch.stderr or "-9" in launch.stderr, launch.stderr
    assert [line["step"] for line in lines(place / "dead")] == [1, 2, 3]


def test_another_number_of_ranks_is_refused(place, launch, words):
    with pytest.raises(ResumeError, match="world: 2 -> 1"):
        train(load(None, words("two", "train.batch_size=2")), resume=True)


# ---------------------------------------------------------------------------------- without a launcher to clean up


def start_both(tmp_path, function, *arguments, each=((), ())):
    rendezvous = f"file://{tmp_path / f'rendezvous-{time.monotonic_ns()}'}"
    return [tiny.start(function, rank, rendezvous, *arguments, *each[rank]) for rank in (0, 1)]


def ended(ranks, seconds=60):
    """Exit codes; both processes have to end by themselves."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory, place, words):
    job = words("straight", *KILLED), None, False
    assert ended(start_both(tmp_path_factory.mktemp("rendezvous"), tiny.train_as_rank, [job])) == [0, 0]
    return place / "straight"


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_killed_again_and_again_go_on_to_the_bit(tmp_path, words, unkilled, workers):
    """kill -9 of either rank at random moments; the other one ends with an error, and so do the workers of both."""
    draw, kills, run = random.Random(0), 0, tmp_path / "killed"
    while True:
        job = (words(run, *KILLED, f"train.workers={workers}"), None, checkpoint.newest(run)[0] is not None)
        moment, victim = draw.randrange(30, 200), draw.randrange(2)
        each = tuple((moment if victim == 0 else moment % 8,) if rank == victim else () for rank in (0, 1))
        ranks = start_both(tmp_path, tiny.train_as_rank, [job], each=each)
        codes = ended(ranks)
        assert None not in codes, "a rank hangs"
        assert not any(tiny.left_of(rank.pid) for rank in ranks)
        if codes == [0, 0]:
            break
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL)
        kills += 1
    assert kills >= 2
    assert_same_run(run, unkilled)


def stall(rank, rendezvous, words):
    tiny.join_ranks(rank, rendezvous, seconds=5)

    def step(self, batches, original=training._Trainer._step):
        if self.rank == 1 and self.state.progress.step == 2:
            time.sleep(600)
        original(self, batches)

    training._Trainer._step = step
    train(load(None, words))


def test_a_rank_that_hangs_ends_the_others(tmp_path, words):
    ranks = start_both(tmp_path, stall, words("stalled", "train.batch_size=2"))
    ranks[0].join(60)
    code = ranks[0].exitcode
    for rank in ranks:
        rank.kill()
    assert code == 1


def train_caris(rank, rendezvous, runs):
    """A narrow one. DDP must add up the gradients of all weights, or those of the two ranks move apart."""
    tiny.join_ranks(rank, rendezvous)
    training.build_model = functools.partial(training.build_model, backbone_options=tiny.NARROW_SWIN)

    def run(self, original=training._Trainer.run):
        original(self)
        gathered = self.accelerator.gather(torch.cat([p.detach().flatten() for p in self.learner.module.parameters()]))
        assert torch.equal(*gathered.chunk(2))

    training._Trainer.run = run
    for each in runs:
        train(load(None, each))
    torch.distributed.destroy_process_group()


def test_two_ranks_train_caris(tmp_path, words):
    runs = [words(tmp_path / strategy, *CARIS, f"alignment.strategy={strategy}") for strategy in STRATEGIES]
    assert ended(start_both(tmp_path, train_caris, runs), 120) == [0, 0]
    for strategy in STRATEGIES:
        steps = [line for line in lines(tmp_path / strategy) if line["kind"] == "train"]
        assert [(line["step"], line["skipped"]) for line in steps] == [(1, 0), (2, 0)]
