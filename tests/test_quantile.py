"""sample_quantile equals torch.quantile of each sample, bit for bit."""

import pytest
import textbook
import torch
from helpers import LAYOUTS, bits, coin, generator, here, laid_out, normal, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from aml_kernels import sample_quantile
from aml_kernels.reference.quantile import RANK_IN_FP64

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")
QUANTILES = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.999, 1.0)
TINY = 1e-45  # the smallest subnormal number of fp32


def assert_equal(actual, expected):
    """Same bits, except that NaN may have any payload, and zero any sign (torch leaves the order of zeros open)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    same = (bits(actual) == bits(expected)) | (actual.isnan() & expected.isnan()) | ((actual == 0) & (expected == 0))
    assert same.all(), f"{actual[~same]} != {expected[~same]} in samples {(~same).nonzero().flatten().tolist()}"


def rows(kind: str, samples: int = 3, length: int = 501):
    special = here(torch.randint(0, 6, (samples, length), generator=generator(1), device="cpu"))
    return {
        "normal": lambda: normal(0, samples, length),
        "narrow": lambda: 0.5 + 1e-6 * uniform(0, samples, length),
        "ties": lambda: special.float() - 2,
        "constant": lambda: torch.full((samples, length), -0.3),
        "subnormal": lambda: (special - 3) * TINY,
        "zeros": lambda: torch.tensor([0.0, -0.0, 0.0, -0.0, TINY, -TINY])[special],
        "negative zero": lambda: torch.full((samples, length), -0.0),
        "infinities": lambda: torch.tensor([-torch.inf, torch.inf, -1.0, 0.5, 2.0, 3.0])[special],
        "wide": lambda: normal(0, samples, length).sign() * torch.exp(80 * normal(1, samples, length).clamp(-1, 1)),
    }[kind]()


KINDS = ("normal", "narrow", "ties", "constant", "subnormal", "zeros", "negative zero", "infinities", "wide")


@pytest.mark.parametrize("masked", (False, True), ids=("all", "valid"))
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_quantile(backend, kind, interpolation, masked):
    values = laid_out(rows(kind), "sliced")
    valid = laid_out(coin(2, *values.shape, share=0.6), "batch_last") if masked else None
    for q in QUANTILES:
        actual = sample_quantile(values, q, valid=valid, interpolation=interpolation, backend=backend)
        assert_equal(actual, textbook.quantile(values, q, valid, interpolation))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_other_float_types(backend, dtype, interpolation):
    for kind in ("normal", "ties", "infinities", "zeros"):
        values, valid = laid_out(rows(kind).to(dtype), "transposed"), coin(3, 3, 501)
        for q in QUANTILES:
            for mask in (None, valid):
                actual = sample_quantile(values, q, valid=mask, interpolation=interpolation, backend=backend)
                assert_equal(actual, textbook.quantile(values, q, mask, interpolation))


# One value, around vector widths, around powers of two, more than one block of work.
@pytest.mark.parametrize("length", (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 256, 257, 4097))
def test_lengths(backend, length):
    values = laid_out(normal(length, 2, length), "cut")
    for valid in (None, coin(1, 2, length, share=0.7)):
        for q in (0.0, 0.25, 0.7, 1.0):
            assert_equal(sample_quantile(values, q, valid=valid, backend=backend), textbook.quantile(values, q, valid))


@pytest.mark.large
@pytest.mark.parametrize("length", (65_537, 300_001))
def test_large_lengths(backend, length):
    test_lengths(backend, length)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_maps(backend, layout):
    values, valid = laid_out(normal(4, 5, 2, 9, 11), layout), laid_out(coin(5, 5, 2, 9, 11), layout)
    assert_equal(sample_quantile(values, 0.4, valid=valid, backend=backend), textbook.quantile(values, 0.4, valid))


def test_expanded(backend):
    values, valid = normal(6, 1, 8, 9).expand(4, 8, 9), coin(7, 8, 9).expand(4, 8, 9)
    assert_equal(sample_quantile(values, 0.3, valid=valid, backend=backend), textbook.quantile(values, 0.3, valid))
    values = normal(6, 4, 1, 1).expand(4, 8, 9)
    assert_equal(sample_quantile(values, 0.3, valid=valid, backend=backend), textbook.quantile(values, 0.3, valid))


def test_many_samples(backend):
    values, valid = normal(8, 300, 17), coin(9, 300, 17, share=0.5)
    assert_equal(sample_quantile(values, 0.5, valid=valid, backend=backend), textbook.quantile(values, 0.5, valid))


def test_one_value_per_sample(backend):
    values = laid_out(normal(8, 5), "sliced")
    assert_equal(sample_quantile(values, 0.5, backend=backend), values.clone())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_a_quantile_per_sample(backend, dtype, interpolation):
    values, valid = normal(10, 6, 33, 9), coin(11, 6, 33, 9)
    q = laid_out(torch.tensor([0.0, 0.1, 0.25, 0.6, 0.99, 1.0], dtype=dtype), "sliced")
    for mask in (None, valid):
        actual = sample_quantile(values, q, valid=mask, interpolation=interpolation, backend=backend)
        assert_equal(actual, textbook.quantile(values, q, mask, interpolation))


def test_a_quantile_tensor_outside_its_range_gives_nan(backend):
    q = torch.tensor([-0.1, 0.5, 1.1, torch.nan, torch.inf, -torch.inf])
    values = normal(12, 6, 40)
    actual = sample_quantile(values, q, backend=backend)
    assert actual.isnan().tolist() == [True, False, True, True, True, True]
    assert_equal(actual[1:2], textbook.quantile(values[1:2], 0.5))


def test_nan_counts_only_where_valid(backend):
    values, valid = normal(13, 4, 100), torch.ones(4, 100, dtype=torch.bool)
    values[0, 3] = values[1, 5] = torch.nan
    values[2, :9] = torch.inf
    valid[1, 5] = valid[2, :9] = valid[3, :] = False
    actual = sample_quantile(values, 0.25, valid=valid, backend=backend)
    assert actual.isnan().tolist() == [True, False, False, True]
    assert_equal(actual, textbook.quantile(values, 0.25, valid))
    assert sample_quantile(values, 0.25, backend=backend).isnan().tolist() == [True, True, False, False]


def test_one_valid_value(backend):
    valid = torch.zeros(2, 7, 7, dtype=torch.bool)
    valid[0, 3, 2] = valid[1, 6, 6] = True
    values = normal(14, 2, 7, 7)
    for q in (0.0, 0.37, 1.0):
        assert_equal(sample_quantile(values, q, valid=valid, backend=backend), values[valid])


NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=150)
@given(
    numbers=st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1, max_size=40),
    q=st.floats(0, 1), interpolation=st.sampled_from(INTERPOLATIONS), masked=st.booleans(),
)
def test_any_numbers(backend, numbers, q, interpolation, masked):
    values, valid = (torch.tensor([column]) for column in zip(*numbers, strict=True))
    valid = valid if masked else None
    actual = sample_quantile(values, q, valid=valid, interpolation=interpolation, backend=backend)
    assert_equal(actual, textbook.quantile(values, q, valid, interpolation))


@pytest.mark.parametrize("masked", (False, True), ids=("all", "valid"))
def test_thirty_million_values_in_one_sample(cpu, masked):
    values = torch.randn(1, 30_000_000, generator=generator(15))
    valid = torch.ones_like(values, dtype=torch.bool) if masked else None
    if masked:
        valid[0, ::1000] = False
    row = values[0] if valid is None else values[valid]
    # Ranks beyond the whole numbers of fp32, which torch.quantile gets right since it computes them in fp64.
    ordered = None if RANK_IN_FP64 else row.sort().values
    for q in (0.25, 0.9999999):
        if RANK_IN_FP64:
            expected = torch.quantile(row, q)
        else:
            rank = (torch.tensor(q) * (row.numel() - 1)).float()
            low, high = ordered[rank.long()], ordered[rank.ceil().long().clamp_max(row.numel() - 1)]
            expected = torch.lerp(low, high, rank - rank.long())
        assert_equal(sample_quantile(values, q, valid=valid, backend=cpu), expected[None])


def test_result_has_no_gradient_and_inputs_stay(backend):
    values, valid = laid_out(normal(16, 2, 50), "cut").requires_grad_(), coin(17, 2, 50)
    before = values.detach().clone(), valid.clone()
    assert not sample_quantile(values, 0.5, valid=valid, backend=backend).requires_grad
    assert torch.equal(values, before[0]) and torch.equal(valid, before[1])
    assert values._version == 0 or values.grad is None


@pytest.mark.parametrize("guessed", (True, False), ids=("guess ends there", "guess misses"))
def test_the_next_value_lies_beyond_all_equal_ones(cpu, guessed):
    """Between the last of many zeros and the ones. guessed: the places that the kernel's guess looks at are all 0."""
    count = 65536
    values = torch.ones(1, count)
    index, step = torch.arange(2048), count // 2048
    places = index * step + index * 40503 % 2048 * step // 2048 if guessed else torch.arange(5000)
    values[0, places] = 0
    q = (len(places) - 0.5) / (count - 1)
    actual, expected = (sample_quantile(values, q, backend=name) for name in (cpu, "reference"))
    assert_equal(actual, expected)
    assert 0 < actual.item() < 1
