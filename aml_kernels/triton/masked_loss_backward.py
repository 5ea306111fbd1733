"""The gradient of masked_loss in the logits: one launch, everything but the sums computed again."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .loss import kept, load_logits, loss_gradient, pixel_gradient
from .resize import coordinates, load_plane
from .tensors import check, check_loss, loss_index_type, plane

# As in the forward.
TILE_ROWS, TILE_COLUMNS, TILES, WARPS = 8, 128, 4, 4
# Logits of another size: a program has up to 16 x 32 of them, and goes through the target's pixels that they were
# blended into 16 x 32 at a time, 4 to a thread; both are operands of matrix products, which want multiples of 16.
CELL_ROWS, CELL_COLUMNS, PIXEL_ROWS, PIXEL_COLUMNS = 16, 32, 16, 32
PROGRAM_ROWS = TILE_ROWS * TILES
LARGEST_WINDOW = 192  # pixels in a direction that a program may go through: else there are few programs
SUMS = 7


@triton.jit
def load_pixel_gradient(
    z_plane, y_plane, s_plane, valid_plane, y, x, y_in_map, x_in_map, y_in_logits, x_in_logits, inside, limit, parts,
    negative_weight, weight_step, PROTECT: tl.constexpr, RESIZED: tl.constexpr, MAP_RESIZED: tl.constexpr,
):
    """The gradient in the logit at each of the target's pixels; exactly 0 at those left out."""
    exists = inside
    if valid_plane is not None:
        exists &= load_plane(valid_plane, y, x, inside) != 0
    label = widen(load_plane(y_plane, y, x, inside))
    z = load_logits(z_plane, y, x, y_in_logits, x_in_logits, inside, RESIZED)
    keep = kept(label, exists, s_plane, y, x, y_in_map, x_in_map, limit, inside, MAP_RESIZED, PROTECT)
    z, label = tl.where(keep, z, 0.0), tl.where(keep, label, 0.0)
    return tl.where(keep, pixel_gradient(z, label, parts, negative_weight, weight_step), 0.0)


@triton.jit(do_not_specialize=["samples", "s_rows", "s_columns", "rows", "grad_stride"])
def backward_kernel(
    logits, z_sample, z_row, z_column, target, y_sample, y_row, y_column,
    similarity, s_sample, s_row, s_column, s_rows, s_columns, valid, v_sample, v_row, v_column,
    samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth,
    grad, grad_stride, sums, gradient,
    PROTECT: tl.constexpr, MAP_RESIZED: tl.constexpr, MEAN: tl.constexpr, INDEX: tl.constexpr, SUMS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, PROGRAM_ROWS: tl.constexpr,
):
    """Logits of the target's size: a tile of columns of PROGRAM_ROWS rows."""
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    tiles = tl.cdiv(rows, PROGRAM_ROWS) * column_tiles
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    incoming = tl.load(grad + wide * grad_stride)
    if MEAN:
        incoming = tl.div_rn(incoming, samples.to(tl.float32))
    parts = loss_gradient(incoming, sums + wide * SUMS, bce_weight, dice_weight, smooth)
    limit = tl.load(sums + wide * SUMS)

    z_plane = (logits + wide * z_sample, z_row, z_column)
    y_plane = (target + wide * y_sample, y_row, y_column)
    out_plane = gradient + wide * rows * columns
    s_plane, valid_plane, x_in_map = None, None, None
    x = tile % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(INDEX)[None, :]
    if similarity is not None:
        s_plane = (similarity + wide * s_sample, s_row, s_column)
        if MAP_RESIZED:
            x_in_map = coordinates(x, s_columns, columns, False, INDEX)
    if valid is not None:
        valid_plane = (valid + wide * v_sample, v_row, v_column)

    first = tile // column_tiles * PROGRAM_ROWS
    for start in range(first, tl.minimum(first + PROGRAM_ROWS, rows), TILE_ROWS):
        y = start + tl.arange(0, TILE_ROWS).to(INDEX)[:, None]
        inside = (y < rows) & (x < columns)
        y_in_map = None
        if MAP_RESIZED:
            y_in_map = coordinates(y, s_rows, rows, False, INDEX)
        slope = load_pixel_gradient(
            z_plane, y_plane, s_plane, valid_plane, y, x, y_in_map, x_in_map, None, None, inside, limit, parts,
            negative_weight, positive_weight - negative_weight, PROTECT, False, MAP_RESIZED,
        )
        out = out_plane + (y * columns + x)
        tl.store(out, narrow(slope, gradient.dtype.element_ty), mask=inside)


@triton.jit
def window(first, last, source, destination, INDEX: tl.constexpr):
    """The destination indices that elements [first, last) of the source take part in, with align_corners.

    Index i is at i (source - 1) / (destination - 1), which must be between first - 1 and last, both exclusive.
    """
    steps = tl.maximum(source - 1, 1)
    start = tl.where(first > 0, (first - 1).to(INDEX) * (destination - 1) // steps + 1, 0)
    stop = tl.maximum((last.to(INDEX) * (destination - 1) + steps - 1) // steps, 1)
    return start.to(tl.int32), tl.where(last >= source, destination, stop).to(tl.int32)


@triton.jit
def share(cell, at):
    """How much of each cell is in the pixels at these coordinates."""
    below, above, weight = at
    return tl.where(cell == below, 1.0 - weight, 0.0) + tl.where(cell == above, weight, 0.0)


@triton.jit(do_not_specialize=[
    "samples", "z_rows", "z_columns", "s_rows", "s_columns", "rows", "columns", "grad_stride", "cell_rows",
    "cell_columns",
])
def resized_backward_kernel(
    logits, z_sample, z_row, z_column, z_rows, z_columns, target, y_sample, y_row, y_column,
    similarity, s_sample, s_row, s_column, s_rows, s_columns, valid, v_sample, v_row, v_column,
    samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth,
    grad, grad_stride, sums, gradient, cell_rows, cell_columns,
    PROTECT: tl.constexpr, MAP_RESIZED: tl.constexpr, MEAN: tl.constexpr, INDEX: tl.constexpr, SUMS: tl.constexpr,
    CELL_ROWS: tl.constexpr, CELL_COLUMNS: tl.constexpr, PIXEL_ROWS: tl.constexpr, PIXEL_COLUMNS: tl.constexpr,
):
    """Logits of another size: cell_rows x cell_columns of them gather from all pixels that they were blended into.

    The resize is z = R L C^T of the logits L, with R and C the shares of each cell in each row and column of pixels;
    its transpose takes the gradient G at the pixels to R^T G C. Each cell is written by one program, in one order.
    """
    column_tiles = tl.cdiv(z_columns, cell_columns)
    tiles = tl.cdiv(z_rows, cell_rows) * column_tiles
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    incoming = tl.load(grad + wide * grad_stride)
    if MEAN:
        incoming = tl.div_rn(incoming, samples.to(tl.float32))
    parts = loss_gradient(incoming, sums + wide * SUMS, bce_weight, dice_weight, smooth)
    limit = tl.load(sums + wide * SUMS)

    z_plane = (logits + wide * z_sample, z_row, z_column)
    y_plane = (target + wide * y_sample, y_row, y_column)
    s_plane, valid_plane = None, None
    if similarity is not None:
        s_plane = (similarity + wide * s_sample, s_row, s_column)
    if valid is not None:
        valid_plane = (valid + wide * v_sample, v_row, v_column)

    first_row, first_column = tile // column_tiles * cell_rows, tile % column_tiles * cell_columns
    last_row = tl.minimum(first_row + cell_rows, z_rows)
    last_column = tl.minimum(first_column + cell_columns, z_columns)
    top, bottom = window(first_row, last_row, z_rows, rows, INDEX)
    left, right = window(first_column, last_column, z_columns, columns, INDEX)
    cell_y = first_row + tl.arange(0, CELL_ROWS).to(INDEX)
    cell_x = first_column + tl.arange(0, CELL_COLUMNS).to(INDEX)
    cells = tl.zeros((CELL_ROWS, CELL_COLUMNS), tl.float32)
    for x_start in range(left, right, PIXEL_COLUMNS):
        x = x_start + tl.arange(0, PIXEL_COLUMNS).to(INDEX)[None, :]
        x_in_logits, x_in_map = coordinates(x, z_columns, columns, True, INDEX), None
        if MAP_RESIZED:
            x_in_map = coordinates(x, s_columns, columns, False, INDEX)
        strip = tl.zeros((CELL_ROWS, PIXEL_COLUMNS), tl.float32)
        for y_start in range(top, bottom, PIXEL_ROWS):
            y = y_start + tl.arange(0, PIXEL_ROWS).to(INDEX)[:, None]
            inside = (y < bottom) & (x < right)
            y_in_logits, y_in_map = coordinates(y, z_rows, rows, True, INDEX), None
            if MAP_RESIZED:
                y_in_map = coordinates(y, s_rows, rows, False, INDEX)
            slope = load_pixel_gradient(
                z_plane, y_plane, s_plane, valid_plane, y, x, y_in_map, x_in_map, y_in_logits, x_in_logits, inside,
                limit, parts, negative_weight, positive_weight - negative_weight, PROTECT, True, MAP_RESIZED,
            )
            row_share = share(cell_y[None, :], y_in_logits)  # [PIXEL_ROWS, CELL_ROWS]
            strip = tl.dot(tl.trans(row_share), slope, strip, input_precision="ieee")
        column_share = share(cell_x[:, None], x_in_logits)  # [CELL_COLUMNS, PIXEL_COLUMNS]
        cells = tl.dot(strip, tl.trans(column_share), cells, input_precision="ieee")
    mask = (cell_y < last_row)[:, None] & (cell_x < last_column)[None, :]
    out = gradient + wide * z_rows * z_columns + (cell_y[:, None] * z_columns + cell_x[None, :])
    tl.store(out, narrow(cells, gradient.dtype.element_ty), mask=mask)


@functools.lru_cache
def cells_per_program(source: int, destination: int, most: int, chunk: int) -> int:
    """As many cells as make for the fewest pixels per cell, of which whole chunks are computed."""
    ratio = (destination - 1) / max(source - 1, 1)
    pixels = {n: -(-(n + 1) * ratio // chunk) * chunk for n in range(1, most + 1)}
    return min((n for n in pixels if n == 1 or pixels[n] <= LARGEST_WINDOW), key=lambda n: (pixels[n] / n, -n))


def masked_loss_backward(
    grad: Tensor, logits: Tensor, target: Tensor, similarity: Tensor | None, valid: Tensor | None, sums: Tensor,
    protect_target: bool, bce_weight: float, dice_weight: float, negative_weight: float, positive_weight: float,
    smooth: float, reduction: int,
) -> Tensor:
    """One launch."""
    samples, rows, columns = target.shape
    check_loss(logits, target, similarity, valid)
    check("sums", sums, (torch.float32,), (samples, SUMS))
    check("grad", grad, (torch.float32,), (samples,) if reduction == 2 else ())
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    sums = sums.contiguous()
    z_rows, z_columns = logits.shape[-2:]
    resized = (z_rows, z_columns) != (rows, columns)
    arguments = (
        *plane(target)[:4], *plane(similarity), *plane(valid)[:4], samples, rows, columns, bce_weight, dice_weight,
        negative_weight, positive_weight, smooth, grad, grad.stride(0) if reduction == 2 else 0, sums, gradient,
    )
    options = {
        "PROTECT": protect_target, "MEAN": reduction == 0, "SUMS": SUMS,
        "INDEX": loss_index_type(logits, target, similarity, valid), "num_warps": WARPS, "enable_fp_fusion": False,
        "MAP_RESIZED": similarity is not None and similarity.shape[-2:] != target.shape[-2:],
    }
    with torch.cuda.device_of(logits):
        if not resized:
            tiles = triton.cdiv(rows, PROGRAM_ROWS) * triton.cdiv(columns, TILE_COLUMNS)
            backward_kernel[(samples * tiles,)](
                *plane(logits)[:4], *arguments, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS,
                PROGRAM_ROWS=PROGRAM_ROWS, **options,
            )
        else:
            cell_rows = cells_per_program(z_rows, rows, CELL_ROWS, PIXEL_ROWS)
            cell_columns = cells_per_program(z_columns, columns, CELL_COLUMNS, PIXEL_COLUMNS)
            tiles = triton.cdiv(z_rows, cell_rows) * triton.cdiv(z_columns, cell_columns)
            resized_backward_kernel[(samples * tiles,)](
                *plane(logits), *arguments, cell_rows, cell_columns, CELL_ROWS=CELL_ROWS, CELL_COLUMNS=CELL_COLUMNS,
                PIXEL_ROWS=PIXEL_ROWS, PIXEL_COLUMNS=PIXEL_COLUMNS, num_stages=1, **options,
            )
    return gradient
