"""What is compared with a threshold rounds alike on every back end: thresholds, kept pixels, counts, dropped blocks."""

import pytest
import steps
import torch
from helpers import here, loss_inputs, normal, same_bits

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

ON_CPU = "reference" if _backend.missing("cpu", "cpu") else "cpu"
MAPS = ((1, 1), (7, 5), (14, 14), (30, 30), (97, 101), (120, 150))
QUANTILES = (0.0, 0.1, 0.25, 0.5, 1.0)


def on_cpu(tensors):
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}


@pytest.mark.parametrize("step", (0, 1, 8, 1000), ids=lambda step: f"steps of 1/{step}" if step else "smooth")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_thresholds_and_counts(backend, dtype, step):
    for seed, size in enumerate(MAPS):
        inputs = loss_inputs(seed=seed, logits=(97, 101), target=(97, 101), map=size, dtype=dtype, map_dtype=dtype)
        if step:
            inputs["similarity"].copy_((inputs["similarity"] * step).round() / step)
        for quantile in QUANTILES:
            options = {"quantile": quantile, "return_stats": True, "protect_target": seed % 2 == 1}
            _, actual = masked_loss(**inputs, **options, backend=backend)
            _, expected = masked_loss(**on_cpu(inputs), **options, backend=ON_CPU)
            for name in ("threshold", "kept", "kept_target", "intersection", "union"):
                a, b = getattr(actual, name).cpu(), getattr(expected, name)
                assert same_bits(a, b), f"{name}: {a.tolist()} != {b.tolist()}, map {size}, quantile {quantile}"


def test_thresholds_of_the_fused_loss(backend):
    """The map itself is a sum, rounded by each back end in its own order; what follows from a map is not."""
    for seed in range(8):
        x = steps.arguments(seed, size=(96, 128), map=(24, 32), dtype=torch.bfloat16)
        features = x["visual"], x["text"], x["text_mask"]
        _, stats = aml_loss(x["logits"], x["target"], *features, quantile=0.25, return_stats=True, backend=backend)
        assert same_bits(stats.similarity, pixel_text_similarity(*features, backend=backend))
        given = on_cpu({"logits": x["logits"], "target": x["target"], "similarity": stats.similarity})
        _, expected = masked_loss(**given, quantile=0.25, return_stats=True, backend=ON_CPU)
        for name in ("threshold", "kept", "kept_target", "intersection", "union"):
            assert same_bits(getattr(stats, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_quantiles(backend, interpolation):
    for length in (1, 2, 1000, 4096, 4097, 100_003, 1_000_000):
        values = normal(length, 3, length)
        for q in (0.0, 0.25, 1 / 3, 0.999, 1.0):
            actual = sample_quantile(values, q, interpolation=interpolation, backend=backend)
            expected = sample_quantile(values.cpu(), q, interpolation=interpolation, backend=ON_CPU)
            assert same_bits(actual.cpu(), expected), f"length {length}, q {q}"


def test_dropped_blocks(backend):
    for seed, size in enumerate(((70, 97), (480, 480), (31, 200))):
        image, similarity = here(torch.zeros(4, 1, *size, device="cpu")), normal(seed, 4, 15, 15)
        for block, options in ((8, {"quantile": 0.25}), (32, {"threshold": 0.25}), (16, {"quantile": 0.75})):
            options |= {"block_size": block, "drop_ratio": 0.4, "seed": seed, "fill": 1.0}
            actual = filter_regions(image, similarity, **options, backend=backend)
            expected = filter_regions(image.cpu(), similarity.cpu(), **options, backend=ON_CPU)
            for a, b in zip(actual, expected, strict=True):
                assert same_bits(a.cpu(), b)
