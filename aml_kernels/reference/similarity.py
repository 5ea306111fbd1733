"""pixel_text_similarity, defined."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .quantile import working_type

SMALLEST_NORM = 1e-12  # vectors shorter than this have no direction: similarity 0, gradient 0


def pixel_text_similarity(
    visual: Tensor, text: Tensor, text_mask: Tensor | None = None, *,
    normalize: bool = True, scale: float = 1.0, softmax: bool = False,
) -> Tensor:
    pixels = visual.flatten(2).transpose(1, 2) if visual.dim() == 4 else visual
    dtype = working_type(visual)
    pixels, words = pixels.to(dtype), text.to(dtype)
    if text_mask is not None:  # replaced before any arithmetic: padding may hold NaN
        words = words.where(text_mask[:, :, None], torch.zeros_like(words))
    if normalize:
        pixels, words = _unit(pixels), _unit(words)
    with _full_precision(visual.device.type):
        score = scale * (pixels @ words.transpose(1, 2))
    if text_mask is not None:
        score = score.masked_fill(~text_mask[:, None, :], -torch.inf)
    word = score.argmax(-1, keepdim=True)  # the first of equals
    if softmax:
        score = score.softmax(-1)
    similarity = score.gather(-1, word).squeeze(-1)
    if text_mask is not None:  # a sample without a word is similar to nothing
        similarity = similarity.where(text_mask.any(-1, keepdim=True), torch.zeros_like(similarity))
    return similarity.reshape(visual.shape[0], *visual.shape[2:]) if visual.dim() == 4 else similarity


def _full_precision(device_type: str) -> AbstractContextManager:
    """Without autocast, which would multiply in half precision; tensors without data ("meta") know none."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _unit(vectors: Tensor) -> Tensor:
    square = vectors.square().sum(-1, keepdim=True)
    has_direction = square > SMALLEST_NORM**2
    # Chosen before the root: the derivative of sqrt at 0 is infinite and would poison the gradient.
    return vectors * torch.where(has_direction, square.where(has_direction, torch.ones_like(square)).rsqrt(), 0.0)
