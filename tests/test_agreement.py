"""What is compared with a threshold rounds alike on every back end: thresholds, kept pixels, counts, dropped blocks.

Each back end against the definition, on the same numbers: the C++ one, Triton's kernels in its interpreter, the CUDA
kernels' source under emulation; and both of the latter on a GPU, where there is one.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, LAYOUTS, coin, here, kept_pixels, laid_out, loss_inputs, missing, normal, same_bits

from aml_kernels import aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

sys.path.insert(0, str(Path(__file__).with_name("emulation")))

from emulated import as_back_end  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = ("threshold", "kept", "kept_target", "intersection", "union")


@pytest.fixture(scope="module", params=("cpu", "triton", "cuda", "emulated"))
def backend(request, conditions):
    if request.param != "emulated":
        if reason := missing(request.param):
            pytest.skip(reason)
        if request.param == "triton" and INTERPRETED:
            request.getfixturevalue("interpreted")
        yield request.param
        return
    with as_back_end("plain") as name:
        yield name


@pytest.fixture(autouse=True)
def small(request):
    if request.node.callspec.params["backend"] == "emulated" and request.node.get_closest_marker("large"):
        pytest.skip("takes too long under emulation")


def on_cpu(tensors):
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}


def rounded(tensor, step):
    """To steps of 1 / step, in place: ties, and pixels on the threshold. As it is where step is 0."""
    return tensor.copy_((tensor * step).round() / step) if step else tensor


def check_loss(backend, inputs, step, **options):
    """Statistics, and the pixels that have a gradient, against the definition."""
    rounded(inputs["similarity"], step)
    leaf = inputs["logits"].detach().requires_grad_()
    loss, actual = masked_loss(
        **(inputs | {"logits": leaf}), **options, dice_weight=0.0, return_stats=True, backend=backend,
    )
    loss.backward(torch.tensor(1e4))  # so large that none is rounded to 0
    _, expected = masked_loss(**on_cpu(inputs), **options, return_stats=True, backend="reference")
    what = f"map {list(inputs['similarity'].shape)}, {options}"
    for name in COUNTS:
        a, b = getattr(actual, name).cpu() + 0, getattr(expected, name) + 0  # no -0.0, see check_quantiles
        assert same_bits(a, b), f"{name}: {a.tolist()} != {b.tolist()}, {what}"
    assert torch.equal(leaf.grad != 0, kept_pixels(**inputs, **options)), f"kept pixels, {what}"


@pytest.mark.parametrize("step", (0, 2), ids=lambda step: f"steps of 1/{step}" if step else "smooth")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ("packed", "strided"))
def test_thresholds_kept_pixels_and_counts(backend, rows, dtype, step):
    size, layouts = ((24, 32), ("contiguous",)) if rows == "packed" else ((29, 41), LAYOUTS[1:])
    for seed, cells in enumerate(((1, 1), (7, 5), (14, 14), size, (45, 38))):
        map_dtype = dtype if rows == "strided" else torch.float32
        inputs = loss_inputs(
            seed=seed, batch=2, logits=size, target=size, map=cells, dtype=dtype, map_dtype=map_dtype, layouts=layouts,
        )
        if rows == "packed":
            del inputs["valid"], inputs["map_valid"]
        check_loss(backend, inputs, step, quantile=(0.0, 0.25, 0.5, 0.9, 1.0)[seed], protect_target=seed % 2 == 1)


@pytest.mark.large
@pytest.mark.parametrize("step", (0, 1, 1000), ids=lambda step: f"steps of 1/{step}" if step else "smooth")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_maps(backend, dtype, step):
    for seed, cells in enumerate(((30, 30), (97, 101), (120, 150))):
        for quantile in (0.0, 0.1, 0.25, 0.5, 1.0):
            inputs = loss_inputs(seed=seed, logits=(97, 101), target=(97, 101), map=cells, dtype=dtype, map_dtype=dtype)
            check_loss(backend, inputs, step, quantile=quantile, protect_target=seed % 2 == 1)


@pytest.mark.parametrize("logits", ((24, 32), (9, 11)), ids=("packed", "resized"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_of_the_fused_loss(backend, dtype, logits):
    """The map itself is a sum, rounded by each back end in its own order; what follows from a map is not."""
    mask = coin(4, 2, 6, share=0.7)
    mask[:, 1] = True
    for seed, cells in enumerate(((3, 5), (8, 8))):
        features = normal(seed, 2, 24, *cells, dtype=dtype), normal(seed + 1, 2, 6, 24, dtype=dtype), mask
        inputs = {"logits": normal(seed + 2, 2, *logits, dtype=dtype), "target": coin(seed + 3, 2, 24, 32)}
        _, stats = aml_loss(**inputs, visual=features[0], text=features[1], text_mask=mask, quantile=0.25,
                            return_stats=True, backend=backend)
        assert same_bits(stats.similarity, pixel_text_similarity(*features, backend=backend))
        given = on_cpu(inputs | {"similarity": stats.similarity})
        _, expected = masked_loss(**given, quantile=0.25, return_stats=True, backend="reference")
        for name in COUNTS:
            assert same_bits(getattr(stats, name).cpu(), getattr(expected, name)), name


def check_quantiles(backend, length, interpolation):
    for dtype, step in ((torch.float32, 4), (torch.bfloat16, 0)):
        values = laid_out(rounded(normal(length, 3, length, dtype=dtype), step), "sliced" if step else "contiguous")
        for q in (0.0, 1 / 3, 0.999):
            options = {"q": q, "interpolation": interpolation}
            actual = sample_quantile(values, **options, backend=backend)
            expected = sample_quantile(values.cpu(), **options, backend="reference")
            # PyTorch leaves open which of -0.0 and 0.0 is the smaller one.
            assert same_bits(actual.cpu() + 0, expected + 0), f"length {length}, {dtype}, steps {step}, q {q}"


@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_quantiles(backend, interpolation):
    for length in (2, 49, 1001):
        check_quantiles(backend, length, interpolation)


@pytest.mark.large
@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_long_quantiles(backend, interpolation):
    for length in (4097, 100_003, 1_000_000):
        check_quantiles(backend, length, interpolation)


@pytest.mark.parametrize("size", ((70, 97), (31, 200), pytest.param((480, 480), marks=pytest.mark.large)), ids=str)
@pytest.mark.parametrize("seed", (0, 2**40 + 3))
def test_dropped_blocks(backend, seed, size):
    """The same random numbers from the same seed, and the same blocks that are weak enough to be drawn."""
    image, similarity = here(torch.zeros(3, 1, *size, device="cpu")), normal(seed % 7, 3, 15, 15)
    for block, step, options in ((8, 0, {"quantile": 0.25}), (32, 4, {"threshold": 0.25}), (16, 4, {"quantile": 0.75})):
        options |= {"block_size": block, "drop_ratio": 0.4, "seed": seed, "fill": 1.0}
        given = image, rounded(similarity.clone(), step)
        actual = filter_regions(*given, **options, backend=backend)
        expected = filter_regions(*(x.cpu() for x in given), **options, backend="reference")
        for a, b in zip(actual, expected, strict=True):
            assert same_bits(a.cpu(), b), f"blocks of {block}, {options}"
