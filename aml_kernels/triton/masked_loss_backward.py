"""The gradient of masked_loss in the logits: one launch, everything but the sums computed again."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow
from .loss import loss_gradient, next_pixels, pixel_gradient, pixels_from, read_row
from .masked_loss_gather import gather_kernel
from .tensors import at_most, check, check_loss, loss_index_type, plane

# Forward and backward: a program is one warp, goes down 128 columns row by row, and so has two rows of the map, or of
# smaller logits, to blend at a time. 4 pixels to a thread are 16 bytes of fp32, and leave registers for 14 to 32 warps,
# which hide the latency of what they read; of 16-bit logits 8 would be 16 bytes, and leave half as many. 16 rows are
# work enough to pay for the coordinates of the columns and the final sums, and are some 30 programs to a multiprocessor
# at 32 x 480 x 480. Of tiles with rows beside rows each pixel would gather from the map, a layout of single elements,
# to which Triton 3.6 then brings logits and targets as well, by way of shared memory.
COLUMNS, ROWS, WARPS = 128, 16, 1
# Logits of another size: the rows of the target that a program goes down, at least; those that its last logits share
# with the next program's are gone down twice. Of few logits to a program, each lane folds one.
GATHERED_ROWS, LEAST_CELL_ROWS, FEW_CELLS = 32, 4, 32
REGISTERS = 144  # asked for, or the compiler takes 160: 14 programs to a multiprocessor instead of 12
SUMS = 7


@triton.jit(do_not_specialize=["samples", "s_rows", "s_columns", "rows", "grad_stride"])
def backward_kernel(
    logits, z_sample, z_row, z_column, target, y_sample, y_row, y_column,
    similarity, s_sample, s_row, s_column, s_rows, s_columns, valid, v_sample, v_row, v_column,
    samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth,
    grad, grad_stride, sums, gradient,
    PROTECT: tl.constexpr, MAP_RESIZED: tl.constexpr, MEAN: tl.constexpr, INDEX: tl.constexpr, SUMS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    """Logits of the target's size: COLUMNS columns of ROWS rows."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * column_tiles
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
    x = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(INDEX)
    inside = x < columns
    first = (tile // column_tiles * ROWS).to(INDEX)
    ways, states = pixels_from(
        first, x, (0, 0), (s_rows, s_columns), (rows, columns), False, MAP_RESIZED, INDEX,
    )
    out = gradient + wide * rows * columns
    end = tl.minimum(first + ROWS, rows)
    ahead = read_row(planes, first, x, end, inside, False, MAP_RESIZED)
    for y in range(first, end):
        row, ahead = ahead, read_row(planes, y + 1, x, end, inside, False, MAP_RESIZED)
        z, label, _, keep, states = next_pixels(row, planes, ways, states, limit, inside, False, MAP_RESIZED, PROTECT)
        slope = pixel_gradient(z, label, keep, parts, negative_weight, positive_weight - negative_weight)
        tl.store(out + (y * columns + x), narrow(slope, gradient.dtype.element_ty), mask=inside)


@functools.lru_cache
def cells_across(source: int, destination: int) -> int:
    """How many logits were blended into COLUMNS columns at most, from a multiple of 4 on, whichever they are; or 0."""
    if destination <= COLUMNS:
        return min(source, COLUMNS)
    most = min(COLUMNS, (COLUMNS - 3) * (source - 1) // (destination - 1) - 1)
    return triton.cdiv(source, triton.cdiv(source, most)) if most > 0 else 0


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
    index = loss_index_type(logits, target, similarity, valid)
    options = {
        "PROTECT": protect_target, "MEAN": reduction == 0, "SUMS": SUMS, "INDEX": index, "enable_fp_fusion": False,
        "MAP_RESIZED": similarity is not None and similarity.shape[-2:] != target.shape[-2:],
    }
    with torch.cuda.device_of(logits):
        if not resized:
            tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
            backward_kernel[(samples * tiles,)](
                *plane(logits)[:4], *arguments, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS, **options,
            )
        else:
            narrow = index is tl.int32
            cell_columns = cells_across(z_columns, columns)
            cell_rows = max(LEAST_CELL_ROWS, GATHERED_ROWS * z_rows // rows) if cell_columns else 1
            tiles = triton.cdiv(z_rows, cell_rows) * triton.cdiv(z_columns, max(1, cell_columns))
            gather_kernel[(samples * tiles,)](
                *plane(logits), *arguments, cell_rows, max(1, cell_columns), COLUMNS=COLUMNS,
                CELLS=COLUMNS if cell_columns > FEW_CELLS else FEW_CELLS, WIDE=cell_columns == 0,
                num_warps=WARPS if narrow else 2 * WARPS, **at_most(REGISTERS if narrow else None), **options,
            )
    return gradient
