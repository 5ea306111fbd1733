"""What a strategy draws at random: anew for each batch of a step and for each rank."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

from aml import strategies
from aml.alignment import AlignmentLoss
from aml.config import load
from aml.learner import Learner
from aml.training import train

SETTINGS = ("alignment.warmup=0", "alignment.block_size=16", "train.accumulate=2", "train.steps=2")
pytestmark = pytest.mark.usefixtures("one_thread")


def number(step, batch, rank, accumulate, world):
    place = SimpleNamespace(num_processes=world, process_index=rank)
    return Learner._draw(SimpleNamespace(accumulate=accumulate, accumulated=batch, accelerator=place), step)


def test_batches_are_numbered_over_steps_and_ranks():
    numbers = [number(*each, accumulate=3, world=2) for each in product(range(4), range(3), range(2))]
    assert sorted(numbers) == list(range(24))
    assert [number(step, 0, 0, accumulate=1, world=1) for step in range(4)] == list(range(4))


def test_the_batches_of_a_step_leave_out_other_pixels(tmp_path, words, monkeypatch):
    drawn = []

    def watched(*arguments, original=strategies.noise):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(strategies, "noise", watched)
    train(load(None, words(tmp_path, "alignment.strategy=random")))
    assert len(drawn) == 4 and not any(torch.equal(a, b) for a, b in combinations(drawn, 2))


@pytest.mark.parametrize("strategy", ["image", "random_blocks"])
def test_the_batches_of_a_step_have_other_blocks_filled(tmp_path, words, monkeypatch, strategy):
    seeds = {"weak": [], "random": []}
    weak, random = strategies.BlockFilter.weak, strategies.BlockFilter.random

    def watched_weak(self, image, similarity, limit, seed, *others):
        seeds["weak"].append(seed)
        return weak(self, image, similarity, limit, seed, *others)

    def watched_random(self, image, count, seed, *others):
        seeds["random"].append(seed)
        return random(self, image, count, seed, *others)

    monkeypatch.setattr(strategies.BlockFilter, "weak", watched_weak)
    monkeypatch.setattr(strategies.BlockFilter, "random", watched_random)
    train(load(None, words(tmp_path, f"alignment.strategy={strategy}")))
    found = [*seeds["weak"], *seeds["random"]]
    assert len(set(found)) == len(found)  # with the same seed the control would fill many of the weak blocks
    assert len(seeds["weak"]) == 4 and len(seeds["random"]) == 4 * (strategy == "random_blocks")


def test_the_batches_of_a_step_have_other_permutations(tmp_path, words, monkeypatch):
    states = []

    def watched(self, count, generator):
        states.append(generator.initial_seed())
        return torch.randperm(count, generator=generator)

    monkeypatch.setattr(AlignmentLoss, "_permutation", watched)
    train(load(None, words(tmp_path, "alignment.strategy=released", "alignment.quantile=0.5")))
    assert len(set(states)) == 4


def test_a_draw_of_any_size_is_taken():
    target = torch.ones(1, 4, 4)
    assert not torch.equal(*(strategies.noise(target, 2**31 - 1, draw) for draw in (2**40, 2**40 + 1)))
