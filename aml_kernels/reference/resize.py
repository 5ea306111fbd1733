"""Bilinear resizing with one exact order of operations, so that every back end keeps the same pixels."""

import torch
from torch import Tensor


def resize_bilinear(image: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Resize `image [B, h, w]` to `size`: along each row, then between rows, each as `a + weight * (b - a)`.

    Agrees with `torch.nn.functional.interpolate(mode="bilinear")` up to rounding. Three things are fixed here that
    PyTorch leaves open, because a pixel is kept or left out by comparing the result with a threshold:
    coordinates come from integers (no rounding before the last division), no multiply-add is fused, and the result
    is never below the smaller of its two neighbours, so that the minimum of a map bounds its resized values. A
    neighbour of weight 0 is not looked at: NaN there stays there.
    """
    rows, columns = size
    if tuple(image.shape[1:]) == (rows, columns):
        return image
    below, above, weight = _coordinates(image.shape[2], columns, align_corners, image)
    image = _interpolate(image[:, :, below], image[:, :, above], weight)
    below, above, weight = _coordinates(image.shape[1], rows, align_corners, image)
    return _interpolate(image[:, below], image[:, above], weight[:, None])


def _interpolate(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    value, least = a + weight * (b - a), torch.where(b < a, b, a)
    value = torch.where(value < least, least, value)
    return torch.where(a.isinf() & (a == b), a, value)  # not inf - inf


def _coordinates(source: int, destination: int, align_corners: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per destination index: its two source indices and the weight of the second, as exact fractions."""
    index = torch.arange(destination, device=like.device)
    if align_corners:
        numerator, denominator = index * (source - 1), max(destination - 1, 1)
    else:
        numerator = ((2 * index + 1) * source - destination).clamp_min(0)
        denominator = 2 * destination
    below = numerator // denominator
    remainder = numerator - below * denominator
    # Without a weight, and past the last index, there is nothing to blend with: both neighbours are the same.
    above = torch.where(remainder > 0, below + 1, below).clamp_max(source - 1)
    return below, above, remainder.to(like.dtype) / denominator
