"""What the common tests do not show of Triton's selection: ranks, long samples, and which values are looked at."""

import math
import struct

import pytest
import textbook
import torch
from helpers import coin, loss_inputs, normal, uniform

from aml_kernels import _backend, masked_loss, sample_quantile

pytestmark = pytest.mark.usefixtures("interpreted")

if _backend.missing("triton", "cpu") is None:
    import triton
    import triton.language as tl
    import triton_traffic

    from aml_kernels.triton import quantile, region_filter, selection

    @triton.jit
    def rank_kernel(
        q, count, below, above, weight, INTERPOLATION: tl.constexpr, IN_FP64: tl.constexpr, BLOCK: tl.constexpr,
    ):
        i = tl.arange(0, BLOCK)
        b, a, w = selection.quantile_rank(tl.load(q + i), tl.load(count + i), INTERPOLATION, IN_FP64)
        tl.store(below + i, b)
        tl.store(above + i, a)
        tl.store(weight + i, w)


def place(q: float, count: int, interpolation: int, in_fp64: bool) -> tuple[int, int, float]:
    """By doubles, as PyTorch computes it."""
    rank = q * (count - 1) if in_fp64 else (torch.tensor(q) * torch.tensor(float(count - 1))).item()
    rank = {1: math.floor, 2: math.ceil, 4: round}.get(interpolation, float)(rank)
    weight = 0.5 if interpolation == 3 else struct.unpack("f", struct.pack("f", rank - math.floor(rank)))[0]
    return min(math.floor(rank), count - 1), min(math.ceil(rank), count - 1), weight


@pytest.mark.parametrize("in_fp64", (False, True))
@pytest.mark.parametrize("interpolation", range(5))
def test_ranks_are_those_of_doubles(interpolation, in_fp64):
    q = uniform(0, 2048)
    q[:9] = torch.tensor([0.0, 1.0, 0.5, 0.25, 1e-45, 1e-38, 3e-39, 1e-10, 1 - 2**-24])
    count = (2 ** (36 * uniform(1, 2048, dtype=torch.float64))).long().clamp_min(1)
    count[:300] = torch.arange(1, 301)
    q[300:600] = torch.arange(300) / 300
    q[600:700], count[600:700] = 0.5, torch.arange(100) + 2**30
    below, above, weight = torch.empty_like(count), torch.empty_like(count), torch.empty_like(q)
    rank_kernel[(1,)](q, count, below, above, weight, INTERPOLATION=interpolation, IN_FP64=in_fp64, BLOCK=2048)
    for i in range(2048):
        b, a, w = place(q[i].item(), count[i].item(), interpolation, in_fp64)
        assert (below[i], above[i]) == (b, a), (q[i].item(), count[i].item())
        if interpolation in (0, 3) and a > b:
            assert weight[i].item() == w, (q[i].item(), count[i].item())


def assert_quantiles(values, interpolation="linear", valid=None, quantiles=(0.0, 0.003, 0.37, 0.5, 0.99, 1.0)):
    for q in quantiles:
        actual = sample_quantile(values, q, valid=valid, interpolation=interpolation, backend="triton")
        expected = textbook.quantile(values, q, valid, interpolation)
        assert ((actual == expected) | (actual.isnan() & expected.isnan())).all(), f"q {q}: {actual} != {expected}"


def hidden(count):
    """Values that an evenly spaced sample is wrong about: all it meets are larger than any other."""
    values = normal(5, 1, count)
    values[:, :: (-(-count // quantile.SAMPLE)) | 1] += 100
    return values


N = 9001  # more than quantile.DIRECT
LARGE = {
    "smooth": lambda: (torch.arange(2 * N).reshape(2, N) / 1000).sin(),
    "random": lambda: normal(1, 2, N),
    "narrow": lambda: 0.5 + 1e-6 * uniform(0, 2, N),
    "few values": lambda: (normal(2, 2, N) * 2).round(),
    "one value": lambda: torch.full((2, N), -0.5),
    "one value but two": lambda: torch.full((2, N), -0.5).index_fill(1, torch.tensor([7, 8]), 2.0),
    "hidden": lambda: hidden(N),
    "infinities": lambda: torch.where(coin(3, 2, N, share=0.4), torch.inf, normal(4, 2, N)),
    "transposed": lambda: normal(6, N, 2).T,
}


@pytest.mark.parametrize("kind", LARGE)
def test_samples_of_which_few_keys_are_counted(kind):
    values = LARGE[kind]()
    assert N > quantile.DIRECT
    assert_quantiles(values, quantiles=(0.0, 0.003, 0.37, 1.0))
    for interpolation in ("lower", "higher", "nearest"):
        assert_quantiles(values, interpolation, quantiles=(0.4,))
    for share in (0.6, 0.001, 0.0):
        assert_quantiles(values, valid=coin(7, *values.shape, share=share), quantiles=(0.25, 1.0))
    values = values.clone()
    values[0, -1] = torch.nan
    assert sample_quantile(values, 0.1, backend="triton").isnan().tolist() == [True, *[False] * (len(values) - 1)]


@pytest.mark.parametrize(
    ("kind", "passes"), (("smooth", (1, 1.3)), ("random", (1, 1.3)), ("one value", (5, 5.3)), ("hidden", (5, 5.3))),
)
def test_how_often_a_large_sample_is_read(kind, passes):
    """Once if the spaced sample is right, a twelfth of it read three times. Else four times more, for all digits."""
    values = LARGE[kind]()
    values = values.repeat(1, 5)[:, : 5 * N - 3] if kind != "hidden" else hidden(5 * N)
    with triton_traffic.counted() as counted:
        sample_quantile(values, 0.3, backend="triton")
    launch, = counted
    assert passes[0] <= launch.requested_from(values) / (4 * values.numel()) <= passes[1]
    assert_quantiles(values, quantiles=(0.3,))


@pytest.fixture
def small_shares(monkeypatch):
    """Few values are a sample for several programs."""
    monkeypatch.setattr(quantile, "ONE_PROGRAM", 50)
    monkeypatch.setattr(quantile, "SHARE", 64)
    monkeypatch.setattr(quantile, "BLOCK", 32)


@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_long_samples(small_shares, interpolation):
    """Counted by many programs, digit by digit."""
    for values in (normal(1, 2, 501), (normal(2, 2, 300) * 2).round(), torch.full((2, 90), -0.5)):
        values[1, 7] = torch.inf
        for valid in (None, coin(3, *values.shape, share=0.7)):
            assert_quantiles(values, interpolation, valid, quantiles=(0.0, 0.37, 1.0))
    values = normal(1, 3, 200)
    values[0, 5] = torch.nan
    q = torch.tensor([0.5, 1.5, 0.5])
    actual = sample_quantile(values, q, interpolation=interpolation, backend="triton")
    assert actual.isnan().tolist() == [True, True, False]
    assert sample_quantile(values, 0.5, valid=torch.zeros(3, 200, dtype=torch.bool), backend="triton").isnan().all()


def test_a_large_map():
    inputs = loss_inputs(map=(95, 101))
    results = [masked_loss(**inputs, quantile=0.3, return_stats=True, backend=name) for name in ("triton", "reference")]
    for name in ("threshold", "kept", "kept_target", "intersection", "union"):
        assert torch.equal(*(getattr(stats, name) for _, stats in results)), name


def test_equal_keys_are_dropped_in_their_order():
    """Random keys are equal once in billions of blocks; here they are all alike."""
    weak = coin(0, 2, 50, share=0.6).to(torch.uint8)
    keys = torch.full((2, 50), -5, dtype=torch.int32)
    keys[0, 30:] = 7  # as unsigned numbers, before the others
    dropped = torch.empty(2, 50, dtype=torch.uint8)
    region_filter.choose_kernel[(2,)](weak, keys, 50, 0.5, dropped, BLOCK=16)
    for sample in range(2):
        order = sorted((keys[sample, i].item() & 0xFFFFFFFF, i) for i in range(50) if weak[sample, i])
        chosen = sorted(i for _, i in order[: math.floor(0.5 * len(order) + 0.5)])
        assert dropped[sample].nonzero().flatten().tolist() == chosen
