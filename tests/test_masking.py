"""The masking contract of masked_loss: what is left out does not exist, and nothing else is touched."""

import pytest
import torch
from helpers import coin, kept_pixels, loss_inputs, normal, same_bits

from aml_kernels import masked_loss, reference

SIZES = {
    "same": ((24, 33), (24, 33)), "quarter": ((13, 9), (52, 36)), "larger": ((48, 40), (17, 23)),
    "wider": ((24, 9), (24, 33)), "words": ((13, 9), (52, 36)),  # four labels to a word, of packed rows
}
GARBAGE = (torch.nan, torch.inf, -torch.inf, 3e38)


def inputs_of(size, **options):
    logits, target = SIZES[size]
    layouts = {"layouts": ("contiguous",)} if size == "words" else {}
    return loss_inputs(logits=logits, target=target, **layouts, **options)


def run(backend, inputs, **options):
    """Losses of the samples and the gradient of their sum."""
    leaf = inputs["logits"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = masked_loss(**(inputs | {"logits": leaf}), **options, reduction="none", backend=backend)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def assert_same(a, b):
    assert same_bits(a[0], b[0]), f"loss {a[0]} != {b[0]}"
    assert same_bits(a[1], b[1]), f"{(a[1] != b[1]).sum()} gradients differ"


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_garbage_in_left_out_pixels_changes_nothing(backend, dtype, garbage):
    inputs, options = loss_inputs(dtype=dtype, kind="soft"), {"quantile": 0.4, "class_weight": (0.9, 1.1)}
    keep = kept_pixels(**inputs, **options)
    expected = run(backend, inputs, **options)
    dirty = inputs | {
        "logits": inputs["logits"].where(keep, torch.tensor(garbage, dtype=dtype)),
        "target": inputs["target"].where(keep, torch.tensor(garbage)),
    }
    actual = run(backend, dirty, **options)
    assert_same(actual, expected)
    assert keep.any() and (~keep).any() and not actual[1][~keep].any()


@pytest.mark.parametrize("size", ("quarter", "larger", "wider", "words"))
@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_garbage_in_cells_of_left_out_pixels_changes_nothing(backend, garbage, size):
    """Logits of another size: a cell that only left-out pixels take a share of. A share of zero is none."""
    logits, target = SIZES[size]
    inputs = inputs_of(size) | {"similarity": None, "map_valid": None}
    first, last = target[0] // 3, 2 * (target[0] - 1) // 3  # the rows that count; `last` may fall on a row of cells
    row = torch.arange(target[0])[:, None]
    valid = ((first <= row) & (row <= last)).expand_as(inputs["valid"])
    inputs["valid"] = valid.contiguous() if size == "words" else valid
    cells = slice(first * (logits[0] - 1) // (target[0] - 1), -(-last * (logits[0] - 1) // (target[0] - 1)) + 1)
    touched = torch.zeros(logits, dtype=torch.bool)
    touched[cells] = True
    expected = run(backend, inputs)
    actual = run(backend, inputs | {"logits": inputs["logits"].where(touched, torch.tensor(garbage))})
    assert_same(actual, expected)
    assert not touched.all() and not actual[1][:, ~touched].any() and actual[1][:, touched].any()


@pytest.mark.parametrize("size", ("same", "words"))
def test_ignore_label_of_uint8_targets(backend, size):
    """255 for "no label" is left out by `valid`, and is no target in the statistics either."""
    inputs = inputs_of(size)
    valid = inputs["valid"]
    expected = run(backend, inputs, quantile=0.3, protect_target=True)
    dirty = inputs | {"target": inputs["target"].where(valid, torch.tensor(255, dtype=torch.uint8))}
    assert_same(run(backend, dirty, quantile=0.3, protect_target=True), expected)
    statistics = [
        masked_loss(**case, quantile=0.3, protect_target=True, return_stats=True, backend=backend)[1]
        for case in (inputs, dirty)
    ]
    for name, clean, polluted in zip(statistics[0]._fields, *statistics, strict=True):
        assert same_bits(clean, polluted), name


@pytest.mark.parametrize("kind", ("uint8", "soft"))
@pytest.mark.parametrize("size", SIZES)
def test_ways_to_keep_everything(backend, size, kind):
    inputs = inputs_of(size, kind=kind) | {"valid": None, "map_valid": None}
    expected = run(backend, inputs)
    everything, cells = torch.ones_like(inputs["target"], dtype=torch.bool), torch.ones(3, 5, 7, dtype=torch.bool)
    for options in (
        {"quantile": 0.0}, {"threshold": -1e30}, {"quantile": 0.0, "protect_target": True}, {"protect_target": True},
    ):
        assert_same(run(backend, inputs, **options), expected)
        assert_same(run(backend, inputs | {"valid": everything, "map_valid": cells}, **options), expected)
    assert_same(run(backend, inputs | {"similarity": None}), expected)
    assert_same(run(backend, inputs | {"valid": everything.expand_as(everything)}), expected)


def test_quantile_zero_keeps_everything_of_any_map(backend):
    for seed, size in enumerate(((1, 1), (2, 3), (14, 14), (50, 60), (3, 90))):
        for step in (1, 16, 0):
            inputs = loss_inputs(seed=seed, map=size, map_dtype=torch.bfloat16) | {"valid": None, "map_valid": None}
            if step:
                inputs["similarity"] = (inputs["similarity"] * step).round() / step
            _, stats = masked_loss(**inputs, quantile=0.0, return_stats=True, backend=backend)
            assert stats.kept.tolist() == [24 * 33] * 3


@pytest.mark.parametrize("size", SIZES)
def test_keeping_nothing(backend, size):
    """Loss 0 and gradient 0, for that sample only."""
    inputs = inputs_of(size)
    inputs["logits"][1] = torch.nan
    none = torch.tensor([0.0, 1e30, 0.0])
    loss, gradient = run(backend, inputs, threshold=none)
    assert loss[1] == 0 and not gradient[1].any() and gradient[0].any() and gradient[2].any()
    _, stats = masked_loss(**inputs, threshold=none, return_stats=True, backend=backend)
    assert stats.kept[1] == stats.bce[1] == stats.dice[1] == 0

    inputs["valid"][1] = False  # the same because there is nothing
    loss, gradient = run(backend, inputs)
    assert loss[1] == 0 and not gradient[1].any() and loss[0] > 0
    assert masked_loss(**inputs, return_stats=True, backend=backend)[1].union[1] == 0

    inputs = inputs_of(size)
    inputs["valid"][:] = False
    for reduction in ("mean", "sum"):
        assert masked_loss(**inputs, quantile=0.2, reduction=reduction, backend=backend) == 0


def test_a_map_without_a_valid_cell_has_no_threshold(backend):
    """Nothing reaches NaN, so only protected target pixels stay."""
    inputs = loss_inputs()
    inputs["map_valid"][0] = False
    _, stats = masked_loss(**inputs, quantile=0.2, return_stats=True, backend=backend)
    assert stats.threshold.isnan().tolist() == [True, False, False] and stats.kept[0] == 0 and stats.kept[1] > 0
    _, stats = masked_loss(**inputs, quantile=0.2, protect_target=True, return_stats=True, backend=backend)
    assert stats.kept[0] == stats.kept_target[0] == (inputs["target"][0].bool() & inputs["valid"][0]).sum()


def test_map_cells_that_do_not_count_may_hold_anything(backend):
    """In the quantile. Pixels that are interpolated from NaN reach no threshold."""
    inputs = loss_inputs(map=(24, 33))
    inputs["valid"] &= inputs["map_valid"]
    expected = run(backend, inputs, quantile=0.3)
    dirty = inputs | {"similarity": inputs["similarity"].where(inputs["map_valid"], torch.tensor(torch.nan))}
    assert_same(run(backend, dirty, quantile=0.3), expected)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf, 3e38), ids=str)
@pytest.mark.parametrize("map_size", [(5, 7), (24, 33), (30, 50), (24, 20), (9, 33)], ids=str)
@pytest.mark.parametrize("size", ("same", "words"))
def test_maps_that_are_not_finite(backend, size, map_size, value):
    """The mask stays that of the definition, in which NaN, from inf - inf too, reaches no threshold."""
    inputs = inputs_of(size, map=map_size)
    inputs["similarity"][coin(8, 3, *map_size, share=0.1)] = value
    inputs["similarity"][coin(9, 3, *map_size, share=0.1)] = -value
    for options in ({"threshold": -0.5}, {"quantile": 0.3}):
        _, stats = masked_loss(**inputs, **options, return_stats=True, backend=backend)
        assert torch.equal(stats.kept, kept_pixels(**inputs, **options).sum((1, 2)))


@pytest.mark.parametrize("size", SIZES)
def test_logits_that_are_not_finite(backend, size):
    """Between two equal infinities a pixel is that; between unequal ones, and with a share of none, no number."""
    inputs = inputs_of(size)
    for seed, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        inputs["logits"][coin(seed, *inputs["logits"].shape, share=0.3)] = value
    _, stats = masked_loss(**inputs, return_stats=True, backend=backend)
    resized = reference.resize_bilinear(inputs["logits"].cpu(), tuple(inputs["target"].shape[1:]), align_corners=True)
    predicted, is_target, valid = (resized > 0).to(inputs["target"].device), inputs["target"] > 0, inputs["valid"]
    assert (resized == torch.inf).any() and (resized == -torch.inf).any() and resized.isnan().any()
    assert torch.equal(stats.intersection, (predicted & is_target & valid).sum((1, 2)))
    assert torch.equal(stats.union, ((predicted | is_target) & valid).sum((1, 2)))


@pytest.mark.parametrize("kind", ("bool", "uint8", "soft"))
def test_protected_targets(backend, kind):
    inputs = loss_inputs(kind=kind)
    is_target = (inputs["target"] > 0.5) & inputs["valid"]
    _, stats = masked_loss(**inputs, quantile=0.9, protect_target=True, return_stats=True, backend=backend)
    assert torch.equal(stats.kept_target, is_target.sum((1, 2))) and (stats.kept > stats.kept_target).all()
    _, open_to_all = masked_loss(**inputs, quantile=0.9, return_stats=True, backend=backend)
    assert (open_to_all.kept_target < stats.kept_target).all()
    _, gradient = run(backend, inputs, threshold=1e30, protect_target=True)
    assert torch.equal(gradient != 0, is_target)


def test_half_is_no_target(backend):
    inputs = loss_inputs(kind="soft") | {"valid": None}
    inputs["target"][:] = torch.tensor([0.5, 0.5000001, 1.0])[:, None, None]
    _, stats = masked_loss(**inputs, threshold=1e30, protect_target=True, return_stats=True, backend=backend)
    assert stats.kept.tolist() == [0, 24 * 33, 24 * 33]


@pytest.mark.parametrize("size", SIZES)
def test_permuting_the_batch_permutes_the_result(backend, size):
    inputs = inputs_of(size, batch=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    loss, gradient = run(backend, inputs, quantile=0.3)
    permuted = run(backend, {name: tensor[order] for name, tensor in inputs.items()}, quantile=0.3)
    torch.testing.assert_close(permuted, (loss[order], gradient[order]), rtol=1e-6, atol=1e-9)
    if backend != "reference":  # PyTorch's sums depend on strides
        assert_same(permuted, (loss[order], gradient[order]))
        alone = run(backend, {name: x[2:3] for name, x in inputs.items()}, quantile=0.3)
        assert_same(alone, (loss[2:3], gradient[2:3]))


@pytest.mark.parametrize("size", SIZES)
def test_inputs_are_not_written_to(backend, size):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of(size, dtype=dtype)
        inputs["threshold"] = torch.tensor([0.0, 0.1, 0.2])
        before = {name: (tensor.clone(), tensor._version) for name, tensor in inputs.items()}
        leaf = inputs["logits"].requires_grad_()
        masked_loss(**inputs, backend=backend).backward()
        assert leaf.grad.data_ptr() != leaf.data_ptr()
        for name, (values, version) in before.items():
            assert same_bits(inputs[name], values) and inputs[name]._version == version, name


def test_a_second_reader_of_the_logits_and_a_second_backward(backend):
    inputs = loss_inputs()
    leaf = inputs.pop("logits").detach().requires_grad_()
    loss = masked_loss(leaf, **inputs, quantile=0.3, backend=backend)
    alone, = torch.autograd.grad(loss, leaf, retain_graph=True)
    again, = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert same_bits(alone, again)
    weight = normal(9, *leaf.shape)
    both, = torch.autograd.grad(loss + (weight * leaf).sum(), leaf)
    torch.testing.assert_close(both, alone + weight, rtol=1e-6, atol=0)


def saved_by(function):
    """What autograd stores during `function`."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function()
    return saved


@pytest.mark.parametrize("size", ("same", "quarter"))
def test_nothing_of_the_size_of_the_target_is_saved(cpu, size):
    inputs = inputs_of(size)
    inputs["logits"].requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    saved = saved_by(lambda: masked_loss(**inputs, quantile=0.3, class_weight=(0.9, 1.1), backend=cpu))
    assert saved, "autograd saved nothing: the hook no longer sees this operator"
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert sum(tensor.numel() for tensor in new) <= 16 * len(inputs["logits"])


def test_target_may_be_changed_by_valid_only(backend):
    """Pixels outside `valid` count in no statistic, kept pixels in all."""
    inputs = loss_inputs()
    _, stats = masked_loss(**inputs, return_stats=True, backend=backend)
    assert torch.equal(stats.kept, inputs["valid"].sum((1, 2)))
    inputs["valid"] = coin(7, *inputs["valid"].shape, share=0.0)
    _, stats = masked_loss(**inputs, return_stats=True, backend=backend)
    assert not any(count.any() for count in (stats.kept, stats.kept_target, stats.intersection, stats.union))
