"""Parity with numbers that the released AMLRIS program computed, where the fixtures are at hand."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_accurate, here

from aml_kernels import filter_regions, masked_loss, pixel_text_similarity

GOLDEN = Path(__file__).parents[2] / "shared" / "fixtures" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no fixtures at ../shared/fixtures/golden")


def load(name):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = here({key: file.get_tensor(key) for key in file.keys()})
        return tensors, json.loads(file.metadata()["json"])["cases"]


def recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "golden_recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weighted_cross_entropy(backend):
    """Their mean is over the batch: per-sample means, weighted by the weights of each sample's pixels."""
    tensors, cases = load("loss")
    for name in cases:
        pred, target = tensors[f"{name}.pred"], tensors[f"{name}.target"]
        scores = pred.clone().requires_grad_()
        losses = masked_loss(
            scores[:, 1] - scores[:, 0], target, class_weight=(0.9, 1.1), dice_weight=0.0, reduction="none",
            backend=backend,
        )
        weights = (0.9 + 0.2 * target.double()).sum((1, 2))
        total = (losses * (weights / weights.sum()).float()).sum()
        total.backward()
        expected, gradient = tensors[f"{name}.total_loss"], tensors[f"{name}.grad"]
        torch.testing.assert_close(total.detach(), expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        error = (scores.grad - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), f"{name}: error of the gradient {error}"


def test_dice(backend):
    """Theirs sums over the whole batch, which is one tall sample here."""
    tensors, cases = load("loss")
    for name in cases:
        target = tensors[f"{name}.target"]
        size = (target.shape[0], 2, *target.shape[1:])
        stored = tensors.get(f"{name}.dice_pred")
        if stored is None:
            stored = here(torch.from_numpy(recipe().gauss(cases[name]["dice_pred_seed"], size, cases[name]["scale"])))
        pred = stored.clone().requires_grad_()
        loss = masked_loss(pred[:, 1].flatten(0, 1)[None], target.flatten(0, 1)[None], bce_weight=0.0, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors[f"{name}.dice_loss"], rtol=1e-6, atol=1e-6)
        if f"{name}.dice_grad" in tensors:
            expected = tensors[f"{name}.dice_grad"]
            assert (pred.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        else:
            expected = tensors[f"{name}.dice_grad_sum"]
            torch.testing.assert_close(pred.grad.double().sum((2, 3)), expected, rtol=1e-4, atol=1e-7)


def test_alignment(backend):
    """Softmax over the words of a plain dot product with projected text, then the maximum; padding included."""
    tensors, cases = load("alignment")
    draw = recipe()
    for name, case in cases.items():
        if case["stored_inputs"]:
            stored = "text_proj.weight", "text_proj.bias", "text_features", "visual_features"
            weight, bias, text, visual = (tensors[f"{name}.{key}"] for key in stored)
        else:
            seed, samples, width, text_width = case["seed"], case["B"], case["visual_dim"], case["text_dim"]
            arrays = (
                draw.gauss(seed, (width, text_width), text_width**-0.5), draw.gauss(seed + 1, (width,), 0.1),
                draw.gauss(seed + 4, (samples, case["L"], text_width), case["text_scale"]),
                draw.gauss(seed + 5, (samples, width, case["H"], case["W"]), case["visual_scale"]),
            )
            for array, key in zip((arrays[0], arrays[2], arrays[3]), ("w", "text", "vis"), strict=True):
                assert draw.sha(array) == case["sha"][key]
            weight, bias, text, visual = here([torch.from_numpy(array) for array in arrays])
        words = torch.nn.functional.linear(text, weight, bias)
        actual = pixel_text_similarity(visual, words, normalize=False, softmax=True, backend=backend)
        exact_words = torch.nn.functional.linear(text.double(), weight.double(), bias.double())
        scores = torch.einsum("bcn,blc->bnl", visual.flatten(2).double(), exact_words)
        exact = scores.softmax(-1).amax(-1)
        # The stored scores are in fp32: with dot products of 120, they are 5e-6 from the exact ones themselves.
        plain = tensors[f"{name}.relevance"]
        torch.testing.assert_close(plain.double(), exact, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        # What is rounded is a dot product; the softmax's slope passes on up to a quarter of that.
        ulps = 8 * max(1, round(scores.abs().max().item() / 4))
        assert_accurate(actual.flatten(1), exact, plain, name, ulps)


def test_weak_blocks(backend):
    """Blocks with a pixel below the threshold: with drop_ratio 1 all of them fall, and no others."""
    tensors, cases = load("afm")
    for name, case in cases.items():
        size = case["H"]
        similarity = tensors[f"{name}.relevance"].reshape(case["B"], size // 32, size // 32)
        _, dropped = filter_regions(
            torch.zeros(case["B"], 1, size, size), similarity, threshold=case["threshold"], drop_ratio=1.0, seed=0,
            backend=backend,
        )
        expected = tensors[f"{name}.low_pixels_per_patch"] > 0
        assert torch.equal(dropped.flatten(1), expected), f"{name}: {(dropped.flatten(1) != expected).sum()} blocks"
