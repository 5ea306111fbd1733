"""Bilinear resizing with one exact order of operations; see aml_kernels/reference/resize.py, its definition."""

import triton
import triton.language as tl

from .arithmetic import widen


@triton.jit
def coordinates(i, source, destination, ALIGN_CORNERS: tl.constexpr, INDEX: tl.constexpr):
    """Where indices `i` among `destination` elements lie among `source`: below, above and the weight of `above`.

    An exact fraction, rounded once. `above` is `below` where there is no weight, and after the last element.
    INDEX is the type to compute in.
    """
    i, source, destination = i.to(INDEX), tl.full((), source, INDEX), tl.full((), destination, INDEX)
    if ALIGN_CORNERS:
        numerator, denominator = i * (source - 1), tl.maximum(destination - 1, 1)
    else:
        numerator, denominator = tl.maximum((2 * i + 1) * source - destination, 0), 2 * destination
    below = numerator // denominator
    remainder = numerator - below * denominator
    above = tl.where((remainder > 0) & (below + 1 < source), below + 1, below)
    weight = tl.div_rn(remainder.to(tl.float32), denominator.to(tl.float32))
    return below, above, weight


@triton.jit
def load_plane(plane, y, x, mask):
    """Elements (y, x) of a plane (pointer, row stride, column stride); 0 where not `mask`."""
    data, row_stride, column_stride = plane
    return tl.load(data + (y * row_stride + x * column_stride), mask=mask, other=0)


@triton.jit
def load_resized(plane, at_y, at_x, mask):
    """The plane at coordinates between its elements, in fp32: along each row first, then between the rows."""
    top, bottom, down = at_y
    left, right, along = at_x
    upper = interpolate(widen(load_plane(plane, top, left, mask)), widen(load_plane(plane, top, right, mask)), along)
    lower = interpolate(
        widen(load_plane(plane, bottom, left, mask)), widen(load_plane(plane, bottom, right, mask)), along,
    )
    return interpolate(upper, lower, down)


@triton.jit
def interpolate(a, b, weight):
    """a + weight (b - a), never below the smaller of the two; NaN if either is NaN. Between equal infinities: that."""
    value = tl.maximum(a + weight * (b - a), tl.minimum(a, b), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(a == b, a, value)
