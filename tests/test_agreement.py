"""Given the same map, all back ends agree bit for bit on thresholds, kept pixels, counts and dropped blocks.

Triton's run in its interpreter, CUDA's under emulation.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from helpers import kept_pixels, loss_inputs, normal, same_bits

from aml_kernels import filter_regions, masked_loss, sample_quantile

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

import builds  # noqa: E402
from emulated import Emulated, in_place_of_triton  # noqa: E402


@pytest.fixture(scope="module", params=("cpu", "triton", "cuda"))
def other(request, conditions):
    """What to compare with `reference`: a context in which a back end runs by the name that it gives."""
    if request.param == "triton":
        yield lambda: contextlib.nullcontext(request.getfixturevalue("interpreted"))
    elif request.param == "cpu":
        yield lambda: contextlib.nullcontext(request.getfixturevalue("cpu"))
    elif reason := builds.missing("plain"):
        pytest.skip(reason)
    else:
        emulated = Emulated("plain")
        yield lambda: in_place_of_triton(emulated)
        emulated.close()


#: Logits of 24 x 33, resized or not; steps of the map: 0 is smooth, few make for many pixels on the threshold.
CASES = (((24, 33), 0), ((13, 9), 8), ((48, 40), 1), ((7, 50), 1000))
LIMITS = ({"quantile": 0.25}, {"quantile": 0.5, "protect_target": True}, {"threshold": 0.125})


def stepped(similarity, step):
    return (similarity * step).round() / step if step else similarity


def loss_with_mask(backend, inputs, options):
    """Statistics, and the pixels with a gradient."""
    leaf = inputs["logits"].detach().requires_grad_()
    loss, stats = masked_loss(
        **(inputs | {"logits": leaf}), **options, dice_weight=0.0, return_stats=True, backend=backend,
    )
    loss.backward()
    return stats, leaf.grad != 0


@pytest.mark.parametrize(("logits", "step"), CASES, ids=str)
@pytest.mark.parametrize("map_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_thresholds_kept_pixels_and_counts(other, logits, step, map_dtype):
    inputs = loss_inputs(seed=step, logits=logits, map=(6, 13), kind="soft", map_dtype=map_dtype)
    inputs["similarity"] = stepped(inputs["similarity"], step)
    for options in LIMITS:
        stats, mask = loss_with_mask("reference", inputs, options)
        with other() as name:
            other_stats, other_mask = loss_with_mask(name, inputs, options)
        for field in ("threshold", "kept", "kept_target", "intersection", "union"):  # zeros may have either sign
            assert torch.equal(getattr(stats, field), getattr(other_stats, field)), (options, field)
        assert torch.equal(mask, other_mask)
        if logits == (24, 33):
            assert torch.equal(mask, kept_pixels(**inputs, **options))


@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_quantiles(other, interpolation):
    for length in (1, 2, 300, 9001):
        values = normal(length, 3, length)
        for q in (0.0, 1 / 3, 0.999):
            expected = sample_quantile(values, q, interpolation=interpolation, backend="reference")
            with other() as name:
                actual = sample_quantile(values, q, interpolation=interpolation, backend=name)
            assert same_bits(actual, expected), f"length {length}, q {q}"


@pytest.mark.parametrize("step", (0, 4))
def test_dropped_blocks(other, step):
    image, similarity = normal(step, 3, 2, 40, 61), stepped(normal(2, 3, 6, 13), step)
    for options in ({"quantile": 0.5, "seed": 0}, {"threshold": 0.25, "seed": 2**63 + 5}):
        options |= {"drop_ratio": 0.4, "block_size": 7}
        expected = filter_regions(image, similarity, **options, backend="reference")
        with other() as name:
            filtered, dropped = filter_regions(image, similarity, **options, backend=name)
        assert same_bits(filtered, expected[0]) and torch.equal(dropped, expected[1]) and dropped.any()
