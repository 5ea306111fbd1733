"""The quantile of a sample by radix selection, on integers of the same order as the numbers: eight bits at a time, or,
of few values, which stay in registers, one.
"""

import triton
import triton.language as tl

from .arithmetic import multiply_add, widen

BINS = tl.constexpr(256)
NO_KEY = tl.constexpr(0xFFFFFFFF)
LINEAR, LOWER, HIGHER, MIDPOINT, NEAREST = (tl.constexpr(i) for i in range(5))


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
def load_keys(values, stride, valid, valid_stride, start, stop, BLOCK: tl.constexpr):
    """Which of the values from `start` on exist, the values and their keys."""
    i = start + tl.arange(0, BLOCK).to(tl.int64)
    exists = i < stop
    if valid is not None:
        exists &= tl.load(valid + i * valid_stride, mask=exists, other=0) != 0
    value = tl.load(values + i * stride, mask=exists, other=0)
    if value.dtype.is_floating():
        value = widen(value)
    return exists, value, ordered_key(value)


@triton.jit
def count_digits(values, stride, valid, valid_stride, start, stop, prefix, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """How often each digit at SHIFT occurs among the keys of [start, stop) whose higher digits are `prefix`.

    Also the least key with higher digits beyond `prefix` (for SHIFT 0, where it may be the next one), and how many NaN
    there are (for the first digit).
    """
    histogram = tl.zeros((BINS,), tl.int64)
    beyond = tl.full((BLOCK,), NO_KEY, tl.uint32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, stop, BLOCK):
        exists, value, key = load_keys(values, stride, valid, valid_stride, block, stop, BLOCK)
        counts = exists
        if SHIFT == 24:
            nans += (exists & (value != value)).to(tl.int32)
        else:
            counts &= (key >> (SHIFT + 8)) == prefix
        if SHIFT == 0:
            beyond = tl.where(exists & ((key >> 8) > prefix) & (key < beyond), key, beyond)
        histogram += tl.histogram(((key >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counts)
    return histogram, tl.min(beyond, 0), tl.sum(nans.to(tl.int64), 0)


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
    # Not `> 0`: for AMD, Triton 3.8.0 may take that to be false of every histogram (triton#11246).
    following = tl.min(tl.where((digit > own) & (histogram != 0), digit, BINS), 0)
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
def keys_at(values, stride, valid, valid_stride, count, histogram, place, BLOCK: tl.constexpr):
    """The keys at `place` and at `place` + 1 among `count` values, given the histogram of their first digits."""
    place, prefix = descend(histogram, place, tl.zeros((), tl.uint32))
    beyond = tl.full((), NO_KEY, tl.uint32)
    for level in tl.static_range(3):
        histogram, beyond, _ = count_digits(
            values, stride, valid, valid_stride, 0, count, prefix, 16 - 8 * level, BLOCK,
        )
        place, prefix = descend(histogram, place, prefix)
    return prefix, key_after(histogram, place, prefix, beyond)


@triton.jit
def keys_among(exists, key, place):
    """The keys at `place` and at `place` + 1 of a block. A bit costs one count, a histogram of eight bits dozens."""
    found = tl.zeros((), tl.uint32)
    for bit in range(32):
        higher = found | (tl.full((), 0x80000000, tl.uint32) >> bit)
        smaller = tl.sum((exists & (key < higher)).to(tl.int32), 0)
        found = tl.where(smaller <= place, higher, found)
    up_to = tl.sum((exists & (key <= found)).to(tl.int32), 0)
    following = tl.min(tl.where(exists & (key > found), key, NO_KEY), 0)
    return found, tl.where(place + 1 < up_to, found, following)


@triton.jit
def bracket(values, stride, valid, valid_stride, count, q, SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """Two keys with the q-quantile between them, nearly always: four standard deviations of its rank among SAMPLE
    values, and cut to 16 bits."""
    step = tl.cdiv(count, SAMPLE) | 1  # odd: of a map whose width is a power of two, every column is met
    stride, valid_stride = tl.full((), stride, tl.int64) * step, tl.full((), valid_stride, tl.int64) * step
    count = tl.cdiv(count, step)
    none = tl.zeros((), tl.uint32)
    histogram, _, _ = count_digits(values, stride, valid, valid_stride, 0, count, none, 24, BLOCK)
    existing = tl.sum(histogram, 0)
    middle, margin = q * existing.to(tl.float32), 4 * tl.sqrt(q * (1 - q) * existing.to(tl.float32)) + 2
    first, last = (middle - margin).to(tl.int64), (middle + margin).to(tl.int64)
    place, low = descend(histogram, tl.maximum(first, 0), none)
    low_digits, _, _ = count_digits(values, stride, valid, valid_stride, 0, count, low, 16, BLOCK)
    _, low = descend(low_digits, place, low)
    place, high = descend(histogram, tl.minimum(last, existing - 1), none)
    high_digits, _, _ = count_digits(values, stride, valid, valid_stride, 0, count, high, 16, BLOCK)
    _, high = descend(high_digits, place, high)
    return tl.where(first > 0, low << 16, none), tl.where(last < existing, (high << 16) | 0xFFFF, NO_KEY)


@triton.jit
def collect(values, stride, valid, valid_stride, count, low, high, found, room, BLOCK: tl.constexpr):
    """The keys in [low, high] into `found`, in their order, while there is room; how many there are, how many values
    are below, how many there are at all, and how many of these are NaN."""
    between = tl.zeros((), tl.int64)
    below = tl.zeros((BLOCK,), tl.int32)
    existing, nans = below, below
    for block in range(0, count, BLOCK):
        exists, value, key = load_keys(values, stride, valid, valid_stride, block, count, BLOCK)
        existing += exists.to(tl.int32)
        nans += (exists & (value != value)).to(tl.int32)
        below += (exists & (key < low)).to(tl.int32)
        chosen = exists & (key >= low) & (key <= high)
        place = between + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(found + place, key.to(tl.int32, bitcast=True), mask=chosen & (place < room))
        between += tl.sum(chosen.to(tl.int32), 0)
    return between, tl.sum(below.to(tl.int64), 0), tl.sum(existing.to(tl.int64), 0), tl.sum(nans.to(tl.int64), 0)


@triton.jit
def select_quantile(
    values, stride, valid, valid_stride, count, q, found, room, INTERPOLATION: tl.constexpr,
    RANK_IN_FP64: tl.constexpr, FEW: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The q-quantile of `count` values, by one program. NaN where there is none or a value is NaN.

    FEW: they are one block at most, and are read once.
    found: None, or where values are many memory for `room` keys: the digits of all are then not counted four times.
    An evenly spaced sample tells between which keys the quantile lies, one pass finds the few keys between them, and
    what is counted is their digits. Should it lie elsewhere, or too many be equal, it is all of them after all.
    """
    in_range = (q >= 0) & (q <= 1)
    q = tl.where(in_range, q, 0.0)
    none = tl.zeros((), tl.uint32)
    if FEW:
        exists, value, keys = load_keys(values, stride, valid, valid_stride, 0, count, BLOCK)
        existing, nans = tl.sum(exists.to(tl.int32), 0), tl.sum((exists & (value != value)).to(tl.int32), 0)
        below, above, weight = quantile_rank(q, existing, INTERPOLATION, RANK_IN_FP64)
        key, following = keys_among(exists, keys, below)
    elif found is None:
        histogram, _, nans = count_digits(values, stride, valid, valid_stride, 0, count, none, 24, BLOCK)
        existing = tl.sum(histogram, 0)
        below, above, weight = quantile_rank(q, existing, INTERPOLATION, RANK_IN_FP64)
        key, following = keys_at(values, stride, valid, valid_stride, count, histogram, below, BLOCK)
    else:
        low, high = bracket(values, stride, valid, valid_stride, count, q, SAMPLE, BLOCK)
        between, before, existing, nans = collect(
            values, stride, valid, valid_stride, count, low, high, found, room, BLOCK,
        )
        below, above, weight = quantile_rank(q, existing, INTERPOLATION, RANK_IN_FP64)
        tl.debug_barrier()  # what follows reads what other threads have stored
        if (between <= room) & (below >= before) & (above < before + between):
            histogram, _, _ = count_digits(found, 1, None, 0, 0, between, none, 24, BLOCK)
            key, following = keys_at(found, 1, None, 0, between, histogram, below - before, BLOCK)
        else:
            histogram, _, _ = count_digits(values, stride, valid, valid_stride, 0, count, none, 24, BLOCK)
            key, following = keys_at(values, stride, valid, valid_stride, count, histogram, below, BLOCK)
    result = blend(
        from_ordered_key(key), from_ordered_key(tl.where(above > below, following, key)), weight, INTERPOLATION,
    )
    return tl.where((existing > 0) & (nans == 0) & in_range, result, float("nan"))
