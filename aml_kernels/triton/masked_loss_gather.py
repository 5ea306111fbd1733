"""The gradient of logits that masked_loss resized (align_corners=True): the transpose of the resize as a gather."""

import triton
import triton.language as tl

from .arithmetic import narrow
from .loss import loss_gradient, next_pixels, pixel_gradient, pixels_from, read_row
from .resize import row_weight


@triton.jit(do_not_specialize=[
    "samples", "z_rows", "z_columns", "s_rows", "s_columns", "rows", "grad_stride", "cell_rows", "cell_columns",
])
def gather_kernel(
    logits, z_sample, z_row, z_column, z_rows, z_columns, target, y_sample, y_row, y_column,
    similarity, s_sample, s_row, s_column, s_rows, s_columns, valid, v_sample, v_row, v_column,
    samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth,
    grad, grad_stride, sums, gradient, cell_rows, cell_columns,
    PROTECT: tl.constexpr, MAP_RESIZED: tl.constexpr, MEAN: tl.constexpr, INDEX: tl.constexpr, SUMS: tl.constexpr,
    COLUMNS: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr,
):
    """A program has cell_rows x cell_columns logits, and writes each once, in one order of additions.

    It goes down the rows of the target that these were blended into, COLUMNS columns that are enough for its logits,
    and folds them onto rows of logits; each of these is then folded along the row. WIDE: one logit to a program, which
    was blended into more columns than that, and takes them COLUMNS at a time.
    """
    column_tiles = tl.cdiv(z_columns, cell_columns)
    tiles = tl.cdiv(z_rows, cell_rows) * column_tiles
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    sums += wide * SUMS
    limit = tl.load(sums)
    parts = loss_gradient(grad + wide * grad_stride, samples, sums, bce_weight, dice_weight, smooth, MEAN)

    s_plane, valid_plane = None, None
    if similarity is not None:
        s_plane = (similarity + wide * s_sample, s_row, s_column)
    if valid is not None:
        valid_plane = (valid + wide * v_sample, v_row, v_column)
    z_plane, y_plane = (logits + wide * z_sample, z_row, z_column), (target + wide * y_sample, y_row, y_column)
    planes = (z_plane, y_plane, s_plane, valid_plane)
    first_row = (tile // column_tiles * cell_rows).to(INDEX)
    last_row = tl.minimum(first_row + cell_rows, z_rows)
    first_cell = (tile % column_tiles * cell_columns).to(INDEX)
    last_cell = tl.minimum(first_cell + cell_columns, z_columns)
    top = tl.maximum(first_row - 1, 0)  # the row above takes part in the same rows of the target
    first, end = first_at(top, z_rows, rows, INDEX), first_at(last_row, z_rows, rows, INDEX)
    left, right = first_at(first_cell - 1, z_columns, columns, INDEX), first_at(last_cell, z_columns, columns, INDEX)

    cell = first_cell + tl.arange(0, CELLS).to(INDEX)
    begins = first_at(cell - 1, z_columns, columns, INDEX)  # the columns between the cell before and this one, ...
    middle = first_at(cell, z_columns, columns, INDEX)  # ... and between this one and the next
    ends = first_at(cell + 1, z_columns, columns, INDEX)
    out = gradient + wide * z_rows * z_columns + cell
    total = tl.zeros((CELLS,), tl.float32)
    for start in range(left // 4 * 4, right, COLUMNS):  # aligned: a thread's four columns are read at once
        x = start + tl.arange(0, COLUMNS).to(INDEX)
        inside = x < columns
        ways, states = pixels_from(
            first, x, (z_rows, z_columns), (s_rows, s_columns), (rows, columns), True, MAP_RESIZED, INDEX,
        )
        ahead = read_row(planes, first, x, end, inside, True, MAP_RESIZED)
        before, along = ways[0][0]  # of each column: the cell before it, and the share of the cell behind it
        is_first = x * (z_columns - 1) - before * tl.maximum(columns - 1, 1) < z_columns - 1  # behind that cell
        this_row = tl.zeros((COLUMNS,), tl.float32)
        for row in range(top, last_row):
            row_behind = tl.zeros((COLUMNS,), tl.float32)
            for y in range(first_at(row, z_rows, rows, INDEX), first_at(row + 1, z_rows, rows, INDEX)):
                down = row_weight(ways[0], states[0])
                pixels, ahead = ahead, read_row(planes, y + 1, x, end, inside, True, MAP_RESIZED)
                z, label, _, keep, states = next_pixels(
                    pixels, planes, ways, states, limit, inside, True, MAP_RESIZED, PROTECT,
                )
                slope = pixel_gradient(z, label, keep, parts, negative_weight, positive_weight - negative_weight)
                this_row += (1.0 - down) * slope
                row_behind += down * slope
            if row >= first_row:
                _, of_before, of_behind = tl.associative_scan(
                    (is_first.to(tl.int32), (1.0 - along) * this_row, along * this_row), 0, joined,
                )
                cells = last_of(of_behind, begins, middle, start) + last_of(of_before, middle, ends, start)
                if WIDE:
                    total += cells
                else:
                    tl.store(out + row * z_columns, narrow(cells, gradient.dtype.element_ty), mask=cell < last_cell)
            this_row = row_behind
    if WIDE:
        tl.store(out + first_row * z_columns, narrow(total, gradient.dtype.element_ty), mask=cell < last_cell)


@triton.jit
def first_at(element, size, resized_size, INDEX: tl.constexpr):
    """The first index of an axis, resized with align_corners, that lies at this element or behind it; or the end."""
    element, steps = tl.cast(element, INDEX), tl.maximum(size - 1, 1)
    first = (element * tl.maximum(resized_size - 1, 1) + steps - 1) // steps
    first = tl.where(element >= size, resized_size, tl.minimum(first, resized_size))
    return tl.where(element <= 0, 0, first).to(INDEX)


@triton.jit
def joined(first1, a1, b1, first2, a2, b2):
    """Sums that begin anew where `first`."""
    return first1 | first2, tl.where(first2 != 0, a2, a1 + a2), tl.where(first2 != 0, b2, b1 + b2)


@triton.jit
def last_of(running, first, end, start):
    """The running sum in the last of the columns [first, end), of those from `start` on; 0 if there are none."""
    size: tl.constexpr = running.shape[0]
    first, end = tl.maximum(first - start, 0), tl.minimum(end - start, size)
    last = tl.gather(running, tl.maximum(end - 1, 0).to(tl.int32), 0)
    return tl.where(end > first, last, 0.0)
