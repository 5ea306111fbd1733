"""From a photograph and a sentence to a mask: load a trained model, predict, and save mask, overlay and map."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from aml import assembly, checkpoint
from aml.alignment import AlignmentLoss
from aml.alignment_scores import resized_map
from aml.config import load as load_config
from aml.data.photographs import to_rgb
from aml.data.pixels import Box, at_own_size, padded, place, resized_image
from aml.data.refs import encodable
from aml.files import appearing_whole
from aml.models import RISModel, build_model

TINT = (255, 64, 96)
TINT_STRENGTH = 0.35
BACKGROUND_LIGHT = 0.5  # of what is not meant
# From low to high similarity, in even steps: seen as such without colour vision and in print (after viridis).
MAP_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
MAP_STRENGTH = 0.65


def load_model(path: str | Path, device: torch.device | str = "cpu") -> RISModel:
    """The model of a checkpoint folder or of a run directory (its best checkpoint), in eval mode.

    Everything is in the checkpoint: neither pretrained weights nor, for the embedded text encoder, a tokenizer is read.
    Raises CheckpointError where `path` is no complete checkpoint.
    """
    folder = checkpoint.resolve(path)
    settings = load_config(folder / "config.yaml")
    model = build_model(**dataclasses.replace(settings.model, pretrained=False).options())
    model.resize = settings.data.resize
    checkpoint.load_weights(folder, model=model)
    return model.to(device).eval()


def load_aligner(path: str | Path, model: RISModel) -> AlignmentLoss:
    """What makes the similarity map of a checkpoint's model, on its device."""
    folder = checkpoint.resolve(path)
    aligner = assembly.build_aligner(load_config(folder / "config.yaml"), model)
    checkpoint.load_weights(folder, aligner=aligner)
    return aligner.to(next(model.parameters()).device).eval()


def load_photo(path: str | Path) -> Image.Image:
    """An RGB image, turned upright as its EXIF data say. Raises OSError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not an image that can be read ({error})") from error


@torch.no_grad()
def predict(model: RISModel, image: str | Path | Image.Image, sentence: str) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that a sentence is about.

    image: a file, or an upright RGB image. Returns the mask, bool [H, W], and the probability, float32 [H, W], both at
    the photograph's own size. The model's mode and device are as given: use `load_model`, or `model.eval()`.
    """
    photo = image if isinstance(image, Image.Image) else load_photo(image)
    full = _at_own_size(model(*_inputs(model, photo, sentence)), model, photo)
    return (full > 0).cpu().numpy(), full.sigmoid().cpu().numpy()


@torch.no_grad()
def predict_with_map(
    model: RISModel, aligner: AlignmentLoss, image: str | Path | Image.Image, sentence: str
) -> tuple[np.ndarray, np.ndarray]:
    """As `predict`, but the mask and, instead of the probability, the similarity of each pixel to its best word."""
    photo = image if isinstance(image, Image.Image) else load_photo(image)
    logits, features = model(*_inputs(model, photo, sentence), return_alignment=True)
    similarity = aligner.similarity(features)
    if model.resize == "letterbox":
        rows, columns = place(photo.height, photo.width, model.image_size, model.resize).slices
        similarity = resized_map(similarity, (model.image_size, model.image_size))[:, rows, columns]
    mask = (_at_own_size(logits, model, photo) > 0).cpu().numpy()
    return mask, resized_map(similarity, (photo.height, photo.width))[0].cpu().numpy()


def _inputs(model: RISModel, photo: Image.Image, sentence: str) -> tuple[Tensor, Tensor, Tensor]:
    """image [1, 3, S, S], tokens, text_mask."""
    if not sentence.strip():
        raise ValueError(f"sentence={sentence!r}: expected words that describe one object, like 'the black dog'")
    device = next(model.parameters()).device
    inside = place(photo.height, photo.width, model.image_size, model.resize)
    pixels = resized_image(photo, Box(0, 0, photo.width, photo.height), (inside.height, inside.width))
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (model.image_mean, model.image_std))
    square = torch.from_numpy(padded((pixels - mean) / std, inside, model.image_size)).to(device)
    tokens, text_mask = (tensor.to(device) for tensor in model.tokenize([encodable(sentence)]))
    return square[None], tokens, text_mask


def _at_own_size(logits: Tensor, model: RISModel, photo: Image.Image) -> Tensor:
    return at_own_size(logits[0], photo.height, photo.width, model.image_size, model.resize)


def save_mask(path: str | Path, mask: np.ndarray) -> None:
    """bool [H, W] -> a one-channel image file, 255 = the referent."""
    _save(Image.fromarray(mask.astype(np.uint8) * 255), path)


def save_map(path: str | Path, photo: Image.Image, similarity: np.ndarray, sentence: str = "") -> None:
    """A similarity map float [H, W] in colours over the photograph in grey, from its least to its greatest value."""
    _require_size("similarity", similarity, photo)
    low, high = float(similarity.min()), float(similarity.max())
    share = (similarity - low) / max(high - low, 1e-12)
    steps = np.linspace(0, 1, len(MAP_COLOURS))
    colours = np.stack([np.interp(share, steps, channel) for channel in np.transpose(MAP_COLOURS)], axis=-1)
    grey = np.asarray(photo, dtype=np.float32).mean(axis=2, keepdims=True)
    picture = Image.fromarray((MAP_STRENGTH * colours + (1 - MAP_STRENGTH) * grey).astype(np.uint8))
    _save(_captioned(picture, f"{sentence} ({low:.2f} to {high:.2f})".strip()), path)


def save_overlay(path: str | Path, photo: Image.Image, mask: np.ndarray, sentence: str = "") -> None:
    """The photograph with the mask tinted and outlined, the rest darkened, and the sentence below."""
    _save(overlay(photo, mask, sentence), path)


def overlay(photo: Image.Image, mask: np.ndarray, sentence: str = "") -> Image.Image:
    """What `save_overlay` saves. photo: RGB; mask: bool [H, W] of the same size."""
    _require_size("mask", mask, photo)
    pixels = np.asarray(photo, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    background = (0.6 * pixels + 0.4 * grey) * BACKGROUND_LIGHT
    inside = pixels * (1 - TINT_STRENGTH) + np.array(TINT, np.float32) * TINT_STRENGTH
    picture = Image.fromarray(np.where(mask[..., None], inside, background).astype(np.uint8))

    width = max(1, round(min(photo.size) / 200))
    for colour, by in (((255, 255, 255), 2 * width), (TINT, width)):
        picture.paste(colour, mask=Image.fromarray((_grown(mask, by) & ~mask).astype(np.uint8) * 255))
    return _captioned(picture, sentence) if sentence else picture


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """Pixels at most `by` rows and columns from the mask's. By sums, whose time does not grow with `by`."""
    for _ in range(2):  # along the columns, then along the rows
        sums = np.pad(mask, ((by + 1, by), (0, 0))).cumsum(0, dtype=np.int32)
        mask = (sums[2 * by + 1 :] > sums[: -2 * by - 1]).T
    return mask


def _require_size(name: str, array: np.ndarray, photo: Image.Image) -> None:
    if array.shape != (photo.height, photo.width):
        raise ValueError(f"{name}: expected [{photo.height}, {photo.width}], the photo's size, got {list(array.shape)}")


def _save(picture: Image.Image, path: str | Path) -> None:
    with appearing_whole(Path(path)) as temporary:
        picture.save(temporary)


def _captioned(picture: Image.Image, sentence: str) -> Image.Image:
    size = max(12, picture.width // 28)
    font = ImageFont.load_default(size)
    lines, draw = [""], ImageDraw.Draw(picture)
    for word in sentence.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > picture.width - 2 * size:
            lines.append(word)
        else:
            lines[-1] = longer
    height = round(size * (1.35 * len(lines) + 0.9))
    result = Image.new("RGB", (picture.width, picture.height + height), (20, 20, 24))
    result.paste(picture)
    ImageDraw.Draw(result).multiline_text(
        (size, picture.height + size * 0.45), "\n".join(lines), fill=(255, 255, 255), font=font, spacing=size * 0.35
    )
    return result
