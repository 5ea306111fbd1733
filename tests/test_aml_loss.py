"""aml_loss is pixel_text_similarity and masked_loss in one: same numbers, gradient in the logits alone."""

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

from aml_kernels import aml_loss, masked_loss, pixel_text_similarity

SIZES = {"same": ((24, 33), (24, 33)), "quarter": ((13, 9), (52, 36)), "larger": ((48, 40), (17, 23))}


def inputs_of(size="quarter", dtype=torch.float32, layouts=("cut", "sliced", "transposed"), batch=3, width=37):
    logits, target = SIZES[size]
    loss = loss_inputs(batch=batch, logits=logits, target=target, dtype=dtype, layouts=layouts)
    del loss["similarity"]
    mask = coin(12, batch, 6, share=0.7)
    mask[:, 2] = True
    features = normal(10, batch, width, 5, 7, dtype=dtype), normal(11, batch, 6, width, dtype=dtype), mask
    names = ("visual", "text", "text_mask")
    return loss | {name: laid_out(x, layout) for name, x, layout in zip(names, features, layouts * 3, strict=False)}


def run(function, inputs, grad=None, **options):
    leaf = inputs["logits"].detach().requires_grad_()
    loss, stats = function(**(inputs | {"logits": leaf}), **options, return_stats=True)
    loss.backward(grad)
    return loss.detach(), leaf.grad, stats


def in_steps(inputs, options, backend, **features):
    """The same by the two operators."""
    inputs = dict(inputs)
    words = [inputs.pop(name) for name in ("visual", "text", "text_mask")]
    similarity = pixel_text_similarity(*words, **features, backend=backend)
    return run(masked_loss, inputs | {"similarity": similarity}, **options, backend=backend), similarity


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    ({}, {"quantile": 0.3}, {"threshold": 0.1}, {"threshold": torch.tensor([0.0, 0.1, 9.0])},
     {"quantile": 0.6, "protect_target": True, "class_weight": (0.9, 1.1), "bce_weight": 2.0, "dice_weight": 0.5,
      "smooth": 1.0, "reduction": "sum"}),
    ids=("all", "quantile", "threshold", "thresholds", "everything"),
)
def test_is_the_operators_one_after_the_other(backend, options, size, dtype):
    inputs, options = inputs_of(size, dtype), here(options)
    for features in ({}, {"softmax": True, "scale": 5.0}, {"normalize": False}):
        loss, gradient, stats = run(aml_loss, inputs, **options, **features, backend=backend)
        expected, similarity = in_steps(inputs, options, backend, **features)
        assert same_bits(stats.similarity, similarity)
        assert same_bits(loss, expected[0]) and same_bits(gradient, expected[1])
        for name in expected[2]._fields:
            assert same_bits(getattr(stats, name), getattr(expected[2], name)), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_the_textbook(backend, size, dtype):
    inputs = inputs_of(size, dtype)
    loss, gradient, stats = run(aml_loss, inputs, quantile=0.4, reduction="none", grad=torch.tensor([1.0, 0.5, -2.0]),
                                backend=backend)
    exact_map = textbook.similarity(*(inputs[x].double() for x in ("visual", "text")), inputs["text_mask"])
    plain_map = textbook.similarity(*(inputs[x].float() for x in ("visual", "text")), inputs["text_mask"])
    assert_accurate(stats.similarity, exact_map, plain_map, "similarity")
    keep = kept_pixels(inputs["logits"], inputs["target"], stats.similarity, quantile=0.4, valid=inputs["valid"],
                       map_valid=inputs["map_valid"])
    assert torch.equal(stats.kept, keep.sum((1, 2)))
    results = []
    for logits in (inputs["logits"].double(), inputs["logits"]):
        leaf = logits.detach().requires_grad_()
        wide = leaf if leaf.dtype == torch.float64 else leaf.float()
        expected = textbook.loss(wide, inputs["target"], keep)
        expected.backward(torch.tensor([1.0, 0.5, -2.0], dtype=expected.dtype))
        results.append((expected.detach(), leaf.grad))
    assert_accurate(loss, results[0][0], results[1][0], "loss")
    assert_accurate_gradient(gradient, results[0][1], results[1][1], "gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    plain = run(aml_loss, inputs_of(layouts=("contiguous",)), quantile=0.3, backend=backend)
    other = run(aml_loss, inputs_of(layouts=(layout,)), quantile=0.3, backend=backend)
    torch.testing.assert_close(other[:2], plain[:2], rtol=1e-5, atol=1e-9)
    assert torch.equal(other[2].kept, plain[2].kept)


def test_no_gradient_reaches_the_features(backend):
    inputs = inputs_of()
    visual, text = inputs["visual"].requires_grad_(), inputs["text"].requires_grad_()
    assert not aml_loss(**inputs, quantile=0.3, backend=backend).requires_grad
    loss, gradient, stats = run(aml_loss, inputs, quantile=0.3, backend=backend)
    assert gradient.any() and visual.grad is None and text.grad is None
    assert not any(value.requires_grad for value in stats)


@pytest.mark.fp64
def test_mixed_types(backend):
    inputs = inputs_of()
    for logits, features in (
        (torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.float64, torch.float32),
    ):
        mixed = inputs | {"logits": inputs["logits"].to(logits)}
        mixed |= {name: inputs[name].to(features) for name in ("visual", "text")}
        loss, gradient, stats = run(aml_loss, mixed, quantile=0.3, backend=backend)
        expected, similarity = in_steps(mixed, {"quantile": 0.3}, backend)
        assert same_bits(loss, expected[0]) and same_bits(gradient, expected[1])
        assert same_bits(stats.similarity, similarity) and gradient.dtype == logits


def test_what_is_left_out_may_hold_anything(backend):
    inputs = inputs_of("same")
    clean = run(aml_loss, inputs, quantile=0.5, backend=backend)
    keep = kept_pixels(inputs["logits"], inputs["target"], clean[2].similarity, quantile=0.5, valid=inputs["valid"],
                       map_valid=inputs["map_valid"])
    dirty = inputs | {"logits": inputs["logits"].where(keep, torch.tensor(torch.nan))}
    loss, gradient, _ = run(aml_loss, dirty, quantile=0.5, backend=backend)
    assert same_bits(loss, clean[0]) and same_bits(gradient, clean[1]) and not gradient[~keep].any()


def test_keeping_nothing(backend):
    loss, gradient, stats = run(aml_loss, inputs_of(), threshold=1e30, backend=backend)
    assert loss == 0 and not gradient.any() and not stats.kept.any()


def test_permuting_the_batch_permutes_the_result(cpu):
    inputs, order = inputs_of(batch=4, layouts=("contiguous",)), torch.tensor([2, 0, 3, 1])
    results = [
        run(aml_loss, case, quantile=0.3, reduction="none", grad=torch.ones(4), backend=cpu)
        for case in (inputs, {name: tensor[order] for name, tensor in inputs.items()})
    ]
    for before, after in zip((*results[0][:2], *results[0][2]), (*results[1][:2], *results[1][2]), strict=True):
        assert same_bits(before[order], after)


def test_inputs_are_not_written_to(backend):
    inputs = inputs_of(dtype=torch.bfloat16)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in inputs.items()}
    run(aml_loss, inputs, quantile=0.3, backend=backend)
    for name, (values, version) in before.items():
        assert same_bits(inputs[name], values) and inputs[name]._version == version, name


def test_neither_features_nor_maps_of_the_target_size_are_saved(cpu):
    inputs = inputs_of("same")
    inputs["logits"].requires_grad_()
    own = {inputs[name].untyped_storage().data_ptr() for name in ("logits", "target", "valid")}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        aml_loss(**inputs, quantile=0.3, backend=cpu)
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert saved and sum(tensor.numel() for tensor in new) <= 3 * 5 * 7 + 16 * 3  # similarity map, sums
