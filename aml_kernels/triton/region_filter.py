"""filter_regions: thresholds, weak blocks, a random choice of them, a copy of the image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantile as quantiles
from .arithmetic import narrow, widen
from .masked_loss import launch_limits
from .resize import coordinates, load_plane, load_resized
from .selection import count_digits, descend, ordered_key
from .tensors import FLOATS, as_bytes, check, check_limit, loss_index_type, plane

# 8 rows of 128 pixels, 8 pixels to a thread; where blocks are looked at, 128 columns of as many blocks as fit, and
# 4 pixels to a thread, so that what it takes to resize the map stays in registers.
TILE_ROWS, WEAK_TILE_ROWS, TILE_COLUMNS, WARPS = 8, 4, 128, 4
FILLS = 4  # channels that are copied in one launch: their colour travels with it, since copying a list would wait


@triton.jit
def philox(seed, sample, block):
    """The first word of Philox-4x32-10 for counter (block, sample, 0, 0) and key `seed`: the same on every back end."""
    x0, x1 = block.to(tl.uint64), tl.zeros_like(block).to(tl.uint64) + sample.to(tl.uint64)
    x2, x3 = tl.zeros_like(x0), tl.zeros_like(x0)
    low = tl.full((), 0xFFFFFFFF, tl.uint64)
    k0, k1 = seed.to(tl.int64).to(tl.uint64) & low, (seed.to(tl.int64).to(tl.uint64) >> 32) & low
    for _ in tl.static_range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (product1 >> 32) ^ x1 ^ k0, product1 & low, (product0 >> 32) ^ x3 ^ k1, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0.to(tl.uint32)


@triton.jit(do_not_specialize=["s_rows", "s_columns", "rows", "columns", "block_size", "seed"])
def weak_kernel(
    similarity, s_sample, s_row, s_column, s_rows, s_columns, protect, p_sample, p_row, p_column, rows, columns,
    block_size, limits, seed, weak, keys, RESIZED: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
    TILE_ROWS: tl.constexpr, INDEX: tl.constexpr,
):
    """BLOCKS blocks next to each other: whether each is weak and not protected, and its random key.

    Their columns are taken SPAN at a time.
    """
    block_columns = tl.cdiv(columns, block_size)
    groups, block_rows = tl.cdiv(block_columns, BLOCKS), tl.cdiv(rows, block_size)
    program, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    sample, block_row = program // block_rows, program % block_rows
    wide = sample.to(tl.int64)
    limit = tl.load(limits + sample)
    s_plane = (similarity + wide * s_sample, s_row, s_column)

    within = tl.arange(0, BLOCKS * SPAN)
    first_column = (group * BLOCKS + within // SPAN) * block_size
    first_row = block_row * block_size
    last_row = tl.minimum(first_row + block_size, rows)
    is_weak = tl.zeros((BLOCKS * SPAN,), tl.int32)
    guarded = is_weak
    for span in range(0, block_size, SPAN):
        offset = span + within % SPAN
        x = (first_column + offset).to(INDEX)[None, :]
        in_block = ((offset < block_size) & (first_column + offset < columns))[None, :]
        x_in_map = None
        if RESIZED:
            x_in_map = coordinates(x, s_columns, columns, False, INDEX)
        for start in range(first_row, last_row, TILE_ROWS):
            y = start + tl.arange(0, TILE_ROWS).to(INDEX)[:, None]
            inside = in_block & (y < last_row)
            if RESIZED:
                value = load_resized(s_plane, coordinates(y, s_rows, rows, False, INDEX), x_in_map, inside)
            else:
                value = widen(load_plane(s_plane, y, x, inside))
            is_weak |= tl.max((inside & (value < limit)).to(tl.int32), 0)
            if protect is not None:
                there = load_plane((protect + wide * p_sample, p_row, p_column), y, x, inside) != 0
                guarded |= tl.max(there.to(tl.int32), 0)

    is_weak = tl.max(tl.reshape(is_weak, (BLOCKS, SPAN)), 1)
    guarded = tl.max(tl.reshape(guarded, (BLOCKS, SPAN)), 1)
    column = group * BLOCKS + tl.arange(0, BLOCKS)
    block = block_row * block_columns + column
    place = wide * block_rows * block_columns + block
    tl.store(weak + place, (is_weak & (1 - guarded)).to(tl.uint8), mask=column < block_columns)
    key = philox(seed, sample, block).to(tl.int32, bitcast=True)
    tl.store(keys + place, key, mask=column < block_columns)


@triton.jit(do_not_specialize=["blocks"])
def choose_kernel(weak, keys, blocks, drop_ratio, dropped, BLOCK: tl.constexpr):
    """Of a sample's n weak blocks marks round(drop_ratio * n): those with the smallest keys, the first of equals."""
    offset = tl.program_id(0).to(tl.int64) * blocks
    weak, keys, dropped = weak + offset, keys + offset, dropped + offset
    histogram, _, _ = count_digits(keys, 1, weak, 1, 0, blocks, tl.zeros((), tl.uint32), 24, BLOCK)
    share = tl.full((), drop_ratio, tl.float32) * tl.sum(histogram, 0).to(tl.float32)
    wanted = tl.floor(share + 0.5).to(tl.int32)
    # The key of the last one to drop, and its place among equal keys.
    place, last = descend(histogram, wanted - 1, tl.zeros((), tl.uint32))
    for level in tl.static_range(3):
        histogram, _, _ = count_digits(keys, 1, weak, 1, 0, blocks, last, 16 - 8 * level, BLOCK)
        place, last = descend(histogram, place, last)
    equal_before = tl.zeros((), tl.int32)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        candidate = tl.load(weak + i, mask=i < blocks, other=0) != 0
        key = ordered_key(tl.load(keys + i, mask=i < blocks, other=0))
        equal = (candidate & (key == last)).to(tl.int32)
        drop = (candidate & (key < last)) | ((equal > 0) & (equal_before + tl.cumsum(equal, 0) - 1 <= place))
        tl.store(dropped + i, (drop & (wanted > 0)).to(tl.uint8), mask=i < blocks)
        equal_before += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["rows", "block_size", "first_channel", "last_channel"])
def copy_kernel(
    image, i_sample, i_channel, i_row, i_column, channels, rows, columns, dropped, block_size, fill0, fill1, fill2,
    fill3, first_channel, last_channel, out, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):
    """A tile of up to four channels of an image, with their fills where its block was dropped."""
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    tiles = tl.cdiv(rows, TILE_ROWS) * column_tiles
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    y = tile // column_tiles * TILE_ROWS + tl.arange(0, TILE_ROWS).to(INDEX)[:, None]
    x = tile % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS).to(INDEX)[None, :]
    inside = (y < rows) & (x < columns)
    block_rows, block_columns = tl.cdiv(rows, block_size), tl.cdiv(columns, block_size)
    dropped += wide * block_rows * block_columns
    drop = tl.load(dropped + (y // block_size * block_columns + x // block_size), mask=inside, other=0) != 0
    for channel in range(first_channel, last_channel):
        turn = channel - first_channel
        fill = tl.where(turn == 0, fill0, tl.where(turn == 1, fill1, tl.where(turn == 2, fill2, fill3)))
        data = image + wide * i_sample + tl.full((), channel, tl.int64) * i_channel
        value = load_plane((data, i_row, i_column), y, x, inside)
        value = tl.where(drop, narrow(fill, out.dtype.element_ty), value)
        tl.store(out + (wide * channels + channel) * rows * columns + (y * columns + x), value, mask=inside)


def filter_regions(
    image: Tensor, similarity: Tensor, protect: Tensor | None, thresholds: Tensor | None, threshold: float | None,
    quantile: float | None, rank_in_fp64: bool, drop_ratio: float, block_size: int, fill: list[float], seed: int,
) -> tuple[Tensor, Tensor]:
    """Four launches, and one more for every four channels beyond the first four."""
    check("image", image, (*FLOATS, torch.uint8), (None, len(fill), None, None))
    samples, channels, rows, columns = image.shape
    check("similarity", similarity, FLOATS, (samples, None, None))
    if protect is not None:
        check("protect", protect, (torch.bool,), (samples, rows, columns))
    check_limit("similarity", similarity, None, thresholds, quantile, samples)
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    block_size = min(block_size, max(rows, columns))  # the kernels step through a block, and in 32 bits
    block_rows, block_columns = triton.cdiv(rows, block_size), triton.cdiv(columns, block_size)
    blocks = block_rows * block_columns
    limits = image.new_empty(samples, dtype=torch.float32)
    weak = image.new_empty((samples, blocks), dtype=torch.uint8)
    keys = image.new_empty((samples, blocks), dtype=torch.int32)
    dropped = image.new_empty((samples, block_rows, block_columns), dtype=torch.bool)
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    span = min(triton.next_power_of_2(block_size), TILE_COLUMNS // 2)
    index = loss_index_type(similarity, protect, image)
    with torch.cuda.device_of(image):
        launch_limits(similarity, None, thresholds, threshold, quantile, rank_in_fp64, limits, None)
        weak_kernel[(samples * block_rows * triton.cdiv(block_columns, TILE_COLUMNS // span),)](
            *plane(similarity), *plane(protect)[:4], rows, columns, block_size, limits, seed, weak, keys,
            RESIZED=similarity.shape[1:] != image.shape[2:], BLOCKS=TILE_COLUMNS // span, SPAN=span,
            TILE_ROWS=WEAK_TILE_ROWS, INDEX=index, num_warps=WARPS, enable_fp_fusion=False,
        )
        choose_kernel[(samples,)](
            weak, keys, blocks, drop_ratio, as_bytes(dropped), BLOCK=quantiles.BLOCK, num_warps=quantiles.WARPS,
            enable_fp_fusion=False,
        )
        tiles = triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, TILE_COLUMNS)
        for first in range(0, channels, FILLS):
            fills = (*map(float, fill[first : first + FILLS]), 0.0, 0.0, 0.0)[:FILLS]
            copy_kernel[(samples * tiles,)](
                image, *image.stride(), channels, rows, columns, as_bytes(dropped), block_size, *fills, first,
                min(first + FILLS, channels), out, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, INDEX=index,
                num_warps=WARPS, enable_fp_fusion=False,
            )
    return out, dropped
