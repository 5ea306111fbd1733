"""From a photograph and a mask to the square that a model takes: box, resizing, colours.

Squash: the box fills the square, whatever its shape. Letterbox: it keeps its shape, in the middle; the rest is padding.
"""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZES = ("squash", "letterbox")
# Augmentation: at most this part of the picture is cut off at each side; colours change by this at most.
_LARGEST_CUT = 0.1
_COLOUR_RANGE = 0.2


class Box(NamedTuple):
    """Pixels left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def place(height: int, width: int, size: int, resize: str) -> Box:
    """Where in the square of side `size` a picture of this height and width comes to lie."""
    if resize == "squash":
        return Box(0, 0, size, size)
    longest = max(height, width)
    inner_height, inner_width = (max(1, (2 * side * size + longest) // (2 * longest)) for side in (height, width))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    return Box(left, top, left + inner_width, top + inner_height)


def resized_image(image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The box of an image as float32 [3, *size] in [0, 1]; size = (height, width); bilinear, antialiased."""
    resized = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)


def resized_mask(mask: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The box of a mask at [*size]; output i takes input floor((i + 0.5) * length / size)."""
    rows, columns = (
        first + (2 * np.arange(count) + 1) * length // (2 * count)
        for first, length, count in zip((box.top, box.left), (box.height, box.width), size, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def padded(array: np.ndarray, place: Box, size: int) -> np.ndarray:
    """An array [..., h, w] in a square of zeros, at its place; the array itself where it fills the square."""
    if array.shape[-2:] == (size, size):
        return array
    square = np.zeros((*array.shape[:-2], size, size), array.dtype)
    rows, columns = place.slices
    square[..., rows, columns] = array
    return square


def crop_around(mask: np.ndarray, rng: np.random.Generator) -> Box:
    """A random box that cuts a little off each side, but never into the target."""
    height, width = mask.shape
    left, right = rng.uniform(0, _LARGEST_CUT * width, 2).astype(int).tolist()
    top, bottom = rng.uniform(0, _LARGEST_CUT * height, 2).astype(int).tolist()
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):  # cropped like others, or the crop would tell that there is no target
        return Box(left, top, width - right, height - bottom)
    return Box(
        min(left, int(columns[0])),
        min(top, int(rows[0])),
        max(width - right, int(columns[-1]) + 1),
        max(height - bottom, int(rows[-1]) + 1),
    )


def jitter_colours(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation of float32 [3, h, w] in [0, 1]; the hue stays."""
    brightness, contrast, saturation = rng.uniform(1 - _COLOUR_RANGE, 1 + _COLOUR_RANGE, 3).astype(np.float32)
    pixels = pixels * (brightness * contrast) + pixels.mean() * brightness * (1 - contrast)
    pixels = pixels * saturation + pixels.mean(axis=0) * (1 - saturation)
    return np.clip(pixels, 0, 1)


# ------------------------------------------------------------------------------- letterbox, on the model's side


def valid_cells(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a coarser map are picture: bool [B, *size], from the pixels that are, `valid` [B, S, S].

    A cell counts if it is covered at least half as much as the fullest cell of its sample: half of it must be picture,
    and a picture narrower than a cell still has cells. For `map_valid` of `aml_kernels.masked_loss`.
    """
    covered = F.adaptive_avg_pool2d(valid.float()[:, None], size)[:, 0]
    return covered >= 0.5 * covered.amax((1, 2), keepdim=True)


def cells_of_picture(similarity: Tensor, valid: Tensor | None) -> Tensor | None:
    """`valid_cells` of a map [B, h, w]; None where there is no padding."""
    return None if valid is None else valid_cells(valid, (similarity.shape[1], similarity.shape[2]))


def at_own_size(logits: Tensor, height: int, width: int, size: int, resize: str) -> Tensor:
    """Logits [h, w] of a model's square input of side `size` as those of the photograph, [height, width].

    Bilinear with corners aligned, the convention of RIS; a letterbox's padding is cut off in between.
    """

    def scaled(map: Tensor, to: tuple[int, int]) -> Tensor:
        return F.interpolate(map[None, None].float(), to, mode="bilinear", align_corners=True)[0, 0]

    if resize == "letterbox":
        logits = scaled(logits, (size, size))[place(height, width, size, resize).slices]
    return scaled(logits, (height, width))
