"""sample_quantile: radix selection on integers of the same order as the numbers, eight bits at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import multiply_add, widen
from .tensors import FLOATS, as_bytes, check

BINS = tl.constexpr(256)
NO_KEY = tl.constexpr(0xFFFFFFFF)
LINEAR, LOWER, HIGHER, MIDPOINT, NEAREST = (tl.constexpr(i) for i in range(5))

# A block of 1024 keys is 8 per thread of 4 warps: enough loads in flight, and the histogram of a short map is not
# mostly padding.
BLOCK, WARPS = 1024, 4
# One program reads a sample of up to this many values, four times and then from the cache; a longer one is divided
# among programs that each read SHARE values, which takes a launch per digit.
ONE_PROGRAM, SHARE = 32768, 16384


@triton.jit
def ordered_key(value):
    """Unsigned integers in the order of fp32 numbers, -0.0 just before +0.0; integers stand for themselves."""
    bits = value.to(tl.int32, bitcast=True)
    if value.dtype == tl.float32:
        bits ^= (bits >> 31) | -0x80000000
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def from_ordered_key(key):
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -0x80000000, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def quantile_rank(q, count, INTERPOLATION: tl.constexpr, IN_FP64: tl.constexpr):
    """Where the q-quantile of `count` numbers lies: the places below and above it, and the weight of `above`.

    PyTorch computes q (count - 1) in fp64 since 2.14 and in fp32 before. fp64 is slow on many GPUs, so this is done in
    integers: q is a whole number of 24 bits times a power of two, its product with count - 1 (below 2^37) a whole
    number of 61 bits, rounded to the 53 of fp64 as the multiplication would. For q in [0, 1].
    """
    last = (count - 1).to(tl.int64)
    bits = q.to(tl.int32, bitcast=True) if IN_FP64 else (q * last.to(tl.float32)).to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits >> 23, 1)
    whole = (tl.where(bits >> 23 > 0, 0x800000, 0) | (bits & 0x7FFFFF)).to(tl.int64)
    places = 150 - exponent  # the rank is whole * 2^-places
    if IN_FP64:
        whole *= last
        spare = tl.zeros((), tl.int32)  # bits for which fp64 has no room
        for bit in tl.static_range(8):
            spare += (whole >> (53 + bit) > 0).to(tl.int32)
        half = (tl.full((), 1, tl.int64) << spare) >> 1
        even = (whole >> spare) & 1
        whole = tl.where(spare > 0, (whole + half - 1 + even) >> spare << spare, whole)
    right = tl.minimum(tl.maximum(places, 0), 62)
    left = tl.maximum(-places, 0)
    one = tl.full((), 1, tl.int64)
    below = (whole >> right) << left
    rest = whole & ((one << right) - 1)
    above = below + (rest > 0).to(tl.int64)
    weight = tl.full((), 0.5, tl.float32)
    if INTERPOLATION == LOWER:
        above = below
    elif INTERPOLATION == HIGHER:
        below = above
    elif INTERPOLATION == NEAREST:  # a half goes to the even one
        half = (one << right) >> 1
        below = tl.where((rest > half) | ((rest == half) & (below & 1 == 1)), above, below)
        above = below
    elif INTERPOLATION == LINEAR:
        # rest * 2^-places, rounded once, in the conversion: what is subnormal in the end has few bits and is exact.
        unit = tl.where(places < 127, (127 - places) << 23, one.to(tl.int32) << tl.minimum(149 - places, 22))
        weight = tl.where(rest > 0, rest.to(tl.float32) * unit.to(tl.float32, bitcast=True), 0.0)
    return tl.minimum(below, last), tl.minimum(above, last), weight


@triton.jit
def count_digits(values, stride, valid, valid_stride, start, stop, prefix, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """How often each digit at SHIFT occurs among the keys of [start, stop) whose higher digits are `prefix`.

    Also the least key with higher digits beyond `prefix` (for SHIFT 0, where it may be the next one), and how many NaN
    there are (for the first digit).
    """
    histogram = tl.zeros((BINS,), tl.int32)
    beyond = tl.full((BLOCK,), NO_KEY, tl.uint32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, stop, BLOCK):
        i = block + tl.arange(0, BLOCK).to(tl.int64)
        exists = i < stop
        if valid is not None:
            exists &= tl.load(valid + i * valid_stride, mask=exists, other=0) != 0
        value = tl.load(values + i * stride, mask=exists, other=0)
        if value.dtype.is_floating():
            value = widen(value)
        key = ordered_key(value)
        counts = exists
        if SHIFT == 24:
            nans += (exists & (value != value)).to(tl.int32)
        else:
            counts &= (key >> (SHIFT + 8)) == prefix
        if SHIFT == 0:
            beyond = tl.where(exists & ((key >> 8) > prefix) & (key < beyond), key, beyond)
        histogram += tl.histogram(((key >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counts)
    return histogram, tl.min(beyond, 0), tl.sum(nans, 0)


@triton.jit
def descend(histogram, place, prefix):
    """The digit of the key at `place` among those counted; then its place among the keys with the same digit."""
    up_to = tl.cumsum(histogram, 0)
    smaller = up_to <= place
    digit = tl.sum(smaller.to(tl.int32), 0)
    return place - tl.sum(tl.where(smaller, histogram, 0), 0), (prefix << 8) | digit.to(tl.uint32)


@triton.jit
def key_after(histogram, place, key, beyond):
    """The key at `place` + 1, given that `key` is at `place` and the histogram of the last digit."""
    digit = tl.arange(0, BINS)
    own = (key & (BINS - 1)).to(tl.int32)
    equal = tl.sum(tl.where(digit == own, histogram, 0), 0)
    following = tl.min(tl.where((digit > own) & (histogram > 0), digit, BINS), 0)
    near = ((key >> 8) << 8) | following.to(tl.uint32)
    return tl.where(place + 1 < equal, key, tl.where(following < BINS, near, beyond))


@triton.jit
def blend(low, high, weight, INTERPOLATION: tl.constexpr):
    """As torch.lerp rounds it."""
    if INTERPOLATION == LINEAR or INTERPOLATION == MIDPOINT:
        difference = high - low
        lower = multiply_add(weight, difference, low)
        return tl.where(weight < 0.5, lower, multiply_add(weight - 1.0, difference, high))
    return low


@triton.jit
def select_quantile(
    values, stride, valid, valid_stride, count, q, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The q-quantile of `count` values, by one program. NaN where there is none or a value is NaN."""
    prefix = tl.zeros((), tl.uint32)
    histogram, beyond, nans = count_digits(values, stride, valid, valid_stride, 0, count, prefix, 24, BLOCK)
    existing = tl.sum(histogram, 0)
    in_range = (q >= 0) & (q <= 1)
    below, above, weight = quantile_rank(tl.where(in_range, q, 0.0), existing, INTERPOLATION, RANK_IN_FP64)
    place, prefix = descend(histogram, below.to(tl.int32), prefix)
    for level in tl.static_range(3):
        histogram, beyond, _ = count_digits(
            values, stride, valid, valid_stride, 0, count, prefix, 16 - 8 * level, BLOCK,
        )
        place, prefix = descend(histogram, place, prefix)
    next_key = tl.where(above > below, key_after(histogram, place, prefix, beyond), prefix)
    result = blend(from_ordered_key(prefix), from_ordered_key(next_key), weight, INTERPOLATION)
    return tl.where((existing > 0) & (nans == 0) & in_range, result, float("nan"))


@triton.jit
def fraction(q, q_each, q_stride, sample):
    """The q of a sample: one for all, or one for each."""
    if q_each is not None:
        return tl.load(q_each + sample.to(tl.int64) * q_stride)
    return tl.full((), q, tl.float32)


@triton.jit
def quantile_kernel(
    values, values_sample_stride, values_stride, valid, valid_sample_stride, valid_stride, count, q, q_each, q_stride,
    out, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program per sample."""
    sample = tl.program_id(0)
    values += sample.to(tl.int64) * values_sample_stride
    if valid is not None:
        valid += sample.to(tl.int64) * valid_sample_stride
    result = select_quantile(
        values, values_stride, valid, valid_stride, count, fraction(q, q_each, q_stride, sample), INTERPOLATION,
        RANK_IN_FP64, BLOCK,
    )
    tl.store(out + sample, result)


# A long sample: for each digit a launch that adds the counts of many programs in memory, as integers, whose order does
# not matter. `counts` of a sample: four histograms, the number of NaN, and NO_KEY minus the least key beyond.
COUNTS = 4 * 256 + 2


@triton.jit
def descend_counts(counts, q, LEVELS: tl.constexpr, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr):
    """As far down as LEVELS histograms lead."""
    digit = tl.arange(0, BINS)
    histogram = tl.load(counts + digit)
    existing = tl.sum(histogram, 0)
    in_range = (q >= 0) & (q <= 1)
    below, above, weight = quantile_rank(tl.where(in_range, q, 0.0), existing, INTERPOLATION, RANK_IN_FP64)
    place, prefix = descend(histogram, below, tl.zeros((), tl.uint32))
    for level in tl.static_range(1, LEVELS):
        histogram = tl.load(counts + level * BINS + digit)
        place, prefix = descend(histogram, place, prefix)
    return histogram, place, prefix, above > below, weight, in_range & (existing > 0)


@triton.jit
def digits_kernel(
    values, values_sample_stride, values_stride, valid, valid_sample_stride, valid_stride, count, shares, q, q_each,
    q_stride, counts, LEVEL: tl.constexpr, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr,
    SHARE: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program per share of a sample."""
    sample, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    values += sample.to(tl.int64) * values_sample_stride
    if valid is not None:
        valid += sample.to(tl.int64) * valid_sample_stride
    counts += sample.to(tl.int64) * COUNTS
    prefix = tl.zeros((), tl.uint32)
    if LEVEL > 0:
        _, _, prefix, _, _, _ = descend_counts(
            counts, fraction(q, q_each, q_stride, sample), LEVEL, INTERPOLATION, RANK_IN_FP64,
        )
    start = share.to(tl.int64) * SHARE
    stop = tl.minimum(start + SHARE, count)
    histogram, beyond, nans = count_digits(
        values, values_stride, valid, valid_stride, start, stop, prefix, 24 - 8 * LEVEL, BLOCK,
    )
    tl.atomic_add(counts + LEVEL * BINS + tl.arange(0, BINS), histogram.to(tl.int64), mask=histogram > 0)
    if LEVEL == 0:
        tl.atomic_add(counts + 4 * BINS, nans.to(tl.int64))
    if LEVEL == 3:
        tl.atomic_max(counts + 4 * BINS + 1, (tl.full((), NO_KEY, tl.uint32) - beyond).to(tl.int64))


@triton.jit
def finish_kernel(
    q, q_each, q_stride, counts, out, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr, COUNTS: tl.constexpr,
):
    sample = tl.program_id(0)
    counts += sample.to(tl.int64) * COUNTS
    histogram, place, key, blends, weight, exists = descend_counts(
        counts, fraction(q, q_each, q_stride, sample), 4, INTERPOLATION, RANK_IN_FP64,
    )
    beyond = tl.full((), NO_KEY, tl.uint32) - tl.load(counts + 4 * BINS + 1).to(tl.uint32)
    next_key = tl.where(blends, key_after(histogram, place, key, beyond), key)
    result = blend(from_ordered_key(key), from_ordered_key(next_key), weight, INTERPOLATION)
    tl.store(out + sample, tl.where(exists & (tl.load(counts + 4 * BINS) == 0), result, float("nan")))


def sample_quantile(
    values: Tensor, q: float, q_per_sample: Tensor | None, valid: Tensor | None, interpolation: int,
    rank_in_fp64: bool,
) -> Tensor:
    """One launch for short samples, five for long ones. What cannot be seen as `[B, N]` is copied once."""
    if values.dtype not in FLOATS or values.dim() == 0 or values.numel() == 0:
        raise ValueError(f"values: expected [B, ...] in fp32, bf16 or fp16, got {list(values.shape)} in {values.dtype}")
    samples = values.shape[0]
    if q_per_sample is not None:
        check("q", q_per_sample, (torch.float32,), (samples,))
    if valid is not None:
        check("valid", valid, (torch.bool, torch.uint8), tuple(values.shape))
    values = values.reshape(samples, -1)
    valid = None if valid is None else as_bytes(valid).reshape(samples, -1)
    count = values.shape[1]
    where = (values, *values.stride(), valid, *((0, 0) if valid is None else valid.stride()), count)
    which = (q, q_per_sample, 0 if q_per_sample is None else q_per_sample.stride(0))
    options = {"INTERPOLATION": interpolation, "RANK_IN_FP64": rank_in_fp64, "enable_fp_fusion": False}
    out = values.new_empty(samples, dtype=torch.float32)
    with torch.cuda.device_of(values):
        if count <= ONE_PROGRAM:
            quantile_kernel[(samples,)](*where, *which, out, BLOCK=BLOCK, num_warps=WARPS, **options)
            return out
        counts = values.new_zeros((samples, COUNTS), dtype=torch.int64)
        shares = triton.cdiv(count, SHARE)
        for level in range(4):
            digits_kernel[(samples * shares,)](
                *where, shares, *which, counts, LEVEL=level, SHARE=SHARE, COUNTS=COUNTS, BLOCK=BLOCK, num_warps=WARPS,
                **options,
            )
        finish_kernel[(samples,)](*which, counts, out, COUNTS=COUNTS, num_warps=WARPS, **options)
    return out
