"""Image corruptions for robustness tests: noise, blur, occlusion, in five severities, seeded."""

from __future__ import annotations

import difflib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

# Noise and blur as in ImageNet-C (Hendrycks and Dietterich, 2019), whose images are 224 pixels wide.
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # of values in [0, 1]
BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)  # pixels per 224 of the shorter side
OCCLUDED_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5)
OCCLUSION_GRID = 8  # squares per side
GREY = 0.5

Image = TypeVar("Image", Tensor, np.ndarray)


def perturb(image: Image, kind: str, severity: int, seed: int = 0) -> Image:
    """A corrupted copy of one image; deterministic in (image size, kind, severity, seed).

    image: uint8 array [H, W, 3], or float tensor [3, H, W] in [0, 1]; the result is of the same type and shape.
    kind: "noise" (Gaussian, per pixel and channel), "blur" (Gaussian) or "occlusion" (grey squares of a grid of 8 x 8).
    severity: 1 (slight) to 5.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}{hint}")
    if severity not in range(1, 6):
        raise ValueError(f"severity={severity!r}: expected 1, 2, 3, 4 or 5")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
        changed = KINDS[kind](pixels, severity - 1, seed)
        return (changed * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if not image.is_floating_point() or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected float [3, H, W] in [0, 1], got {image.dtype} {list(image.shape)}")
    return KINDS[kind](image, severity - 1, seed)


def _noise(image: Tensor, level: int, seed: int) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image)
    return (image + NOISE_STD[level] * noise).clamp(0, 1)


def _blur(image: Tensor, level: int, seed: int) -> Tensor:
    side = min(image.shape[1:])
    sigma = BLUR_SIGMA[level] * side / 224
    radius = min(int(3 * sigma) + 1, side - 1)  # the border is mirrored, so the kernel may not reach beyond it
    return gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2).clamp(0, 1)


def _occlusion(image: Tensor, level: int, seed: int) -> Tensor:
    squares = OCCLUSION_GRID**2
    order = torch.randperm(squares, generator=torch.Generator().manual_seed(seed))
    hidden = torch.zeros(squares, dtype=torch.bool)
    hidden[order[: round(OCCLUDED_SHARE[level] * squares)]] = True
    rows, columns = (torch.arange(side) * OCCLUSION_GRID // side for side in image.shape[1:])
    mask = hidden.view(OCCLUSION_GRID, OCCLUSION_GRID)[rows][:, columns]
    return image.masked_fill(mask.to(image.device), GREY)


KINDS = {"noise": _noise, "blur": _blur, "occlusion": _occlusion}
