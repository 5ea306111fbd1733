"""masked_loss computes what it says: loss, gradient and statistics against a textbook in fp64."""

import pytest
import textbook
import torch
from helpers import (
    LAYOUTS,
    assert_accurate,
    assert_accurate_gradient,
    coin,
    here,
    kept_pixels,
    laid_out,
    loss_inputs,
    normal,
    same_bits,
)

from aml_kernels import _backend, masked_loss, reference, sample_quantile

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Of logits and target: what each pair exercises.
SIZES = {
    "same": ((24, 33), (24, 33)),
    "quarter": ((13, 9), (52, 36)),
    "odd": ((7, 9), (30, 41)),
    "larger": ((48, 40), (17, 23)),
    "larger and smaller": ((40, 9), (16, 33)),
    "one cell": ((1, 1), (5, 6)),
    "one pixel": ((4, 5), (1, 1)),
    "one row": ((1, 9), (1, 70)),
    "wide": ((3, 130), (12, 517)),  # more than one vector, and a rest
}
# The same, where a target of bytes lies packed: a GPU reads four labels at once.
WORDS = {
    "quarter": ((13, 9), (52, 36)), "larger": ((48, 40), (17, 24)), "rows alone": ((9, 24), (30, 24)),
    "one cell": ((1, 1), (5, 8)), "one row": ((1, 9), (1, 72)), "wide": ((3, 130), (12, 516)),
    "tall": ((30, 3), (133, 8)),
}
MAPS = {
    "coarse": (5, 7), "fine": (60, 71), "same": (52, 36), "one cell": (1, 1), "down and up": (80, 3),
    "long": (130, 131),  # on a GPU several blocks select from it
}

OPTIONS = {
    "all": {},
    "quantile": {"quantile": 0.3},
    "threshold": {"threshold": 0.1},
    "thresholds": {"threshold": torch.tensor([-0.5, 0.2, 9.0])},
    "protect": {"quantile": 0.7, "protect_target": True},
    "bce": {"quantile": 0.3, "dice_weight": 0.0},
    "dice": {"quantile": 0.3, "bce_weight": 0.0, "smooth": 1.0},
    "weights": {"quantile": 0.3, "bce_weight": 0.25, "dice_weight": -2.0},
    "class_weight": {"quantile": 0.3, "class_weight": (0.9, 1.1)},
    "one class": {"quantile": 0.3, "class_weight": (0.0, 1.5), "protect_target": True},
}


def check(backend, inputs, *, masks=True, reduction="mean", grad=None, what="", **options):
    """Loss, with its gradient if `grad` is not False, against the textbook in fp64 and in fp32."""
    logits, target, similarity = inputs["logits"], inputs["target"], inputs["similarity"]
    options = here(options)
    if masks:
        options |= {"valid": inputs["valid"], "map_valid": inputs["map_valid"]}
    keep = kept_pixels(logits, target, similarity, **options)
    factors = {k: v for k, v in options.items() if k in ("bce_weight", "dice_weight", "class_weight", "smooth")}

    def run(function, leaf):
        leaf = leaf.detach().requires_grad_(grad is not False)
        loss = function(leaf)
        if leaf.requires_grad:
            loss.backward(None if grad is None else grad.to(loss.dtype))
        else:
            assert not loss.requires_grad
        return loss.detach(), leaf.grad

    def by_textbook(leaf):
        per_sample = textbook.loss(leaf, target, keep, **factors)
        return {"mean": per_sample.mean(), "sum": per_sample.sum(), "none": per_sample}[reduction]

    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    exact, exact_grad = run(by_textbook, logits.double())
    plain, plain_grad = run(lambda leaf: by_textbook(leaf.to(working)), logits)
    actual, actual_grad = run(
        lambda leaf: masked_loss(leaf, target, similarity, **options, reduction=reduction, backend=backend), logits,
    )
    assert_accurate(actual, exact, plain, f"{what} loss")
    if grad is not False:
        assert actual_grad.dtype == logits.dtype
        assert_accurate_gradient(actual_grad, exact_grad, plain_grad, f"{what} gradient")
    return actual, actual_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_and_types(backend, sizes, dtype):
    logits, target = SIZES[sizes]
    inputs = loss_inputs(logits=logits, target=target, dtype=dtype)
    for grad in (None, torch.tensor(-2.5)):
        check(backend, inputs, quantile=0.3, class_weight=(0.9, 1.1), protect_target=True, grad=grad, what=sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", WORDS)
def test_labels_in_words(backend, sizes, dtype):
    logits, target = WORDS[sizes]
    for kind, map_size, masks in (("uint8", (5, 7), False), ("bool", target, True)):
        inputs = loss_inputs(
            logits=logits, target=target, dtype=dtype, kind=kind, map=map_size, layouts=("contiguous",),
        )
        check(backend, inputs, masks=masks, quantile=0.3, class_weight=(0.9, 1.1), protect_target=masks, what=sizes)


@pytest.mark.parametrize("size", ("same", "quarter", "larger"))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name, size):
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target)
    check(backend, inputs, **OPTIONS[name], what=name)
    check(backend, inputs, **OPTIONS[name], masks=False, what=name)


@pytest.mark.parametrize("kind", ("bool", "uint8", "soft", "soft bf16"))
@pytest.mark.parametrize("size", ("same", "quarter"))
def test_targets(backend, size, kind):
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target, kind=kind)
    check(backend, inputs, quantile=0.3, class_weight=(0.5, 2.0), protect_target=True, what=kind)


@pytest.mark.parametrize("map_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map_size", MAPS)
def test_maps(backend, map_size, map_dtype):
    inputs = loss_inputs(logits=(52, 36), target=(52, 36), map=MAPS[map_size], map_dtype=map_dtype)
    check(backend, inputs, quantile=0.4, what=map_size)
    check(backend, inputs, threshold=0.2, what=map_size)


@pytest.mark.parametrize("requires_grad", (True, False), ids=("grad", "no grad"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_reductions_and_incoming_gradients(backend, reduction, requires_grad):
    one = torch.tensor([1.0, -2.5, 0.0]) if reduction == "none" else torch.tensor(0.125)
    for grad in (one, torch.ones(()).expand_as(one), laid_out(one, "sliced")) if requires_grad else (False,):
        for size in ("same", "quarter"):
            logits, target = SIZES[size]
            inputs = loss_inputs(logits=logits, target=target, dtype=torch.bfloat16)
            _, gradient = check(backend, inputs, quantile=0.5, reduction=reduction, grad=grad)
            if grad is one and reduction == "none":
                assert not gradient[2].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ("same", "quarter", "larger"))
def test_layouts(backend, size, layout):
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target, kind="soft", layouts=(layout,))
    check(backend, inputs, quantile=0.3, threshold=None, what=layout)
    limits = laid_out(torch.tensor([0.1, -0.2, 0.3]), "sliced")
    check(backend, inputs, threshold=limits, what=layout)


def test_expanded_inputs(backend):
    one = loss_inputs(batch=1, seed=5)
    inputs = {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in one.items()}
    check(backend, inputs, quantile=0.3)
    losses = masked_loss(**inputs, quantile=0.3, reduction="none", backend=backend)
    assert same_bits(losses, losses[:1].expand(4).contiguous())
    flat = inputs | {"logits": torch.tensor(0.7).expand(4, 8, 11), "target": torch.tensor(True).expand(4, 24, 33)}
    check(backend, flat, quantile=0.3)


@pytest.mark.parametrize("size", ("same", "quarter"))
def test_one_channel_is_no_channel(backend, size):
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target)
    flat = inputs["logits"].detach().requires_grad_()
    wide = laid_out(flat.detach()[:, None], "transposed").requires_grad_()
    losses = [
        masked_loss(**(inputs | {"logits": leaf}), quantile=0.3, backend=backend) for leaf in (flat, wide)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert wide.grad.shape == wide.shape
    torch.testing.assert_close(wide.grad[:, 0], flat.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("value", (0.0, 1.5, -80.0, 80.0, 1e4), ids=str)
@pytest.mark.parametrize("size", ("same", "quarter", "larger"))
def test_constant_logits(backend, size, value):
    """A fresh head gives zeros everywhere; a sure one gives numbers whose exponential is not finite."""
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target)
    inputs["logits"] = torch.full_like(inputs["logits"], value)
    check(backend, inputs, quantile=0.3, what=str(value))


def test_a_long_row_of_zeros(backend):
    """Where logarithms are added as a logarithm of a product, that of 1500 factors 2 is none."""
    inputs = loss_inputs(batch=1, logits=(2, 1500), target=(2, 1500))
    inputs["logits"] = torch.zeros_like(inputs["logits"])
    check(backend, inputs, masks=False)


@pytest.mark.skipif(_backend.EXTENSION_MISSING is not None, reason=str(_backend.EXTENSION_MISSING))
@pytest.mark.parametrize("sure", (5, 10, 20, 30))
def test_labels_that_are_predicted(sure):
    """Late in a training every term is small beside 1. PyTorch's formula then subtracts numbers that are almost equal
    and loses up to all digits; the loops for labels do not."""
    target = coin(1, 2, 9, 70)
    logits = torch.where(target, sure, -sure) + normal(2, 2, 9, 70)
    leaf = logits.clone().requires_grad_()
    loss = masked_loss(leaf, target, dice_weight=0.0, class_weight=(0.5, 2.0), backend="cpu")
    loss.backward()
    wrong = torch.where(target, -logits, logits).double()  # the cross entropy is log(1 + exp(wrong))
    weight = torch.where(target, 2.0, 0.5).double()
    weight = weight / weight.sum((1, 2), keepdim=True) / len(target)
    torch.testing.assert_close(loss.double(), (weight * wrong.exp().log1p()).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        leaf.grad.double(), weight * wrong.sigmoid() * torch.where(target, -1, 1), rtol=1e-6, atol=0,
    )


def test_sure_logits(backend):
    inputs = loss_inputs(seed=3, kind="soft")
    inputs["logits"] *= 30
    check(backend, inputs, quantile=0.3)


def test_hardly_anything_is_predicted_where_nothing_is(backend):
    """Dice is small then, and 1 minus a ratio near 1 would lose its digits, as plain PyTorch does."""
    if backend == "reference":
        pytest.skip("is plain PyTorch")
    logits, smooth = normal(4, 2, 24, 32) - 30, 1e-5
    actual = masked_loss(logits, torch.zeros(2, 24, 32, dtype=torch.uint8), smooth=smooth, backend=backend)
    z = logits.double().flatten(1)
    p = z.sigmoid().sum(1)
    exact = (z.exp().log1p().mean(1) + p / (p + smooth)).mean()
    # exp(-30) by a GPU's unit for it has a relative error of 2e-6.
    torch.testing.assert_close(actual.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.large
def test_many_pixels(backend):
    """Sums of a million terms keep the accuracy of fp32, from 16-bit inputs as well."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = loss_inputs(batch=1, logits=(256, 256), target=(1024, 1000), map=(14, 14), dtype=dtype)
        inputs["logits"] = inputs["logits"] - 6  # the mean of much the same terms, and few targets
        check(backend, inputs, quantile=0.25)


def mask_of(inputs, backend, **options):
    """The kept pixels, read off the gradient: BCE has one everywhere it looks."""
    leaf = inputs["logits"].detach().requires_grad_()
    loss, stats = masked_loss(
        **(inputs | {"logits": leaf}), **options, dice_weight=0.0, return_stats=True, backend=backend,
    )
    loss.backward()
    return leaf.grad != 0, stats


@pytest.mark.parametrize("map_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("logits_dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("map_size", [(14, 14), (1, 5), (120, 150), (97, 101)], ids=str)
def test_masks_are_those_of_the_definition(backend, map_size, logits_dtype, map_dtype):
    """Bit for bit: smooth, quantised and constant maps, at quantiles where many pixels meet the threshold."""
    for seed, step in ((0, 0), (1, 8), (2, 1), (3, 1000)):
        inputs = loss_inputs(
            seed=seed, logits=(97, 101), target=(97, 101), map=map_size, dtype=logits_dtype, map_dtype=map_dtype,
        )
        similarity = inputs["similarity"]
        similarity.copy_((similarity * step).round() / step if step else similarity)
        for options in ({"quantile": 0.0}, {"quantile": 0.25}, {"quantile": 0.5, "protect_target": True}):
            mask, stats = mask_of(inputs, backend, **options)
            expected = kept_pixels(**inputs, **options)
            assert torch.equal(mask, expected), f"{(mask != expected).sum()} pixels differ: seed {seed}, {options}"
            assert torch.equal(stats.kept, expected.sum((1, 2)))


def test_masks_agree_with_interpolate_away_from_the_threshold(backend):
    inputs = loss_inputs(logits=(97, 101), target=(97, 101), map=(14, 14))
    mask, stats = mask_of(inputs, backend, quantile=0.3)
    distance = textbook.resize(inputs["similarity"].double(), (97, 101), align_corners=False)
    distance = distance - stats.threshold[:, None, None]
    sure = distance.abs() > 1e-5
    assert sure.float().mean() > 0.99
    assert torch.equal(mask[sure], (inputs["valid"] & (distance > 0))[sure])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_statistics(backend, size, dtype):
    logits, target = SIZES[size]
    inputs = loss_inputs(logits=logits, target=target, dtype=dtype, kind="soft")
    options = {"quantile": 0.4, "protect_target": True}
    loss, stats = masked_loss(
        **inputs, **options, bce_weight=0.5, dice_weight=2.0, reduction="none", return_stats=True, backend=backend,
    )
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(
        stats.threshold,
        sample_quantile(inputs["similarity"].to(working), 0.4, valid=inputs["map_valid"], backend=backend),
    )
    keep, is_target, valid = kept_pixels(**inputs, **options), inputs["target"] > 0.5, inputs["valid"]
    resize = textbook.on_cpu(reference.resize_bilinear)
    predicted = resize(inputs["logits"].to(working), target, align_corners=True) > 0
    expected = {
        "kept": keep, "kept_target": keep & is_target, "intersection": predicted & is_target & valid,
        "union": (predicted | is_target) & valid,
    }
    for name, pixels in expected.items():
        count = getattr(stats, name)
        assert count.dtype == torch.int64 and torch.equal(count, pixels.sum((1, 2))), name
    torch.testing.assert_close(loss, 0.5 * stats.bce + 2 * stats.dice, rtol=1e-6, atol=1e-7)
    for part, factors in {"bce": {"dice_weight": 0.0}, "dice": {"bce_weight": 0.0}}.items():
        exact = textbook.loss(inputs["logits"].double(), inputs["target"], keep, **factors)
        plain = textbook.loss(inputs["logits"].to(working), inputs["target"], keep, **factors)
        assert_accurate(getattr(stats, part), exact, plain, part)


@pytest.mark.parametrize("threshold", (0.25, torch.tensor([0.25, -1.0, 3.0])), ids=("one", "each"))
def test_statistics_without_gradient(backend, threshold):
    inputs = loss_inputs()
    inputs["logits"].requires_grad_()
    inputs["similarity"] = inputs["similarity"].detach().requires_grad_()
    if isinstance(threshold, torch.Tensor):
        threshold = here(threshold).double().requires_grad_()
    loss, stats = masked_loss(**inputs, threshold=threshold, return_stats=True, backend=backend)
    assert loss.requires_grad and not any(value.requires_grad for value in stats)
    assert torch.equal(stats.threshold, torch.as_tensor(threshold).detach().float().expand(3))
    loss.backward()
    assert inputs["similarity"].grad is None


def test_two_class_cross_entropy(backend):
    """Two channels folded to their difference: the weighted cross entropy of the RIS recipes, per sample."""
    scores, target = normal(0, 2, 2, 20, 31), coin(1, 2, 20, 31)
    cross_entropy = textbook.on_cpu(torch.nn.functional.cross_entropy)  # deterministic on the CPU alone
    expected = [
        cross_entropy(z[None].double(), y[None].long(), torch.tensor([0.9, 1.1]).double())
        for z, y in zip(scores, target, strict=True)
    ]
    folded = scores[:, 1] - scores[:, 0]
    actual = masked_loss(
        folded, target, class_weight=(0.9, 1.1), dice_weight=0.0, reduction="none", backend=backend,
    )
    torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=1e-6, atol=0)


def test_a_map_for_every_sample_of_its_own(backend):
    """Thresholds are per sample: scaling one sample's map does not change what is kept of any."""
    inputs = loss_inputs(map=(24, 33))
    loss = masked_loss(**inputs, quantile=0.3, backend=backend)
    scaled = inputs["similarity"] * torch.tensor([1.0, 1024.0, 2**-10])[:, None, None]
    assert same_bits(loss, masked_loss(**(inputs | {"similarity": scaled}), quantile=0.3, backend=backend))
