"""pixel_text_similarity: a matrix product of pixels and words whose result is reduced over the words at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import PIXELS, cosines, features, real_words
from .similarity_backward import pixel_text_similarity_backward

__all__ = ["pixel_text_similarity", "pixel_text_similarity_backward"]


@triton.jit(do_not_specialize=["words"])
def similarity_kernel(
    visual, v_sample, v_channel, v_pixel, text, t_sample, t_word, t_channel, text_mask, mask_sample, mask_word,
    channels, pixels, words, scale, out, NORMALIZE: tl.constexpr, SOFTMAX: tl.constexpr, PIXELS: tl.constexpr,
    WORDS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):
    """PIXELS pixels of a sample with all its words."""
    tiles = tl.cdiv(pixels, PIXELS)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = sample.to(tl.int64)
    visual += wide * v_sample
    text += wide * t_sample
    if text_mask is not None:
        text_mask += wide * mask_sample

    pixel = tile * PIXELS + tl.arange(0, PIXELS).to(INDEX)
    best = tl.full((PIXELS,), float("-inf"), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)  # of exp(score - best)
    undefined = tl.zeros((PIXELS,), tl.int32)
    found = tl.zeros((), tl.int32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS).to(INDEX)
        real = real_words(text_mask, mask_word, word, words)
        score, _, _ = cosines(
            visual, v_channel, v_pixel, text, t_word, t_channel, pixel, pixels, word, real, channels, NORMALIZE,
            PIXELS, WORDS, CHANNELS, INDEX,
        )
        score = tl.where(real[None, :], scale * score, float("-inf"))
        found += tl.sum(real.to(tl.int32), 0)
        undefined |= tl.max((score != score).to(tl.int32), 1)  # a maximum passes NaN by
        higher = tl.maximum(best, tl.max(score, 1))
        if SOFTMAX:
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(best - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        best = higher
    if SOFTMAX:
        result = tl.div_rn(1.0, tl.where(found > 0, total, 1.0))
    else:
        result = best
    result = tl.where(found > 0, tl.where(undefined > 0, float("nan"), result), 0.0)
    tl.store(out + wide * pixels + pixel, result, mask=pixel < pixels)


def pixel_text_similarity(
    visual: Tensor, text: Tensor, text_mask: Tensor | None, normalize: bool, scale: float, softmax: bool,
) -> Tensor:
    """One launch."""
    arguments, samples, pixels, options = features(visual, text, text_mask, normalize)
    out = visual.new_empty((samples, *visual.shape[2:]) if visual.dim() == 4 else visual.shape[:2], dtype=torch.float32)
    with torch.cuda.device_of(visual):
        similarity_kernel[(samples * triton.cdiv(pixels, PIXELS),)](*arguments, scale, out, SOFTMAX=softmax, **options)
    return out
