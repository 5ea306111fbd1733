"""The gradients of pixel_text_similarity in pixels and words, which are matrix products with the same coefficients.

With c[n, j] the gradient in the score of pixel n and word j, times `scale` and both inverse norms,

    grad v_n = sum_j c[n, j] u_j - |v_n|^-2 (sum_j c[n, j] <v_n, u_j>) v_n       (the second term if `normalize`)
    grad u_j = sum_n c[n, j] v_n - |u_j|^-2 (sum_n c[n, j] <v_n, u_j>) u_j
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, widen
from .features import PIXELS, WORDS, cosines, features, inverse_norm, real_words
from .tensors import check

CHANNELS, WARPS = 32, 4  # of a tile of either gradient: 8 or 16 values to a thread
SHARE, STEP = 512, 32  # pixels whose part of the words' gradient a program adds up, and how many at a time


@triton.jit(do_not_specialize=["words"])
def coefficients_kernel(
    visual, v_sample, v_channel, v_pixel, text, t_sample, t_word, t_channel, text_mask, mask_sample, mask_word,
    channels, pixels, words, scale, grad, grad_sample, grad_pixel, coefficients, along, word_norms,
    NORMALIZE: tl.constexpr, SOFTMAX: tl.constexpr, PIXELS: tl.constexpr, WORDS: tl.constexpr,
    CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):
    """c [B, N, padded words] and the factor of v_n in its own gradient [B, N], for PIXELS pixels."""
    tiles = tl.cdiv(pixels, PIXELS)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    visual += wide * v_sample
    text += wide * t_sample
    if text_mask is not None:
        text_mask += wide * mask_sample
    padded = tl.cdiv(words, WORDS) * WORDS
    pixel = tile * PIXELS + tl.arange(0, PIXELS).to(INDEX)
    exists = pixel < pixels
    coefficients += wide * pixels * padded
    word_norms += (wide * tiles + tile) * padded  # of this program alone, for the second round

    best = tl.full((PIXELS,), float("-inf"), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)  # of exp(score - best)
    best_word = tl.full((PIXELS,), -1, tl.int32)  # the first of the best
    inverse_v = best
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS).to(INDEX)
        real = real_words(text_mask, mask_word, word, words)
        cosine, inverse_v, inverse_u = cosines(
            visual, v_channel, v_pixel, text, t_word, t_channel, pixel, pixels, word, real, channels, NORMALIZE,
            PIXELS, WORDS, CHANNELS, INDEX,
        )
        tl.store(coefficients + (pixel[:, None] * padded + word[None, :]), cosine, mask=exists[:, None])
        tl.store(word_norms + word, inverse_u)
        score = tl.where(real[None, :], scale * cosine, float("-inf"))
        highest, place = tl.max(score, 1, return_indices=True)
        best_word = tl.where(highest > best, first + place, best_word)
        higher = tl.maximum(best, highest)
        if SOFTMAX:
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(best - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        best = higher

    tl.debug_barrier()  # what follows reads what other threads have stored
    incoming = scale * tl.load(grad + wide * grad_sample + pixel * grad_pixel, mask=exists, other=0.0)
    projection = tl.zeros((PIXELS,), tl.float32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS).to(INDEX)
        real = real_words(text_mask, mask_word, word, words)
        place = coefficients + (pixel[:, None] * padded + word[None, :])
        cosine = tl.load(place, mask=exists[:, None] & real[None, :], other=0.0)
        slope = tl.where(word[None, :] == best_word[:, None], 1.0, 0.0)
        if SOFTMAX:
            share = tl.exp(scale * cosine - best[:, None])
            slope = tl.div_rn(slope - tl.div_rn(share, total[:, None]), total[:, None])
        coefficient = tl.where(real[None, :], incoming[:, None] * slope, 0.0)
        projection += tl.sum(coefficient * cosine, 1)
        coefficient *= inverse_v[:, None] * tl.load(word_norms + word)[None, :]
        tl.store(place, coefficient, mask=exists[:, None])
    own = -projection * inverse_v * inverse_v if NORMALIZE else tl.zeros((PIXELS,), tl.float32)
    tl.store(along + wide * pixels + pixel, own, mask=exists)


@triton.jit(do_not_specialize=["words"])
def visual_kernel(
    visual, v_sample, v_channel, v_pixel, text, t_sample, t_word, t_channel, text_mask, mask_sample, mask_word,
    channels, pixels, words, coefficients, along, out, out_channel, out_pixel, PIXELS: tl.constexpr,
    WORDS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):
    """PIXELS x CHANNELS of the gradient in the pixels."""
    pixel_tiles, channel_tiles = tl.cdiv(pixels, PIXELS), tl.cdiv(channels, CHANNELS)
    program, channel_tile = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    sample, tile = program // pixel_tiles, program % pixel_tiles
    wide = sample.to(tl.int64)
    padded = tl.cdiv(words, WORDS) * WORDS
    pixel = tile * PIXELS + tl.arange(0, PIXELS).to(INDEX)
    channel = channel_tile * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    if text_mask is not None:
        text_mask += wide * mask_sample
    v = widen(tl.load(
        visual + wide * v_sample + (pixel[:, None] * v_pixel + channel[None, :] * v_channel), mask=exists, other=0,
    ))
    gradient = tl.load(along + wide * pixels + pixel, mask=pixel < pixels, other=0.0)[:, None] * v
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS).to(INDEX)
        real = real_words(text_mask, mask_word, word, words)
        u = widen(tl.load(
            text + wide * t_sample + (word[:, None] * t_word + channel[None, :] * t_channel),
            mask=real[:, None] & (channel < channels)[None, :], other=0,
        ))
        coefficient = tl.load(
            coefficients + wide * pixels * padded + (pixel[:, None] * padded + word[None, :]),
            mask=(pixel < pixels)[:, None], other=0.0,
        )
        gradient = tl.dot(coefficient, u, gradient, input_precision="ieee")
    place = out + wide * pixels * channels + (pixel[:, None] * out_pixel + channel[None, :] * out_channel)
    tl.store(place, narrow(gradient, out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["words", "shares"])
def words_kernel(
    visual, v_sample, v_channel, v_pixel, channels, pixels, words, coefficients, partial, shares,
    WORDS: tl.constexpr, CHANNELS: tl.constexpr, SHARE: tl.constexpr, STEP: tl.constexpr, INDEX: tl.constexpr,
):
    """sum_n c[n, j] v_n over a share of the pixels: WORDS x CHANNELS of partial [B, shares, padded words, C]."""
    channel_tiles, word_tiles = tl.cdiv(channels, CHANNELS), tl.cdiv(words, WORDS)
    program, channel_tile = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    program, word_tile = program // word_tiles, program % word_tiles
    wide, share = (program // shares).to(tl.int64), program % shares
    padded = word_tiles * WORDS
    word = word_tile * WORDS + tl.arange(0, WORDS).to(INDEX)
    channel = channel_tile * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)
    # Channels by words: the lanes of a warp then have neighbouring words, which lie beside each other in shared memory.
    gradient = tl.zeros((CHANNELS, WORDS), tl.float32)
    for first in range(share * SHARE, tl.minimum(share * SHARE + SHARE, pixels), STEP):
        pixel = first + tl.arange(0, STEP).to(INDEX)
        v = widen(tl.load(
            visual + wide * v_sample + (pixel[None, :] * v_pixel + channel[:, None] * v_channel),
            mask=(pixel < pixels)[None, :] & (channel < channels)[:, None], other=0,
        ))
        coefficient = tl.load(
            coefficients + wide * pixels * padded + (pixel[:, None] * padded + word[None, :]),
            mask=(pixel < pixels)[:, None], other=0.0,
        )
        gradient = tl.dot(v, coefficient, gradient, input_precision="ieee")
    place = partial + ((wide * shares + share) * padded + word[None, :]) * channels
    tl.store(place + channel[:, None], gradient, mask=(channel < channels)[:, None])


@triton.jit(do_not_specialize=["words", "shares", "padded"])
def text_kernel(
    text, t_sample, t_word, t_channel, text_mask, mask_sample, mask_word, channels, words, padded, partial, shares,
    out, NORMALIZE: tl.constexpr, CHANNELS: tl.constexpr,
):
    """The gradient of one word: the shares in their order, then through its normalisation."""
    wide, word = (tl.program_id(0) // words).to(tl.int64), tl.program_id(0) % words
    real = word < words
    if text_mask is not None:
        real = tl.load(text_mask + wide * mask_sample + word.to(tl.int64) * mask_word) != 0
    text += wide * t_sample + word.to(tl.int64) * t_word
    partial += (wide * shares * padded + word) * channels
    out += (wide * words + word) * channels
    square = tl.zeros((CHANNELS,), tl.float32)
    projection = tl.zeros((CHANNELS,), tl.float32)
    if NORMALIZE:
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            u = widen(tl.load(text + channel.to(tl.int64) * t_channel, mask=real & (channel < channels), other=0))
            square = tl.fma(u, u, square)
            projection = tl.fma(u, add_shares(partial, channel, channels, shares, padded), projection)
    inverse = inverse_norm(tl.sum(square, 0), NORMALIZE)
    along = -tl.sum(projection, 0) * inverse * inverse
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        gradient = add_shares(partial, channel, channels, shares, padded)
        if NORMALIZE:
            u = widen(tl.load(text + channel.to(tl.int64) * t_channel, mask=real & (channel < channels), other=0))
            gradient = tl.fma(along, u, gradient)
        gradient = tl.where(real, gradient, 0.0)
        tl.store(out + channel, narrow(gradient, out.dtype.element_ty), mask=channel < channels)


@triton.jit
def add_shares(partial, channel, channels, shares, padded):
    total = tl.zeros(channel.shape, tl.float32)
    for share in range(0, shares):
        offset = tl.full((), share, tl.int64) * padded * channels
        total += tl.load(partial + offset + channel, mask=channel < channels, other=0.0)
    return total


def pixel_text_similarity_backward(
    grad: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None, normalize: bool, scale: float, softmax: bool,
) -> tuple[Tensor, Tensor]:
    """Four launches: coefficients, pixels, shares of the words, words."""
    arguments, samples, pixels, options = features(visual, text, text_mask, normalize)
    check("grad", grad, (torch.float32,), (samples, *visual.shape[2:]) if visual.dim() == 4 else (samples, pixels))
    grad = grad.reshape(samples, pixels)
    grad_visual = torch.empty_like(visual, memory_format=torch.contiguous_format)
    grad_text = torch.empty_like(text, memory_format=torch.contiguous_format)
    channels, words = text.shape[2], text.shape[1]
    padded = triton.cdiv(words, WORDS) * WORDS
    pixel_tiles, channel_tiles, shares = (
        triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS), triton.cdiv(pixels, SHARE),
    )
    coefficients = grad.new_empty(samples * pixels * padded)
    along = grad.new_empty(samples * pixels)
    partial = grad.new_empty(samples * shares * padded * channels)
    out_strides = (pixels, 1) if visual.dim() == 4 else (1, channels)
    tile = {"WORDS": WORDS, "CHANNELS": CHANNELS, "INDEX": options["INDEX"]}
    # Their loops are short: other programs hide the latency, not stages of a loop, which cost registers.
    launch = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
    with torch.cuda.device_of(visual):
        coefficients_kernel[(samples * pixel_tiles,)](
            *arguments, scale, grad, *grad.stride(), coefficients, along,
            grad.new_empty(samples * pixel_tiles * padded), SOFTMAX=softmax, **options,
        )
        visual_kernel[(samples * pixel_tiles * channel_tiles,)](
            *arguments, coefficients, along, grad_visual, *out_strides, PIXELS=PIXELS, **tile, **launch,
        )
        words_kernel[(samples * shares * (padded // WORDS) * channel_tiles,)](
            *arguments[:4], *arguments[-3:], coefficients, partial, shares, SHARE=SHARE, STEP=STEP,
            **tile, **launch,
        )
        text_kernel[(samples * words,)](
            *arguments[4:-3], channels, words, padded, partial, shares, grad_text, NORMALIZE=normalize,
            CHANNELS=CHANNELS * 4, **launch,
        )
    return grad_visual, grad_text
