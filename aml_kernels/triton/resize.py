"""Bilinear resizing with one exact order of operations; see aml_kernels/reference/resize.py, its definition.

Either of whole tiles, whose four source elements are gathered for each pixel; or row by row, by a program that goes
down its columns and blends along the source's rows only where it comes to another one of these.
"""

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


@triton.jit
def rows_from(y, x, size, resized_size, ALIGN_CORNERS: tl.constexpr, INDEX: tl.constexpr):
    """What next_row() goes by, and its state before row `y`: of columns `x` of a plane of `size`, resized."""
    source, source_columns = size
    rows, columns = resized_size
    left, right, along = coordinates(x, source_columns, columns, ALIGN_CORNERS, INDEX)
    # An element blended with itself is itself, whatever the weight: so that of `right` there is a weight or nothing.
    along = tl.where(right > left, along, 0.0)

    # Row i lies at source row (i multiplier + offset) / length - 1, of which whole and remaining part are stepped.
    source, rows = tl.full((), source, INDEX), tl.full((), rows, INDEX)
    if ALIGN_CORNERS:
        multiplier, length = source - 1, tl.maximum(rows - 1, 1)
        offset = length
    else:
        multiplier, length, offset = 2 * source, 2 * rows, source + rows
    whole = multiplier // length
    numerator = y * multiplier + offset
    quotient = numerator // length
    nothing = tl.zeros(x.shape, tl.float32)
    state = (quotient - 1, numerator - quotient * length, tl.full((), -1, INDEX), nothing, nothing, nothing)
    return ((left, along), (source, length, whole, multiplier - whole * length)), state


@triton.jit
def next_row(plane, way, state, inside):
    """A row of the resized plane, in fp32, and the state before the row after it."""
    columns, rows = way
    source, length, whole, step = rows
    below, part, held, upper, difference, least = state
    top = tl.maximum(below, 0)
    blends = (part > 0) & (below >= 0) & (below + 1 < source)
    pair = 2 * top + blends.to(top.dtype)  # which rows are blended
    if pair != held:
        held = pair
        upper = blended_row(plane, top, columns, inside)
        lower = blended_row(plane, top + blends.to(top.dtype), columns, inside)
        # interpolate() between these two, as far as it is the same for all rows between them.
        difference = tl.where(upper == lower, 0.0, lower - upper)
        least = tl.minimum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
    row = tl.maximum(upper + row_weight(way, state) * difference, least, propagate_nan=tl.PropagateNan.ALL)
    below, part = below + whole, part + step
    carry = part >= length
    below, part = below + carry.to(below.dtype), tl.where(carry, part - length, part)
    return row, (below, part, held, upper, difference, least)


@triton.jit
def row_weight(way, state):
    """The weight of the lower of the two rows that next_row() blends next."""
    return tl.div_rn(state[1].to(tl.float32), way[1][1].to(tl.float32))


@triton.jit
def blended_row(plane, row, columns, inside):
    left, along = columns
    data, row_stride, column_stride = plane
    at = row * row_stride + left * column_stride
    a = widen(tl.load(data + at, mask=inside, other=0))
    b = widen(tl.load(data + (at + tl.where(along > 0, column_stride, 0)), mask=inside, other=0))
    return interpolate(a, b, along)
