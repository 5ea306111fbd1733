"""pixel_text_similarity: values and gradients against a textbook in fp64."""

import pytest
import textbook
import torch
from helpers import (
    LAYOUTS,
    assert_accurate,
    assert_accurate_gradient,
    coin,
    laid_out,
    normal,
    same_bits,
)

from aml_kernels import pixel_text_similarity

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {
    "cosine": {},
    "scaled": {"scale": 14.3},
    "negative": {"scale": -2.0},
    "dot": {"normalize": False, "scale": 0.1},
    "softmax": {"softmax": True, "scale": 10.0},
    "softmax of dots": {"softmax": True, "normalize": False, "scale": 0.05},
}
# [B, C, h, w] or [B, N, C], and words: vector widths and rests, one of everything, shapes as trained with.
SIZES = {
    "maps": ((2, 37, 5, 7), 6),
    "tokens": ((2, 19, 24), 5),
    "one word": ((3, 8, 4, 4), 1),
    "two channels": ((2, 2, 6, 5), 3),
    "one cell": ((2, 33, 1, 1), 4),
    "one token": ((2, 1, 40), 4),
    "wide": ((2, 512, 14, 14), 20),
    "many words": ((1, 16, 9, 33), 77),
}


def features(
    size=((2, 37, 5, 7), 6), dtype=torch.float32, layouts=("transposed", "cut", "sliced"), masked=True, seed=0,
):
    shape, words = size
    width = shape[1] if len(shape) == 4 else shape[2]
    mask = coin(seed + 2, shape[0], words, share=0.7)
    mask[:, words // 2] = True
    tensors = normal(seed, *shape, dtype=dtype), normal(seed + 1, shape[0], words, width, dtype=dtype), mask
    visual, text, mask = (laid_out(x, layout) for x, layout in zip(tensors, layouts, strict=True))
    return visual, text, mask if masked else None


def check(backend, visual, text, mask, *, wanted=(True, True), grad=None, what="", **options):
    def run(function, *tensors):
        leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
        result = function(*leaves, mask, **options)
        if any(wanted):
            incoming = normal(9, *result.shape) if grad is None else grad
            result.backward(incoming.to(result.dtype))
        return result.detach(), *(leaf.grad for leaf in leaves)

    working = torch.float64 if visual.dtype == torch.float64 else torch.float32
    given = visual, text
    exact = run(textbook.similarity, visual.double(), text.double())
    plain = run(lambda v, t, *rest, **named: textbook.similarity(v.to(working), t.to(working), *rest, **named), *given)
    actual = run(lambda *x, **named: pixel_text_similarity(*x, **named, backend=backend), *given)
    assert_accurate(actual[0], exact[0], plain[0], f"{what} similarity")
    for i, name in enumerate(("visual", "text")):
        if wanted[i]:
            assert actual[1 + i].dtype == given[i].dtype
            assert_accurate_gradient(actual[1 + i], exact[1 + i], plain[1 + i], f"{what} gradient of {name}")
        else:
            assert actual[1 + i] is None
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_sizes_types(backend, name, size, dtype):
    check(backend, *features(SIZES[size], dtype), what=name, **OPTIONS[name])


def test_one_channel(backend):
    """A direction is a sign then; products of numbers are all that is left to compare."""
    check(backend, *features(((2, 1, 6, 5), 3)), normalize=False)
    visual, text, mask = features(((2, 1, 6, 5), 3))
    cosine = pixel_text_similarity(visual, text, mask, backend=backend)
    torch.testing.assert_close(cosine, textbook.similarity(visual, text, mask), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ("maps", "tokens"))
def test_layouts(backend, size, layout):
    for masked in (True, False):
        for softmax in (True, False):
            check(backend, *features(SIZES[size], layouts=(layout,) * 3, masked=masked), softmax=softmax, what=layout)


def elsewhere(visual):
    """The same features where rows of cells begin at other addresses, by name."""
    samples, channels, *grid = visual.shape
    garbage = torch.full((samples + 1, channels + 2, *grid), torch.nan, dtype=visual.dtype)
    behind_a_sample, between_channels = garbage[:, :channels].contiguous()[1:], garbage[1:, 1:-1]
    behind_a_number = torch.full((visual.numel() + 1,), torch.nan, dtype=visual.dtype)[1:].view_as(visual)
    for name, memory in (
        ("as they come", torch.empty_like(visual)), ("behind a sample", behind_a_sample),
        ("between channels", between_channels), ("behind a number", behind_a_number),
        ("channels last", torch.empty_like(visual, memory_format=torch.channels_last)),
    ):
        yield name, memory.copy_(visual)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("grid", ((14, 14), (15, 15), (7, 7), (8, 8)), ids=str)
def test_rows_that_begin_anywhere(backend, grid, dtype):
    """A channel's cells are no multiple of 16 bytes (but for 8 x 8), nor is a sample of an odd number of channels."""
    visual, text, mask = features(((2, 67, *grid), 5), dtype, ("contiguous",) * 3)
    for name, same in elsewhere(visual):
        check(backend, same, text, mask, what=name)


def test_expanded(backend):
    visual, text, mask = features()
    check(backend, visual[:1].expand(3, -1, -1, -1), text[:1].expand(3, -1, -1), mask[:1].expand(3, -1))
    check(backend, visual[:, :1].expand(-1, 37, -1, -1), text, mask)
    grad = torch.tensor(0.5).expand(2, 5, 7)
    check(backend, visual, text, mask, grad=grad)
    check(backend, visual, text, mask, grad=laid_out(normal(3, 2, 5, 7), "transposed"))


@pytest.mark.parametrize("wanted", ((True, False), (False, True), (False, False)), ids=("visual", "text", "none"))
def test_gradient_for_one_only(backend, wanted):
    for softmax in (False, True):
        check(backend, *features(), wanted=wanted, softmax=softmax)


@pytest.mark.parametrize(
    ("visual_dtype", "text_dtype"),
    [(a, b) for a in DTYPES[:3] for b in DTYPES[:3] if a != b], ids=str,
)
def test_mixed_types(backend, visual_dtype, text_dtype):
    for size, options in ((SIZES["maps"], {}), (((1, 1024, 6, 8), 20), {"normalize": False, "scale": 0.05})):
        visual, text, mask = features(size)
        check(backend, visual.to(visual_dtype), text.to(text_dtype), mask, **options)


def test_long_half_precision_vectors(backend):
    """Squares and dot products beyond the range of fp16."""
    visual, text, mask = features(((1, 1024, 4, 4), 3), torch.float16)
    check(backend, visual * 100, text * 100, mask)
    check(backend, visual * 1e-4, text * 1e-4, mask)


@pytest.mark.parametrize("softmax", (False, True), ids=("scores", "softmax"))
@pytest.mark.parametrize("garbage", (torch.nan, torch.inf, 1e30), ids=str)
def test_padding_words_may_hold_anything(backend, garbage, softmax):
    visual, text, mask = features()
    mask[0, 0] = mask[1, -1] = False
    results = []
    for words in (text, text.where(mask[:, :, None], torch.tensor(garbage))):
        leaves = visual.detach().requires_grad_(), words.detach().requires_grad_()
        result = pixel_text_similarity(*leaves, mask, softmax=softmax, backend=backend)
        result.sum().backward()
        results.append((result.detach(), leaves[0].grad, leaves[1].grad))
    for clean, dirty in zip(*results, strict=True):
        assert same_bits(clean, dirty)
    assert not results[0][2][~mask].any()


def test_a_mask_of_real_words_is_no_mask(backend):
    visual, text, mask = features()
    everything = pixel_text_similarity(visual, text, torch.ones_like(mask), backend=backend)
    assert same_bits(pixel_text_similarity(visual, text, backend=backend), everything)


def test_vectors_of_length_zero(backend):
    visual, text, mask = features()
    visual[1, :, 2, 3] = 0
    text[0, mask[0].nonzero()[0, 0]] = 0
    leaves = visual.detach().requires_grad_(), text.detach().requires_grad_()
    result = pixel_text_similarity(*leaves, mask, backend=backend)
    result.sum().backward()
    assert result[1, 2, 3] == 0 and not leaves[0].grad[1, :, 2, 3].any()
    assert (result[0] >= 0).all()  # the word without direction is at 0 from everything
    assert leaves[0].grad.isfinite().all() and leaves[1].grad.isfinite().all()
    assert not leaves[1].grad[0, mask[0].nonzero()[0, 0]].any()


def test_the_first_of_equal_words_gets_the_gradient(backend):
    visual, text, _ = features(masked=False)
    text[:, 3] = text[:, 1]
    leaf = text.detach().requires_grad_()
    pixel_text_similarity(visual, leaf, backend=backend).sum().backward()
    assert not leaf.grad[:, 3].any() and leaf.grad[:, 1].any()


def test_nan_stays_in_its_pixel(backend):
    visual, text, mask = features()
    expected = pixel_text_similarity(visual, text, mask, backend=backend)
    visual[0, 5, 1, 2] = torch.nan
    actual = pixel_text_similarity(visual, text, mask, backend=backend)
    hit = torch.zeros_like(actual, dtype=torch.bool)
    hit[0, 1, 2] = True
    assert actual[hit].isnan().all() and same_bits(actual[~hit], expected[~hit])


@pytest.mark.parametrize("normalize", (True, False))
def test_where_the_definition_has_nan_all_have(backend, normalize):
    """An infinite word has no direction, and infinite features give inf - inf: wherever these words stand."""
    visual, text = torch.randn(3, 4, 1, 3), torch.randn(3, 5, 4)
    text[0, 3, 1] = torch.inf
    text[1, 2, 0] = torch.nan
    visual[2, :2, 0, 1], text[2, :, :2] = torch.inf, torch.tensor([[1.0, 1], [1, 2], [1, -1], [2, 1], [1, 1]])
    for words in (text, text.flip(1)):
        expected = pixel_text_similarity(visual.double(), words.double(), normalize=normalize, backend="reference")
        actual = pixel_text_similarity(visual, words, normalize=normalize, backend=backend)
        assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any() and not expected.isnan().all()


def test_permuting_the_batch_permutes_the_result(backend):
    visual, text, mask = features(((4, 24, 6, 7), 5), layouts=("contiguous",) * 3)
    order = torch.tensor([2, 0, 3, 1])
    result = pixel_text_similarity(visual, text, mask, backend=backend)
    assert same_bits(result[order], pixel_text_similarity(visual[order], text[order], mask[order], backend=backend))


def test_inputs_are_not_written_to(backend):
    tensors = features()
    before = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors[:2]]
    pixel_text_similarity(*leaves, tensors[2], softmax=True, backend=backend).sum().backward()
    for tensor, values in zip(tensors, before, strict=True):
        assert same_bits(tensor, values) and tensor._version <= 1


def test_only_the_inputs_are_saved(cpu):
    visual, text, mask = features()
    saved, own = [], {x.untyped_storage().data_ptr() for x in (visual, text, mask)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        pixel_text_similarity(visual.requires_grad_(), text.requires_grad_(), mask, backend=cpu)
    assert saved and {x.untyped_storage().data_ptr() for x in saved} <= own
