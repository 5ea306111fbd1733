"""sample_quantile: a program per sample where samples are short enough, else a launch per digit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selection import (
    BINS,
    NO_KEY,
    blend,
    count_digits,
    descend,
    from_ordered_key,
    key_after,
    quantile_rank,
    select_quantile,
)
from .tensors import FLOATS, as_bytes, check

# A block of 1024 keys is 8 per thread of 4 warps: enough loads in flight. Fewer values than that stay in registers.
BLOCK, WARPS = 1024, 4
# A histogram takes some 70 instructions for 32 keys, and counting the digits of a sample four of them. Of more than
# DIRECT values, a program therefore looks at SAMPLE of them first and then counts digits of a sixteenth (see
# select_quantile), which is a third of the work for a map of 120 x 120 and a tenth for one of 480 x 480.
DIRECT, SAMPLE = 8192, 4096
ROOM = 8  # memory for an eighth of the values, so that only many equal ones do not fit
# A sample of more values than this is divided among programs that each read SHARE of them, which takes a launch per
# digit, and is worth that from about the pixels of an image on.
ONE_PROGRAM, SHARE = 262144, 16384


@triton.jit
def fraction(q, q_each, q_stride, sample):
    """The q of a sample: one for all, or one for each."""
    if q_each is not None:
        return tl.load(q_each + sample.to(tl.int64) * q_stride)
    return tl.full((), q, tl.float32)


@triton.jit(do_not_specialize=["room"])
def quantile_kernel(
    values, values_sample_stride, values_stride, valid, valid_sample_stride, valid_stride, count, q, q_each, q_stride,
    found, room, out, INTERPOLATION: tl.constexpr, RANK_IN_FP64: tl.constexpr, FEW: tl.constexpr,
    SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program per sample."""
    sample = tl.program_id(0)
    wide = sample.to(tl.int64)
    values += wide * values_sample_stride
    if valid is not None:
        valid += wide * valid_sample_stride
    if found is not None:
        found += wide * room
    result = select_quantile(
        values, values_stride, valid, valid_stride, count, fraction(q, q_each, q_stride, sample), found, room,
        INTERPOLATION, RANK_IN_FP64, FEW, SAMPLE, BLOCK,
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
    tl.atomic_add(counts + LEVEL * BINS + tl.arange(0, BINS), histogram.to(tl.int64), mask=histogram != 0)
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


def room_for_keys(values: Tensor) -> tuple[Tensor | None, int]:
    """What select_quantile keeps keys in, and how many of a sample of values [B, N]."""
    samples, count = values.shape
    room = 0 if count <= DIRECT else count // ROOM
    return (values.new_empty(samples * room, dtype=torch.int32) if room else None), room


def sample_quantile(
    values: Tensor, q: float, q_per_sample: Tensor | None, valid: Tensor | None, interpolation: int,
    rank_in_fp64: bool,
) -> Tensor:
    """One launch for samples of up to ONE_PROGRAM values, six for longer ones.

    What cannot be seen as `[B, N]` is copied once.
    """
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
            quantile_kernel[(samples,)](
                *where, *which, *room_for_keys(values), out, FEW=count <= BLOCK, SAMPLE=SAMPLE, BLOCK=BLOCK,
                num_warps=WARPS, **options,
            )
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
