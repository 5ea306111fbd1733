"""The resizing that all back ends share: PyTorch's up to rounding, and exact where a comparison depends on it."""

import textbook
import torch
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st

from aml_kernels.reference import resize_bilinear

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(source=SIZES, size=SIZES, align_corners=st.booleans(), seed=st.integers(0, 99))
def test_agrees_with_interpolate(source, size, align_corners, seed):
    image = normal(seed, 2, *source, dtype=torch.float64)
    actual = resize_bilinear(image, size, align_corners=align_corners)
    torch.testing.assert_close(actual, textbook.resize(image, size, align_corners), rtol=0, atol=1e-12)


@given(source=SIZES, size=SIZES, align_corners=st.booleans(), seed=st.integers(0, 99), step=st.sampled_from((0, 8, 64)))
def test_never_leaves_the_range_below(source, size, align_corners, seed, step):
    image = normal(seed, 1, *source)
    image = (image * step).round() / step if step else image  # with ties and without
    assert resize_bilinear(image, size, align_corners=align_corners).min() >= image.min()


@given(source=SIZES, size=SIZES, align_corners=st.booleans(), seed=st.integers(0, 99), step=st.sampled_from((8, 64, 0)))
def test_gradient_does_not_depend_on_rounding(source, size, align_corners, seed, step):
    """Where neighbours are equal or nearly so, as 16-bit logits often are, the lower bound must not redirect it."""
    image = normal(seed, 1, *source)
    image = ((image * step).round() / step if step else image.bfloat16().float()).requires_grad_()
    grad = normal(seed + 1, 1, *size)
    actual, = torch.autograd.grad(resize_bilinear(image, size, align_corners=align_corners), image, grad)
    wide = image.detach().double().requires_grad_()
    expected, = torch.autograd.grad(textbook.resize(wide, size, align_corners), wide, grad.double())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * max(size) ** 2)


@given(source=SIZES, size=SIZES, align_corners=st.booleans(), level=st.sampled_from((0.0, 0.1, -7.3)))
def test_gradient_is_that_of_a_linear_function_everywhere(source, size, align_corners, level):
    """Of a constant image too, as the logits of a fresh model are."""
    image = torch.full((1, *source), level, dtype=torch.float64, requires_grad=True)
    grad = normal(0, 1, *size, dtype=torch.float64)
    actual, = torch.autograd.grad(resize_bilinear(image, size, align_corners=align_corners), image, grad)
    expected, = torch.autograd.grad(textbook.resize(image, size, align_corners), image, grad)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
