"""Seven kinds of disturbance: seeded, stronger by severity, and as strong as they say."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aml import perturbations
from aml.commands import options
from aml.perturbations import KINDS, perturb, perturbed

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"


def picture(height=120, width=180):
    """Smooth colours, an edge, and fine texture: something for every kind."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([120 + 80 * np.sin(rows / 30), 90 + 60 * np.cos(columns / 25), 100 + rows / 4], axis=-1)
    smooth[30:60, 40:90] = (210, 60, 40)
    return (smooth + np.random.default_rng(0).normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_disturbances_grow_with_severity_and_repeat(kind):
    image = picture()
    before, distance = image.copy(), []
    for severity in range(1, 6):
        changed = perturb(image, kind, severity, seed=5)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        assert np.array_equal(changed, perturb(image, kind, severity, seed=5))
        assert np.array_equal(np.asarray(perturbed(Image.fromarray(image), kind, severity, seed=5)), changed)
        distance.append(np.square(changed.astype(float) - image).mean())
    assert np.array_equal(image, before)
    assert distance[0] > 1 and all(low < high for low, high in zip(distance, distance[1:], strict=False))
    drawn = not np.array_equal(perturb(image, kind, 3, seed=5), perturb(image, kind, 3, seed=6))
    assert drawn == (kind not in ("blur", "jpeg"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_copy_of_a_photograph_suffers_alike(kind):
    """Lengths grow with the photograph; only JPEG's blocks have a size of their own."""
    if kind == "jpeg":
        pytest.skip("JPEG's blocks are of 8 pixels in every photograph")
    image = picture(224, 300)
    large = np.asarray(Image.fromarray(image).resize((600, 448), Image.Resampling.NEAREST))
    small, shrunk = (perturb(each, kind, 3, seed=2).astype(float) for each in (image, large))
    shrunk = shrunk.reshape(224, 2, 300, 2, 3).mean((1, 3))
    change = np.abs(small - image).mean()
    assert np.abs(small - shrunk).mean() < 0.1 * change


def test_strengths_are_those_stated():
    grey = np.full((224, 224, 3), 128, np.uint8)
    for level in range(5):
        hidden = (perturb(np.zeros((64, 128, 3), np.uint8), "occlusion", level + 1, seed=1) > 0).mean()
        assert hidden == pytest.approx(perturbations.OCCLUDED_SHARE[level], abs=1 / 64)
        if level < 3:  # beyond, values are cut off at black and white
            spread = (perturb(grey, "noise", level + 1) / 255).std()
            assert spread == pytest.approx(perturbations.NOISE_STD[level], rel=0.01)
        channels = perturb(grey, "colour", level + 1, seed=3).mean((0, 1)) / 128
        assert np.abs(channels - 1).max() == pytest.approx(perturbations.COLOUR_GAIN[level], abs=0.005)
        assert channels.mean() == pytest.approx(1, abs=0.005)
        light = (perturb(grey, "low_light", level + 1) / 255.0) ** perturbations.GAMMA
        full = (128 / 255) ** perturbations.GAMMA
        assert light.mean() / full == pytest.approx(perturbations.EXPOSURE[level], rel=0.05)
        assert light.std() == pytest.approx((perturbations.EXPOSURE[level] * full / 1000) ** 0.5, rel=0.1)
        black = perturb(np.zeros((60, 80, 3), np.uint8), "haze", level + 1) / 255  # what is seen is the air
        seen = 1 - black / perturbations.AIRLIGHT
        density = perturbations.HAZE_DENSITY[level]
        assert np.exp(-1.5 * density) - 0.01 < seen.min() < seen.max() < np.exp(-0.5 * density) + 0.01


def test_blur_is_gaussian_of_the_stated_width():
    image = np.zeros((224, 224, 3), np.uint8)
    image[:, 112:] = 255
    for severity, sigma in enumerate(perturbations.BLUR_SIGMA, start=1):
        edge = np.diff(perturb(image, "blur", severity)[100, :, 0].astype(float)) / 255
        place = np.arange(len(edge))
        width = np.sqrt((edge * (place - (edge * place).sum()) ** 2).sum())
        assert width == pytest.approx(sigma, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((8, 8, 3), np.uint8), "nois", 1), "kind='nois'.*did you mean 'noise'"),
        ((np.zeros((8, 8, 3), np.uint8), "noise", 0), "severity=0"),
        ((np.zeros((8, 8), np.uint8), "noise", 1), r"expected uint8 \[H, W, 3\]"),
        ((np.zeros((8, 8, 3), np.float32), "noise", 1), r"expected uint8 \[H, W, 3\], got float32"),
    ],
)
def test_wrong_images_and_kinds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        perturb(*arguments)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7)])
def test_photographs_of_any_shape(size):
    for kind in KINDS:
        assert perturb(np.full((*size, 3), 90, np.uint8), kind, 5).shape == (*size, 3)


def test_the_command_line_and_the_page_have_the_same_kinds_and_scales():
    assert options.KINDS == tuple(KINDS)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE))
    assert list(rows) == list(KINDS)
    scales = (
        perturbations.OCCLUDED_SHARE, perturbations.NOISE_STD, perturbations.BLUR_SIGMA, perturbations.COLOUR_GAIN,
        perturbations.EXPOSURE, perturbations.HAZE_DENSITY, perturbations.JPEG_QUALITY,
    )  # fmt: skip
    for kind, scale in zip(KINDS, scales, strict=True):
        stated = re.search(r"([\d./]+(?:, [\d./]+){4})", rows[kind]).group(1).split(", ")
        numbers = [float(a) / float(b or 1) for a, _, b in (text.partition("/") for text in stated)]
        assert numbers == pytest.approx(list(scale)), kind
