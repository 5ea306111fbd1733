"""What the similarity's forward and backward share: scores of a tile of pixels and words."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, widen
from .tensors import FLOATS, as_bytes, at_most, check, extent, index_type

# 64 pixels by 32 words are a matrix product for 8 warps, by 32 channels at a time: two steps of the tensor cores, and
# few enough that a thread holds what it needs for the norms. More words than 32 take more rounds over the pixels, which
# are in the cache by then. The next channels are on their way while these are multiplied.
PIXELS, WORDS, CHANNELS, WARPS = 64, 32, 32, 8
# Tensor cores would round fp32. Where either side has it, threads multiply, and hold their operands in registers: of
# fewer channels, and with other programs to hide the latency instead of loads ahead.
CHANNELS_FP32 = 16
# Two programs to a multiprocessor. Asked for, or the compiler spills a few registers to have room for three or four.
REGISTERS = 128
SMALLEST_SQUARE = tl.constexpr(1e-24)  # vectors shorter than 1e-12 have no direction


@triton.jit
def inverse_norm(square, NORMALIZE: tl.constexpr):
    """The factor that makes a unit vector of one with this squared norm: 0 for one without direction."""
    if NORMALIZE:
        directed = square > SMALLEST_SQUARE
        inverse = tl.where(directed, tl.div_rn(1.0, tl.sqrt_rn(tl.where(directed, square, 1.0))), 0.0)
    else:
        inverse = tl.full(square.shape, 1.0, tl.float32)
    return inverse


@triton.jit
def real_words(text_mask, mask_word, word, words):
    """Which of these words there are."""
    real = word < words
    if text_mask is not None:
        real &= tl.load(text_mask + word * mask_word, mask=real, other=0) != 0
    return real


@triton.jit
def cosines(
    visual, v_channel, v_pixel, text, t_word, t_channel, pixel, pixels, word, real, channels, NORMALIZE: tl.constexpr,
    PIXELS: tl.constexpr, WORDS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):
    """<v, u> of a tile of pixels and words, of unit vectors if NORMALIZE; and the inverse norms of pixels and words."""
    product = tl.zeros((PIXELS, WORDS), tl.float32)
    pixel_square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    word_square = tl.zeros((CHANNELS, WORDS), tl.float32)
    exists = pixel < pixels
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS).to(INDEX)
        v = tl.load(
            visual + (pixel[:, None] * v_pixel + channel[None, :] * v_channel),
            mask=exists[:, None] & (channel < channels)[None, :], other=0,
        )
        u = tl.load(  # of words that are none nothing is read: padding may hold NaN
            text + (channel[:, None] * t_channel + word[None, :] * t_word),
            mask=(channel < channels)[:, None] & real[None, :], other=0,
        )
        wide_v, wide_u = widen(v), widen(u)
        if NORMALIZE:
            pixel_square = tl.fma(wide_v, wide_v, pixel_square)
            word_square = tl.fma(wide_u, wide_u, word_square)
        if v.dtype == u.dtype and v.dtype != tl.float32 and not INTERPRETED:
            part = tl.dot(v, u)  # products of 16-bit numbers are exact in fp32
        else:
            # Words by pixels: the lanes of a warp then have neighbouring pixels, which lie beside each other in shared
            # memory, and the same words. (Neighbouring words lie in the same banks.)
            part = tl.trans(tl.dot(tl.trans(wide_u), tl.trans(wide_v), input_precision="ieee"))
        # Tensor cores truncate as they add up. The selection keeps the blocks' sums apart, to be added with rounding.
        product += tl.where(real[None, :], part, 0.0)
    inverse_v = inverse_norm(tl.sum(pixel_square, 1), NORMALIZE)
    inverse_u = inverse_norm(tl.sum(word_square, 0), NORMALIZE)
    return product * inverse_v[:, None] * inverse_u[None, :], inverse_v, inverse_u


def flat_visual(visual: Tensor) -> tuple[Tensor, tuple[int, int, int], int, int]:
    """Strides of sample, channel and pixel; channels, pixels. What has no single stride of pixels is copied once."""
    if visual.dim() == 3:
        sample, pixel, channel = visual.stride()
        return visual, (sample, channel, pixel), visual.shape[2], visual.shape[1]
    if visual.shape[2] > 1 and visual.shape[3] > 1 and visual.stride(2) != visual.shape[3] * visual.stride(3):
        visual = visual.contiguous()
    sample, channel, row, column = visual.stride()
    pixel = column if visual.shape[3] > 1 else row
    return visual, (sample, channel, pixel), visual.shape[1], visual.shape[2] * visual.shape[3]


def features(
    visual: Tensor, text: Tensor, text_mask: Tensor | None, normalize: bool,
) -> tuple[tuple, int, int, dict]:
    """The leading arguments of the kernels, samples and pixels, and their options."""
    check("visual", visual, FLOATS, (None,) * visual.dim() if visual.dim() in (3, 4) else (None,) * 4)
    visual, strides, channels, pixels = flat_visual(visual)
    check("text", text, FLOATS, (visual.shape[0], None, channels))
    samples, words = text.shape[:2]
    if text_mask is not None:
        check("text_mask", text_mask, (torch.bool,), (samples, words))
    arguments = (
        visual, *strides, text, *text.stride(),
        *((None, 0, 0) if text_mask is None else (as_bytes(text_mask), *text_mask.stride())), channels, pixels, words,
    )
    tensor_cores = visual.dtype == text.dtype != torch.float32
    largest = (channels - 1) * strides[1] + (pixels - 1) * strides[2]
    return arguments, samples, pixels, {
        "NORMALIZE": normalize, "PIXELS": PIXELS, "WORDS": WORDS,
        "CHANNELS": CHANNELS if tensor_cores else CHANNELS_FP32,
        "INDEX": index_type(largest, extent(text), pixels * max(channels, words + WORDS)), "num_warps": WARPS,
        "num_stages": 2 if tensor_cores else 1, **at_most(REGISTERS), "enable_fp_fusion": False,
    }
