"""Every CUDA kernel under many schedules, and in the builds that look for accesses out of bounds and for data races."""

import sys
from pathlib import Path

import kernel_names
import pytest
import test_aml_loss
import test_masked_loss
import test_similarity
import torch
from helpers import coin, loss_inputs, normal, same_bits

from aml_kernels import aml_loss, filter_regions, sample_quantile

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, in_place_of_triton  # noqa: E402

pytestmark = pytest.mark.usefixtures("conditions")

#: Both kinds of seeds, see tests/emulation/scheduler.h. What the last two find hardly depends on the schedule.
SCHEDULES = {"plain": range(12), "stepped": range(1, 2), "bounds": range(1, 2), "races": range(1, 3)}


def quantile(backend, samples, length, dtype):
    values, valid = normal(1, samples, length, dtype=dtype), coin(2, samples, length, share=0.8)
    for mask in (None, valid):
        actual = sample_quantile(values, 0.3, valid=mask, backend=backend)
        assert same_bits(actual, sample_quantile(values, 0.3, valid=mask, backend="reference"))


def similarity(backend, size, dtype, layout="contiguous", **options):
    layouts = (layout, "cut", "sliced")
    test_similarity.check(backend, *test_similarity.features(size, dtype, layouts), **options)


def words_of_another_type(backend, visual_dtype, text_dtype):
    visual, text, mask = test_similarity.features(((2, 37, 5, 7), 11))
    test_similarity.check(backend, visual.to(visual_dtype), text.to(text_dtype), mask)


def rows_anywhere(backend, dtype):
    """Wherever rows of cells begin, the same bits. As many channels as it takes to use all memory again."""
    channels = 270 if dtype == torch.float32 else 530
    visual, text, mask = test_similarity.features(((1, channels, 7, 5), 6), dtype, ("contiguous",) * 3)
    results = [test_similarity.check(backend, x, text, mask) for _, x in test_similarity.elsewhere(visual)]
    for each in results[1:]:
        assert all(map(same_bits, each, results[0]))


def loss(backend, dtype, logits, target, map=(5, 7), samples=2, layouts=("cut", "sliced"), masks=True, **options):
    inputs = loss_inputs(batch=samples, logits=logits, target=target, map=map, dtype=dtype, layouts=layouts)
    test_masked_loss.check(backend, inputs, masks=masks, **{"quantile": 0.4, "protect_target": True, **options})


def fused(backend):
    """Every bit as by two operators. (Packed rows are read in another way than those of test_aml_loss.py.)"""
    inputs = loss_inputs(batch=2, logits=(24, 32), target=(24, 32), layouts=("contiguous",))
    inputs = {"logits": inputs["logits"], "target": inputs["target"], "text_mask": torch.arange(6).expand(2, 6) != 4,
              "visual": normal(7, 2, 37, 5, 7), "text": normal(8, 2, 6, 37)}
    *actual, stats = test_aml_loss.run(aml_loss, inputs, quantile=0.3, backend=backend)
    (*expected, _), similarity = test_aml_loss.in_steps(inputs, {"quantile": 0.3}, backend)
    for a, b in zip((*actual, stats.similarity), (*expected, similarity), strict=True):
        assert same_bits(a, b)


def regions(backend, dtype, **limit):
    image, similarity = (40 * normal(1, 2, 3, 20, 38).abs()).to(dtype), normal(2, 2, 3, 5)
    given, options = (image, similarity), {"block_size": 8, "drop_ratio": 0.5, "seed": 5, "fill": (1, 2, 3)}
    actual, expected = (
        filter_regions(*given, protect=coin(3, 2, 20, 38, share=0.005), **limit, **options, backend=name)
        for name in (backend, "reference")
    )
    assert expected[1].any() and same_bits(actual[0], expected[0]) and same_bits(actual[1], expected[1])


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "quantile of few": lambda b: quantile(b, 3, 1001, F16),
    "quantile, one block": lambda b: quantile(b, 3, 3001, F16),
    "quantile, team": lambda b: quantile(b, 1, 3 * 16384, BF16),
    "similarity along cells": lambda b: similarity(b, ((2, 37, 6, 12), 6), F32),
    "similarity along channels": lambda b: similarity(b, ((2, 40, 6, 11), 6), BF16, "transposed"),
    "similarity of rows that begin anywhere, fp32": lambda b: rows_anywhere(b, F32),
    "similarity of rows that begin anywhere, bf16": lambda b: rows_anywhere(b, BF16),
    "similarity of single features": lambda b: similarity(b, ((2, 37, 5, 7), 6), F16, "sliced", softmax=True, scale=5),
    "similarity of words of another type, bf16": lambda b: words_of_another_type(b, BF16, F32),
    "similarity of words of another type, fp16": lambda b: words_of_another_type(b, F16, BF16),
    "similarity of many words": lambda b: similarity(b, ((1, 70, 5, 16), 77), F32),
    "loss of packed rows, fp32": lambda b: loss(b, F32, (24, 32), (24, 32), layouts=("contiguous",), masks=False),
    "loss of packed rows, bf16": lambda b: loss(b, BF16, (24, 32), (24, 32), layouts=("contiguous",), masks=False),
    "loss of packed rows, some not valid": lambda b: loss(b, BF16, (24, 32), (24, 32), layouts=("contiguous",)),
    "loss of any strides": lambda b: loss(b, F16, (21, 33), (21, 33)),
    "loss of small logits": lambda b: loss(b, BF16, (9, 11), (34, 42)),
    "loss of small logits beside packed rows": lambda b: loss(b, BF16, (9, 11), (34, 44), layouts=("contiguous",)),
    "loss of large logits": lambda b: loss(b, F32, (40, 37), (17, 23), threshold=0.1, quantile=None),
    "loss by a long map": lambda b: loss(b, F32, (40, 72), (40, 72), map=(130, 131)),
    "loss of samples each": lambda b: loss(
        b, F32, (12, 16), (12, 16), samples=5, reduction="none", grad=torch.tensor([1, 0.5, -2, 3, 0.1]),
    ),
    "both in one": lambda b: test_aml_loss.test_against_the_textbook(b, "quarter", BF16),
    "both in one, of packed rows": fused,
    "region filter": lambda b: regions(b, F32, quantile=0.7),
    "region filter of bytes": lambda b: regions(b, torch.uint8, threshold=0.3),
}


@pytest.fixture(scope="module", params=SCHEDULES)
def run(request):
    mode = request.param
    if reason := builds.missing(mode):
        pytest.skip(reason)
    for other in SCHEDULES:
        if not builds.missing(other):
            builds.start(other)
    emulated = Emulated(mode)
    with in_place_of_triton(emulated) as name:
        yield emulated, name
    emulated.close()


@pytest.mark.parametrize("case", CASES)
def test_every_schedule(run, case):
    emulated, backend = run
    for seed in SCHEDULES[emulated.mode]:
        emulated.seed = seed
        CASES[case](backend)


def test_every_kernel_was_run(run):
    """By the cases above, in this build."""
    emulated, _ = run
    assert not kernel_names.of_cuda() - emulated.launched
