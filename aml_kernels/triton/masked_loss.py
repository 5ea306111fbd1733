"""masked_loss: one launch for thresholds, one for everything else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantile as quantiles
from .loss import cross_entropy, next_pixels, pixels_from, read_row, sigmoid
from .masked_loss_backward import COLUMNS, ROWS, WARPS, masked_loss_backward
from .selection import select_quantile
from .tensors import as_bytes, at_most, check_limit, check_loss, loss_index_type, plane

__all__ = ["masked_loss", "masked_loss_backward"]

REGISTERS, RESIZED_REGISTERS = 96, 120  # asked for, or the compiler takes a few more: 21, 17 to a multiprocessor
PARTIALS = 32  # that the last program of a sample adds up at a time
MEAN, SUM, NONE = (tl.constexpr(i) for i in range(3))
SUMS, COUNTS = 7, 4


@triton.jit(do_not_specialize=["room"])
def limits_kernel(
    similarity, sample_stride, stride, map_valid, valid_sample_stride, valid_stride, count, quantile, thresholds,
    thresholds_stride, threshold, found, room, out, out_stride, tickets, RANK_IN_FP64: tl.constexpr,
    FEW: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
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
            values, stride, valid, valid_stride, count, q, found, room, 0, RANK_IN_FP64, FEW, SAMPLE, BLOCK,
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
    INDEX: tl.constexpr, SUMS: tl.constexpr, COUNTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Sums over ROWS x COLUMNS pixels. A sample's last program finishes it, the last of these the loss."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    parts = tl.cdiv(rows, ROWS) * column_tiles
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    wide = sample.to(tl.int64)
    sums += wide * SUMS
    limit = tl.load(sums)
    weight_step = positive_weight - negative_weight

    s_plane, valid_plane = None, None
    if similarity is not None:
        s_plane = (similarity + wide * s_sample, s_row, s_column)
    if valid is not None:
        valid_plane = (valid + wide * v_sample, v_row, v_column)
    z_plane, y_plane = (logits + wide * z_sample, z_row, z_column), (target + wide * y_sample, y_row, y_column)
    planes = (z_plane, y_plane, s_plane, valid_plane)
    x = part % column_tiles * COLUMNS + tl.arange(0, COLUMNS).to(INDEX)
    inside = x < columns
    first = (part // column_tiles * ROWS).to(INDEX)
    ways, states = pixels_from(
        first, x, (z_rows, z_columns), (s_rows, s_columns), (rows, columns), RESIZED, MAP_RESIZED, INDEX,
    )

    zero = tl.zeros((COLUMNS,), tl.float32)
    bce_sum, p_sum, y_sum, py_sum, least, most = zero, zero, zero, zero, zero, zero
    packed = tl.zeros((COLUMNS,), tl.int32)  # four counts of at most ROWS
    end = tl.minimum(first + ROWS, rows)
    ahead = read_row(planes, first, x, end, inside, RESIZED, MAP_RESIZED)
    for y in range(first, end):
        row, ahead = ahead, read_row(planes, y + 1, x, end, inside, RESIZED, MAP_RESIZED)
        z, label, exists, keep, states = next_pixels(
            row, planes, ways, states, limit, inside, RESIZED, MAP_RESIZED, PROTECT,
        )
        is_target, predicted = label > 0.5, z > 0
        if valid is not None:  # beside the image there is a 0 of each
            is_target, predicted = exists & is_target, exists & predicted
        packed += tl.where(keep, tl.where(is_target, 1 + (1 << 8), 1), 0)
        union = tl.where(predicted, 1 << 24, 0)
        packed += tl.where(is_target, tl.where(predicted, (1 << 16) + (1 << 24), 1 << 24), union)

        # Selected before any arithmetic: a left-out pixel may hold NaN. In its place is one that surely is not target,
        # and looks so: what it adds to each sum is exactly 0.
        z, label = tl.where(keep, z, -1000.0), tl.where(keep, label, 0.0)
        if target.dtype.element_ty != tl.uint8:
            least = tl.minimum(least, label)
        most = tl.maximum(most, label, propagate_nan=tl.PropagateNan.ALL)
        e, _, p = sigmoid(z)
        bce_sum = tl.fma(tl.fma(label, weight_step, negative_weight), cross_entropy(z, label, e), bce_sum)
        p_sum += p
        y_sum += label
        py_sum = tl.fma(p, label, py_sum)

    own = wide * parts + part
    tl.store(partial_sums + own * 4, tl.sum(bce_sum))
    tl.store(partial_sums + own * 4 + 1, tl.sum(p_sum))
    tl.store(partial_sums + own * 4 + 2, tl.sum(y_sum))
    tl.store(partial_sums + own * 4 + 3, tl.sum(py_sum))
    for field in tl.static_range(4):
        tl.store(partial_counts + own * 5 + field, tl.sum((packed >> (8 * field)) & 255))
    bad = ~((least >= 0) & (most <= 1))
    tl.store(partial_counts + own * 5 + 4, tl.sum(bad.to(tl.int32)))

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
def finish_sample(
    partial_sums, partial_counts, parts, sums, counts, bce_weight, dice_weight, negative_weight, weight_step, smooth,
    PARTIALS: tl.constexpr,
):
    """Adds the partial sums in their order, whoever computed them; stores sums and counts; returns the loss."""
    total = add_up(partial_sums, parts, 4, 4, PARTIALS)
    weighted_bce, p, y, py = of(total, 0), of(total, 1), of(total, 2), of(total, 3)
    count = add_up(partial_counts, parts, 5, 8, PARTIALS)
    field = tl.arange(0, 8)
    tl.store(counts + field, count, mask=field < 4)
    kept, bad = of(count, 0), of(count, 4) > 0
    weight = tl.fma(weight_step, y, negative_weight * kept.to(tl.float32))
    bce = tl.where(weight > 0, tl.div_rn(weighted_bce, tl.where(weight > 0, weight, 1.0)), 0.0)
    # 1 - (2 py + smooth) / (p + y + smooth), with less cancellation.
    dice = tl.div_rn((p - py) + (y - py), p + y + smooth)
    dice = tl.where(kept > 0, dice, 0.0)
    tl.store(sums + 1, bce)
    tl.store(sums + 2, dice)
    tl.store(sums + 3, weight)
    tl.store(sums + 4, p)
    tl.store(sums + 5, y)
    tl.store(sums + 6, py)
    return tl.where(bad, float("nan"), bce_weight * bce + dice_weight * dice)


@triton.jit
def of(total, field):
    """One of the sums that add_up() returned."""
    return tl.sum(tl.where(tl.arange(0, total.shape[0]) == field, total, 0), 0)


@triton.jit
def add_up(partials, parts, fields, FIELDS: tl.constexpr, PARTIALS: tl.constexpr):
    """The sums of `[parts, fields]`, as int64 for counts. Read past the L1 cache: other programs wrote them.

    Of an image of 2^31 pixels a lane adds up thousands of much the same numbers, whose roundings all have one sign:
    what a sum in fp32 loses is added to the next number (Kahan), unless that sum is infinite.
    """
    counts: tl.constexpr = partials.dtype.element_ty == tl.int32
    field = tl.arange(0, FIELDS)[None, :]
    total = tl.zeros((PARTIALS, FIELDS), tl.int64 if counts else tl.float32)
    excess = total
    for start in range(0, parts, PARTIALS):
        part = start + tl.arange(0, PARTIALS)[:, None]
        at = partials + (part.to(tl.int64) * fields + field)
        value = tl.load(at, mask=(part < parts) & (field < fields), other=0, cache_modifier=".cg")
        if counts:
            total += value
        else:
            value -= excess
            higher = total + value
            excess = tl.where(tl.abs(higher) < float("inf"), (higher - total) - value, 0.0)
            total = higher
    return tl.sum(total, 0)


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
    index = loss_index_type(logits, target, similarity, valid)
    registers = None if index is tl.int64 else RESIZED_REGISTERS if resized else REGISTERS
    sums = logits.new_empty((samples, SUMS), dtype=torch.float32)
    counts = logits.new_empty((samples, COUNTS), dtype=torch.int64)
    loss = logits.new_empty((samples,) if reduction == NONE else (), dtype=torch.float32)
    tickets = logits.new_empty(samples + 1, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        launch_limits(similarity, map_valid, thresholds, threshold, quantile, rank_in_fp64, sums[:, 0], tickets)
        parts = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
        forward_kernel[(samples * parts,)](
            *plane(logits), *plane(target)[:4], *plane(similarity), *plane(valid)[:4],
            samples, rows, columns, bce_weight, dice_weight, negative_weight, positive_weight, smooth, loss, sums,
            counts, sums.new_empty(samples * parts * 4), tickets.new_empty(samples * parts * 5),
            sums.new_empty(samples), tickets, PROTECT=protect_target, RESIZED=resized,
            MAP_RESIZED=similarity is not None and similarity.shape[-2:] != target.shape[-2:], REDUCTION=reduction,
            INDEX=index, SUMS=SUMS, COUNTS=COUNTS, COLUMNS=COLUMNS, ROWS=ROWS, PARTIALS=PARTIALS, num_warps=WARPS,
            enable_fp_fusion=False, **at_most(registers),
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
        out.stride(0), tickets, RANK_IN_FP64=rank_in_fp64, FEW=values is None or values.shape[1] <= quantiles.BLOCK,
        SAMPLE=quantiles.SAMPLE, BLOCK=quantiles.BLOCK, num_warps=quantiles.WARPS, enable_fp_fusion=False,
    )
