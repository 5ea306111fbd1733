"""From photograph and sentence to mask and overlay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from aml import checkpoint, config
from aml.models import build_model
from aml.predict import load_model, load_photo, overlay, predict, save_mask, save_overlay


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("compact", image_size=64, pretrained=False, backbone="resnet18", layers=1, dim=64).eval()


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_mask_and_probability_have_the_photographs_size(model, photo, tmp_path):
    mask, probability = predict(model, photo, "the red dog")
    assert mask.shape == probability.shape == (50, 70)
    assert mask.dtype == bool and probability.dtype == np.float32
    assert np.array_equal(mask, probability > 0.5)
    photo.save(tmp_path / "photo.png")
    assert np.array_equal(predict(model, tmp_path / "photo.png", "the red dog")[1], probability)
    assert not np.array_equal(predict(model, photo, "sky")[1], probability)


def test_a_checkpoint_gives_the_same_prediction(model, photo, tmp_path):
    settings = config.load(None, ["model.image_size=64", "model.backbone=resnet18", "model.layers=1", "model.dim=64"])
    checkpoint.save(
        tmp_path,
        1,
        weights={"model": model.state_dict()},
        optimizer={},
        ranks=[],
        state={},
        config=config.to_yaml(settings),
        keep=1,
        best_step=1,
    )
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert np.array_equal(predict(loaded, photo, "the dog")[1], predict(model, photo, "the dog")[1])
    with pytest.raises(checkpoint.CheckpointError, match="not a complete checkpoint"):
        load_model(tmp_path / "nothing")


def test_photographs_are_turned_upright_and_converted(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo.convert("L").save(tmp_path / "turned.jpg", exif=exif)
    upright = load_photo(tmp_path / "turned.jpg")
    assert upright.size == (50, 70) and upright.mode == "RGB"


def test_unreadable_input_is_named(model, photo, tmp_path):
    (tmp_path / "photo.jpg").write_text("no image")
    with pytest.raises(OSError, match=r"photo\.jpg is not an image"):
        load_photo(tmp_path / "photo.jpg")
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        load_photo(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="sentence='  '"):
        predict(model, photo, "  ")


def test_saved_mask_and_overlay(photo, tmp_path):
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:50] = True
    save_mask(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as saved:
        assert np.array_equal(np.asarray(saved), mask * np.uint8(255))
    save_overlay(
        tmp_path / "overlay.png", photo, mask, "a sentence that is too long for one line of so small a picture"
    )
    with Image.open(tmp_path / "overlay.png") as saved:
        assert saved.width == 70 and saved.height > 50 + 2 * 12  # the caption takes several lines below
    plain = np.asarray(overlay(photo, mask)).astype(int)
    original = np.asarray(photo).astype(int)
    assert plain.shape == original.shape
    assert plain[~mask].mean() < 0.8 * original[~mask].mean()  # what is not meant is dark
    assert (plain[15:25, 25:45, 0] >= plain[15:25, 25:45, 1]).mean() > (
        original[15:25, 25:45, 0] >= original[15:25, 25:45, 1]
    ).mean()
    with pytest.raises(ValueError, match=r"expected \[50, 70\]"):
        overlay(photo, mask.T)
