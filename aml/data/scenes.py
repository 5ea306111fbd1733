"""Rendered referring scenes, written in the REFER layout: the data that need no download.

Shapes on a noisy, cluttered ground. Colours, shapes, sizes and textures repeat within a scene, so that a
sentence must be understood to find its object; objects hide parts of each other, and masks are what is seen.
A scene is a pure function of (seed, index, image_size).
"""

import json
import math
import os
import pickle
import shutil
import tempfile
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from aml.data.scene_drawing import COLOURS, SHAPES, draw_ground, draw_layer, masks_of, paint
from aml.data.scene_language import SceneObject, describe

RADII = {"small": (0.060, 0.075), "medium": (0.095, 0.115), "large": (0.145, 0.170)}  # of the picture's side
TEXTURES = ("plain", "striped", "dotted")
SPLITS = ("train", "val", "test")

_SCENES_PER_SPLIT = 1_000_000  # so that a split's scenes do not depend on the size of another
_LEAST_VISIBLE = 0.55  # part of every object that must not be hidden
_FORMAT = 1  # raise when the same seed gives other scenes


@dataclass(frozen=True)
class Reference:
    """One object to find, with sentences that each fit it alone; `kinds` says what each sentence needs."""

    target: int
    sentences: tuple[str, ...]
    kinds: tuple[str, ...]  # "attribute", "position" or "relation"


@dataclass(frozen=True)
class Scene:
    """A rendered scene: image uint8 [S, S, 3], visible masks bool [n, S, S] of its n objects, references."""

    image: np.ndarray
    masks: np.ndarray
    objects: tuple[SceneObject, ...]  # in drawing order: a later one hides an earlier one
    references: tuple[Reference, ...]


def render_scenes(
    root: str | Path, *, train: int, val: int, test: int = 0, image_size: int = 192, seed: int = 0
) -> Path:
    """Render scenes and write them as the data set "refcoco", split by "unc", for `ReferDataset(root)`.

    The folder appears complete or not at all. If it already holds the scenes asked for, nothing is done.

    Args:
        root: folder to make; it must not exist, or be empty, or hold exactly these scenes.
        train, val, test: number of images of each split (2 or 3 objects of each are referred to).
        image_size: width and height in pixels, at least 64.
        seed: not negative; the same arguments give the same files, byte for byte.

    Returns:
        `root`.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: `root` holds something else.
    """
    counts = {"train": train, "val": val, "test": test}
    least_values = {"train": 0, "val": 0, "test": 0, "seed": 0, "image_size": 64}
    for (name, least), value in zip(least_values.items(), (train, val, test, seed, image_size), strict=True):
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if sum(counts.values()) == 0 or max(counts.values()) > _SCENES_PER_SPLIT:
        raise ValueError(
            f"{counts}: expected at least one scene in all, and at most {_SCENES_PER_SPLIT} in a split"
        )
    root = Path(root)
    recipe = {"scenes": _FORMAT, **counts, "image_size": image_size, "seed": seed}
    if root.exists() and any(root.iterdir()):
        if _recipe_of(root) == recipe:
            return root
        raise FileExistsError(
            f"root={root} holds other files than these scenes: name a new folder or empty this one"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write(unfinished, counts, image_size, seed, recipe)
        unfinished.chmod(0o755)
        os.replace(unfinished, root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def render_scene(seed: int, index: int, image_size: int = 192) -> Scene:
    """The scene with number `index`: a pure function of its arguments."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    while True:  # 1.2 tries on average
        objects = _place_objects(rng)
        layers = [draw_layer(thing, image_size) for thing in objects]
        full, visible = masks_of(layers, image_size)
        if (visible.sum((1, 2)) < _LEAST_VISIBLE * full.sum((1, 2))).any():
            continue
        references = _references(objects, full, rng)
        if len(references) >= 2:
            break
    picture = draw_ground(rng, image_size)
    for thing, layer in zip(objects, layers, strict=True):
        paint(picture, thing, layer, rng)
    picture += rng.normal(0, 3, (image_size, image_size, 1))
    image = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return Scene(image, visible, tuple(objects), tuple(references))


# What is in a scene


def _place_objects(rng: np.random.Generator) -> list[SceneObject]:
    """4 to 8 objects of few shapes and colours, so that alike ones are frequent; some overlap."""
    shapes = rng.choice(SHAPES, rng.integers(2, 4), replace=False).tolist()
    colours = rng.choice(list(COLOURS), rng.integers(2, 4), replace=False).tolist()
    objects: list[SceneObject] = []
    wanted = rng.integers(4, 9)
    while len(objects) < wanted:
        size = str(rng.choice(list(RADII), p=(0.3, 0.4, 0.3)))
        radius = rng.uniform(*RADII[size])
        x, y = rng.uniform(radius + 0.01, 0.99 - radius, 2)
        gaps = [math.hypot(x - other.x, y - other.y) / (radius + other.radius) for other in objects]
        # Mostly apart; some lie partly over an earlier object.
        if gaps and min(gaps) < (0.6 if rng.random() < 0.4 else 1.0):
            continue
        objects.append(
            SceneObject(
                shape=str(rng.choice(shapes)),
                colour=str(rng.choice(colours)),
                size=size,
                texture=str(rng.choice(TEXTURES, p=(0.6, 0.2, 0.2))),
                x=float(x),
                y=float(y),
                radius=float(radius),
                angle=float(rng.uniform(-0.25, 0.25)),
            )
        )
    return objects


def _references(objects: list[SceneObject], full: np.ndarray, rng: np.random.Generator) -> list[Reference]:
    """Two or three objects, each with two or three sentences, of different kinds as far as there are some."""
    areas = full.sum((1, 2))
    shared = np.einsum("ihw,jhw->ij", full, full, dtype=np.float32, optimize=True)
    overlap = shared / np.minimum(areas[:, None], areas[None, :])
    references: list[Reference] = []
    wanted = rng.integers(2, 4)
    sentences_of = describe(objects, overlap)
    for target in rng.permutation(len(objects)).tolist():
        pairs = _mixed(sentences_of[target], rng)
        if len(pairs) >= 2:
            kinds, sentences = zip(*pairs[: rng.integers(2, 4)], strict=True)
            references.append(Reference(target, sentences, kinds))
    return references[:wanted]


def _mixed(by_kind: dict[str, list[str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    """(kind, sentence) in random order; every kind once first, and those that name a shape before others."""
    queues = []
    for kind in rng.permutation(sorted(by_kind)).tolist():
        sentences = rng.permutation(by_kind[kind]).tolist()
        queues.append([(kind, text) for text in sorted(sentences, key=lambda text: "object" in text)])
    return [pair for turn in zip_longest(*queues) for pair in turn if pair]


# How it is written


def _write(root: Path, counts: dict[str, int], image_size: int, seed: int, recipe: dict[str, Any]) -> None:
    image_folder, annotation_folder = root / "images" / "train2014", root / "refcoco"
    image_folder.mkdir(parents=True)
    annotation_folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    for split, first in zip(SPLITS, range(0, 3 * _SCENES_PER_SPLIT, _SCENES_PER_SPLIT), strict=True):
        for index in range(first, first + counts[split]):
            scene = render_scene(seed, index, image_size)
            name = f"scene_{index:012d}.png"
            Image.fromarray(scene.image).save(image_folder / name, compress_level=1)
            images.append({"id": index, "file_name": name, "height": image_size, "width": image_size})
            annotations += _annotations(scene, index)
            refs += _refs(scene, index, split, name)
    instances = {
        "info": {"description": "Rendered referring scenes", "recipe": recipe},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)],
    }
    (annotation_folder / "instances.json").write_text(json.dumps(instances))
    (annotation_folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def _annotations(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    entries = []
    for number, (thing, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        entries.append(
            {
                "id": 100 * image_id + number,
                "image_id": image_id,
                "category_id": SHAPES.index(thing.shape) + 1,
                "iscrowd": 0,
                "area": int(coco_mask.area(rle)),
                "bbox": coco_mask.toBbox(rle).tolist(),
                "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
                "attributes": asdict(thing),
            }
        )
    return entries


def _refs(scene: Scene, image_id: int, split: str, file_name: str) -> list[dict[str, Any]]:
    refs = []
    for number, reference in enumerate(scene.references):
        ref_id = 10 * image_id + number
        sentences = [
            {"sent_id": 10 * ref_id + i, "sent": text, "raw": text, "tokens": text.split(), "kind": kind}
            for i, (text, kind) in enumerate(zip(reference.sentences, reference.kinds, strict=True))
        ]
        refs.append(
            {
                "ref_id": ref_id,
                "ann_id": 100 * image_id + reference.target,
                "image_id": image_id,
                "category_id": SHAPES.index(scene.objects[reference.target].shape) + 1,
                "split": split,
                "file_name": file_name,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    return refs


def _recipe_of(root: Path) -> Any:
    try:
        return json.loads((root / "refcoco" / "instances.json").read_bytes())["info"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
