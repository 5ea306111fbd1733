"""Photographs as they should not be: seven kinds of disturbance in five severities, seeded.

They are applied to the photograph at its own size, before anything else, so that models of every input size see the
same one. Lengths are those of a photograph whose shorter side has 224 pixels, as ImageNet-C's have, and grow with it.
docs/evaluation.md has the scales in a table, with their sources.
"""

from __future__ import annotations

import difflib
import io
import math

import numpy as np
from PIL import Image, ImageFilter

SIDE = 224
# Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions", ICLR 2019 (ImageNet-C).
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # of values in [0, 1]
BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)
JPEG_QUALITY = (25, 18, 15, 10, 7)
# The range in which Li et al., "Benchmarking Single-Image Dehazing and Beyond", TIP 2019 (RESIDE) draw theirs.
HAZE_DENSITY = (0.6, 0.9, 1.2, 1.5, 1.8)
AIRLIGHT = 0.9
# Of our own: even steps; for light one stop each, as photographers count.
OCCLUDED_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5)
OCCLUSION_GRID = 8  # squares per side
COLOUR_GAIN = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the channel that changes most
EXPOSURE = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
PHOTONS = 1000  # that a white pixel catches at full exposure; their number varies by its square root
GAMMA = 2.2
GREY = 0.5


def perturb(image: np.ndarray, kind: str, severity: int, seed: int = 0) -> np.ndarray:
    """A disturbed copy of a photograph; deterministic in (image, kind, severity, seed).

    image: uint8 [H, W, 3]; the result likewise.
    kind: one of KINDS. severity: 1 (slight) to 5. seed: of where and how; the same one hides, tints and fogs alike at
    every severity. Blur and JPEG draw nothing.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}{hint}")
    if severity not in range(1, 6):
        raise ValueError(f"severity={severity!r}: expected 1, 2, 3, 4 or 5")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return KINDS[kind](image, severity - 1, np.random.default_rng(seed))


def perturbed(image: Image.Image, kind: str, severity: int, seed: int = 0) -> Image.Image:
    """The same for an RGB image of Pillow."""
    return Image.fromarray(perturb(np.asarray(image), kind, severity, seed))


def _occlusion(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Grey squares of a grid of 8 x 8."""
    squares = OCCLUSION_GRID**2
    hidden = np.zeros(squares, bool)
    hidden[rng.permutation(squares)[: round(OCCLUDED_SHARE[level] * squares)]] = True
    rows, columns = (np.arange(side) * OCCLUSION_GRID // side for side in image.shape[:2])
    mask = hidden.reshape(OCCLUSION_GRID, OCCLUSION_GRID)[np.ix_(rows, columns)]
    return np.where(mask[..., None], np.uint8(round(255 * GREY)), image)


def _noise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, per channel."""
    return _bytes(_values(image) + NOISE_STD[level] * _grain(image, rng))


def _blur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian."""
    sigma = BLUR_SIGMA[level] * min(image.shape[:2]) / SIDE
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def _colour(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A wrong white balance: the channels are scaled, by 1 on average."""
    angle = rng.uniform(0, 2 * math.pi)
    gain = np.cos(angle + np.array([0, 2, 4]) * math.pi / 3)  # three numbers whose sum is 0
    return _bytes(_values(image) * (1 + COLOUR_GAIN[level] * gain / np.abs(gain).max()).astype(np.float32))


def _low_light(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A shorter exposure: darker, and noisier as fewer photons are counted."""
    light = EXPOSURE[level] * _values(image) ** GAMMA
    light = light + np.sqrt(light / PHOTONS) * _grain(image, rng)
    return _bytes(light.clip(0) ** (1 / GAMMA))


def _haze(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Scattering: what is at distance d is seen by exp(-density * d), the rest is airlight. d: smooth, 0.5 to 1.5."""
    coarse = Image.fromarray(rng.uniform(0.5, 1.5, (4, 4)).astype(np.float32))
    distance = np.asarray(coarse.resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    seen = np.exp(-HAZE_DENSITY[level] * distance)[..., None]
    return _bytes(_values(image) * seen + AIRLIGHT * (1 - seen))


def _jpeg(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY[level])
    return np.array(Image.open(file).convert("RGB"))


KINDS = {
    "occlusion": _occlusion,
    "noise": _noise,
    "blur": _blur,
    "colour": _colour,
    "low_light": _low_light,
    "haze": _haze,
    "jpeg": _jpeg,
}


def _grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Standard normal [H, W, 3], constant over grains of the size of a pixel if the shorter side had 224 of them."""
    scale = min(1.0, SIDE / min(image.shape[:2]))
    counts = [max(1, round(side * scale)) for side in image.shape[:2]]
    grains = rng.standard_normal((*counts, 3), dtype=np.float32)
    rows, columns = (np.arange(side) * count // side for side, count in zip(image.shape[:2], counts, strict=True))
    return grains[rows[:, None], columns]


def _values(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.float32(255)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
