"""masked_loss: one launch for thresholds, one for everything else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantile as quantiles
from .arithmetic import widen
from .loss import cross_entropy, kept, load_logits, sigmoid
from .masked_loss_backward import masked_loss_backward
from .resize import coordinates, load_plane
from .selection import select_quantile
from .tensors import as_bytes, check_limit, check_loss, loss_index_type, plane

__all__ = ["masked_loss", "masked_loss_backward"]

# 8 rows of 128 pixels are 8 pixels to each thread of 4 warps: 16 bytes of 16-bit logits. Logits of another size come
# from the cache, four to a pixel; 4 pixels to a thread leave room in its registers for that. 32 rows to a program are
# work enough to pay for its coordinates of columns and its final sums, and leave several programs to a multiprocessor.
TILE_ROWS, RESIZED_TILE_ROWS, TILE_COLUMNS, PROGRAM_ROWS, WARPS = 8, 4, 128, 32, 4
RUN = 4  # pixels in one thread that are added up before they are added to what it keeps
PARTIALS = 128  # that the last program of a sample adds up at a time
MEAN, SUM, NONE = (tl.constexpr(i) for i in range(3))
SUMS, COUNTS = 7, 4


@triton.jit(do_not_specialize=["room"])
def limits_kernel(
    similarity, sample_stride, stride, map_valid, valid_sample_stride, valid_stride, count, quantile, thresholds,
    thresholds_stride, threshold, found, room, out, out_stride, tickets, RANK_IN_FP64: tl.constexpr,
    SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The threshold of a sample into `out`; and tickets for the programs of the next launch."""
    sample = tl.program_id(0)
    wide = sample.to(tl.int64)
    if quantile is not None:
        values, valid = similarity + wide * sample_stride, map_valid
        if map_valid is not None:
            valid = map_valid + wide * valid_sample_stride
        if found is not None:
            found += wide * room
        q = tl.full((), quantile, tl.float32)
        limit = select_quantile(
            values, stride, valid, valid_stride, count, q, found, room, 0, RANK_IN_FP64, SAMPLE, BLOCK,
        )
    elif thresholds is not None:
        limit = tl.load(thresholds + wide * thresholds_stride)
    elif threshold is not None:
        limit = tl.full((), threshold, tl.float32)
    else:
        limit = tl.full((), float("-inf"), tl.float32)
    tl.store(out + wide * out_stride, limit)
    if tickets is not None:
        tl.store(tickets + 1 + sample, 0)
        if sample == 0:
            tl.store(tickets, 0)


@triton.jit(do_not_specialize=["samples", "z_rows", "z_columns", "s_rows", "s_columns", "rows"])
def forward_kernel(
    logits, z_sample, z_row, z_column, z_rows, z_columns, target, y_sample, y_row, y_column,
    similarity, s_sample, s_row, s_column, s_rows, s_columns, valid, v_sample, v_row, v_column,
    samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth,
    loss, sums, counts, partial_sums, partial_counts, sample_losses, tickets,
    PROTECT: tl.constexpr, RESIZED: tl.constexpr, MAP_RESIZED: tl.constexpr, REDUCTION: tl.constexpr,
    INDEX: tl.constexpr, SUMS: tl.constexpr, COUNTS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr, PARTIALS: tl.constexpr, RUN: tl.constexpr,
):
    """Sums over PROGRAM_ROWS x TILE_COLUMNS pixels. A sample's last program finishes it, the last of these the loss."""
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    parts = tl.cdiv(rows, PROGRAM_ROWS) * column_tiles
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    wide = sample.to(tl.int64)
    sums += wide * SUMS
    limit = tl.load(sums)
    weight_step = positive_weight - negative_weight

    z_plane = (logits + wide * z_sample, z_row, z_column)
    y_plane = (target + wide * y_sample, y_row, y_column)
    s_plane, x_in_map, x_in_logits = None, None, None
    x = part % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(INDEX)[None, :]
    if similarity is not None:
        s_plane = (similarity + wide * s_sample, s_row, s_column)
        if MAP_RESIZED:
            x_in_map = coordinates(x, s_columns, columns, False, INDEX)
    if RESIZED:
        x_in_logits = coordinates(x, z_columns, columns, True, INDEX)

    bce_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS // RUN), tl.float32)
    p_sum, y_sum, py_sum = bce_sum, bce_sum, bce_sum
    packed = tl.zeros((TILE_ROWS, TILE_COLUMNS // RUN), tl.int32)  # five counts of at most PROGRAM_ROWS
    first = part // column_tiles * PROGRAM_ROWS
    for start in range(first, tl.minimum(first + PROGRAM_ROWS, rows), TILE_ROWS):
        y = start + tl.arange(0, TILE_ROWS).to(INDEX)[:, None]
        inside = (y < rows) & (x < columns)
        y_in_map, y_in_logits = None, None
        if MAP_RESIZED:
            y_in_map = coordinates(y, s_rows, rows, False, INDEX)
        if RESIZED:
            y_in_logits = coordinates(y, z_rows, rows, True, INDEX)
        exists = inside
        if valid is not None:
            exists &= load_plane((valid + wide * v_sample, v_row, v_column), y, x, inside) != 0
        label = widen(load_plane(y_plane, y, x, inside))
        z = load_logits(z_plane, y, x, y_in_logits, x_in_logits, inside, RESIZED)
        keep = kept(label, exists, s_plane, y, x, y_in_map, x_in_map, limit, inside, MAP_RESIZED, PROTECT)

        is_target, predicted = exists & (label > 0.5), exists & (z > 0)
        # Selected before any arithmetic: a left-out pixel may hold NaN.
        z, label = tl.where(keep, z, 0.0), tl.where(keep, label, 0.0)
        e, _, p = sigmoid(z)
        p = tl.where(keep, p, 0.0)
        weight = tl.where(keep, tl.fma(label, weight_step, negative_weight), 0.0)
        bce_sum += add_runs(weight * cross_entropy(z, label, e), RUN)
        p_sum += add_runs(p, RUN)
        y_sum += add_runs(label, RUN)
        py_sum += add_runs(p * label, RUN)
        bad = ~((label >= 0) & (label <= 1))
        packed += add_runs(
            keep.to(tl.int32) + ((keep & is_target).to(tl.int32) << 6) + ((predicted & is_target).to(tl.int32) << 12)
            + ((predicted | is_target).to(tl.int32) << 18) + (bad.to(tl.int32) << 24), RUN,
        )

    own = (wide * parts + part)
    tl.store(partial_sums + own * 4, tl.sum(bce_sum))
    tl.store(partial_sums + own * 4 + 1, tl.sum(p_sum))
    tl.store(partial_sums + own * 4 + 2, tl.sum(y_sum))
    tl.store(partial_sums + own * 4 + 3, tl.sum(py_sum))
    for field in tl.static_range(5):
        tl.store(partial_counts + own * 5 + field, tl.sum((packed >> (6 * field)) & 63))

    tl.debug_barrier()  # all of the program has stored, before its ticket says so
    if tl.atomic_add(tickets + 1 + sample, 1, sem="acq_rel") == parts - 1:
        one = finish_sample(
            partial_sums + wide * parts * 4, partial_counts + wide * parts * 5, parts, sums, counts + wide * COUNTS,
            bce_weight, dice_weight, negative_weight, weight_step, smooth, PARTIALS,
        )
        if REDUCTION == NONE:
            tl.store(loss + sample, one)
        else:
            tl.store(sample_losses + sample, one)
            tl.debug_barrier()
            if tl.atomic_add(tickets, 1, sem="acq_rel") == samples - 1:
                total = tl.zeros((PARTIALS,), tl.float32)
                for start in range(0, samples, PARTIALS):
                    i = start + tl.arange(0, PARTIALS)
                    total += tl.load(sample_losses + i, mask=i < samples, other=0.0, cache_modifier=".cg")
                result = tl.sum(total)
                tl.store(loss, tl.div_rn(result, samples.to(tl.float32)) if REDUCTION == MEAN else result)


@triton.jit
def add_runs(x, RUN: tl.constexpr):
    """Sums of RUN neighbours, which are in one thread."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // RUN, RUN)), 2)


@triton.jit
def finish_sample(
    partial_sums, partial_counts, parts, sums, counts, bce_weight, dice_weight, negative_weight, weight_step, smooth,
    PARTIALS: tl.constexpr,
):
    """Adds the partial sums in their order, whoever computed them; stores sums and counts; returns the loss."""
    weighted_bce = add_up(partial_sums, 4, parts, PARTIALS)
    p = add_up(partial_sums + 1, 4, parts, PARTIALS)
    y = add_up(partial_sums + 2, 4, parts, PARTIALS)
    py = add_up(partial_sums + 3, 4, parts, PARTIALS)
    count = add_up(partial_counts, 5, parts, PARTIALS)
    tl.store(counts, count)
    for field in tl.static_range(1, 4):
        tl.store(counts + field, add_up(partial_counts + field, 5, parts, PARTIALS))
    weight = tl.fma(weight_step, y, negative_weight * count.to(tl.float32))
    bce = tl.where(weight > 0, tl.div_rn(weighted_bce, tl.where(weight > 0, weight, 1.0)), 0.0)
    # 1 - (2 py + smooth) / (p + y + smooth), with less cancellation.
    dice = tl.div_rn((p - py) + (y - py), p + y + smooth)
    dice = tl.where(count > 0, dice, 0.0)
    tl.store(sums + 1, bce)
    tl.store(sums + 2, dice)
    tl.store(sums + 3, weight)
    tl.store(sums + 4, p)
    tl.store(sums + 5, y)
    tl.store(sums + 6, py)
    bad = add_up(partial_counts + 4, 5, parts, PARTIALS) > 0
    return tl.where(bad, float("nan"), bce_weight * bce + dice_weight * dice)


@triton.jit
def add_up(partials, stride, parts, PARTIALS: tl.constexpr):
    """The sum of a column, as int64 for counts. Read past the L1 cache: other programs wrote it.

    Of an image of 2^31 pixels a lane adds up thousands of much the same numbers, whose roundings all have one sign:
    what a sum in fp32 loses is added to the next number (Kahan), unless that sum is infinite.
    """
    i = tl.arange(0, PARTIALS)
    if partials.dtype.element_ty == tl.int32:
        total = tl.zeros((PARTIALS,), tl.int64)
        for start in range(0, parts, PARTIALS):
            total += load_partials(partials, stride, start + i, parts)
    else:
        total = tl.zeros((PARTIALS,), tl.float32)
        excess = total
        for start in range(0, parts, PARTIALS):
            part = load_partials(partials, stride, start + i, parts) - excess
            higher = total + part
            excess = tl.where(tl.abs(higher) < float("inf"), (higher - total) - part, 0.0)
            total = higher
    return tl.sum(total, 0)


@triton.jit
def load_partials(partials, stride, i, parts):
    return tl.load(partials + i.to(tl.int64) * stride, mask=i < parts, other=0, cache_modifier=".cg")


def masked_loss(
    logits: Tensor, target: Tensor, similarity: Tensor | None, valid: Tensor | None, map_valid: Tensor | None,
    thresholds: Tensor | None, threshold: float | None, quantile: float | None, rank_in_fp64: bool,
    protect_target: bool, bce_weight: float, dice_weight: float, negative_weight: float, positive_weight: float,
    smooth: float, reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_loss(logits, target, similarity, valid)
    check_limit("similarity", similarity, map_valid, thresholds, quantile, len(logits))
    samples, rows, columns = target.shape
    resized = logits.shape[-2:] != target.shape[-2:]
    sums = logits.new_empty((samples, SUMS), dtype=torch.float32)
    counts = logits.new_empty((samples, COUNTS), dtype=torch.int64)
    loss = logits.new_empty((samples,) if reduction == NONE else (), dtype=torch.float32)
    tickets = logits.new_empty(samples + 1, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        launch_limits(similarity, map_valid, thresholds, threshold, quantile, rank_in_fp64, sums[:, 0], tickets)
        parts = triton.cdiv(rows, PROGRAM_ROWS) * triton.cdiv(columns, TILE_COLUMNS)
        forward_kernel[(samples * parts,)](
            *plane(logits), *plane(target)[:4], *plane(similarity), *plane(valid)[:4],
            samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth, loss, sums,
            counts, sums.new_empty(samples * parts * 4), tickets.new_empty(samples * parts * 5),
            sums.new_empty(samples), tickets, PROTECT=protect_target, RESIZED=resized,
            MAP_RESIZED=similarity is not None and similarity.shape[-2:] != target.shape[-2:], REDUCTION=reduction,
            INDEX=loss_index_type(logits, target, similarity, valid), SUMS=SUMS, COUNTS=COUNTS,
            TILE_ROWS=RESIZED_TILE_ROWS if resized else TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS,
            PROGRAM_ROWS=PROGRAM_ROWS, PARTIALS=PARTIALS, RUN=RUN, num_warps=WARPS, enable_fp_fusion=False,
        )
    return loss, sums, counts


def launch_limits(similarity, map_valid, thresholds, threshold, quantile, rank_in_fp64, out, tickets) -> None:
    """The samples' thresholds into `out [B]`. A map that cannot be seen as `[B, N]` is copied once.

    One program selects from a sample's map however large that is, since several would need more launches. Estimated
    from its instructions, a cell of a large map takes it a third of a clock (see quantile.DIRECT), for all samples at
    once, in which a GPU reads some 600 bytes; the similarity of that cell took 2 bytes of each of hundreds of channels,
    for each sample. A map of 480 x 480 is 50 microseconds, where counting the digits of all its values would be 500.
    """
    samples, values, valid, found, room = len(out), None, None, None, 0
    if quantile is not None:
        values = similarity.reshape(samples, -1)
        valid = None if map_valid is None else as_bytes(map_valid).reshape(samples, -1)
        found, room = quantiles.room_for_keys(values)
    limits_kernel[(samples,)](
        *((None, 0, 0) if values is None else (values, *values.stride())),
        *((None, 0, 0) if valid is None else (valid, *valid.stride())), 0 if values is None else values.shape[1],
        quantile, thresholds, 0 if thresholds is None else thresholds.stride(0), threshold, found, room, out,
        out.stride(0), tickets, RANK_IN_FP64=rank_in_fp64, SAMPLE=quantiles.SAMPLE, BLOCK=quantiles.BLOCK,
        num_warps=quantiles.WARPS, enable_fp_fusion=False,
    )
