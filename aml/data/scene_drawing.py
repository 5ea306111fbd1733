"""Drawing of rendered scenes: shapes with light, texture and shadow on a cluttered ground."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from aml.data.scene_language import SceneObject

COLOURS = {
    "red": (212, 42, 40),
    "orange": (240, 132, 24),
    "yellow": (242, 212, 48),
    "green": (52, 158, 62),
    "cyan": (48, 196, 206),
    "blue": (40, 82, 204),
    "purple": (128, 58, 172),
    "pink": (244, 134, 186),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Layer:
    """A drawn shape on a window of the picture: floats [h, w] in [0, 1], and where the window lies."""

    cover: np.ndarray
    edge: np.ndarray
    shadow: np.ndarray
    window: tuple[slice, slice]


def draw_layer(thing: SceneObject, image_size: int) -> Layer:
    """Draw one object, antialiased, without its colours."""
    reach = math.ceil(thing.radius * image_size * 1.3) + 4
    left, top = (max(0, round(place * image_size) - reach) for place in (thing.x, thing.y))
    right, bottom = (min(image_size, round(place * image_size) + reach) for place in (thing.x, thing.y))
    scale = image_size * _SUPERSAMPLING
    size = ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING)
    fill, edge = Image.new("L", size), Image.new("L", size)
    pen, edge_pen = ImageDraw.Draw(fill), ImageDraw.Draw(edge)
    line = max(2, round(0.006 * scale))
    for outline, value in _outlines(thing):
        points = [(x * scale - left * _SUPERSAMPLING, y * scale - top * _SUPERSAMPLING) for x, y in outline]
        pen.polygon(points, fill=value)
        edge_pen.line([*points, *points[:2]], fill=255, width=line, joint="curve")
    small = fill.reduce(_SUPERSAMPLING)
    shadow = small.filter(ImageFilter.GaussianBlur(0.015 * image_size))
    cover, edges, shadows = (
        np.asarray(part, np.float32) / 255 for part in (small, edge.reduce(_SUPERSAMPLING), shadow)
    )
    offset = max(1, round(0.015 * image_size))
    shadows = np.pad(shadows, ((offset, 0), (offset, 0)))[: cover.shape[0], : cover.shape[1]]
    return Layer(cover, edges * cover, shadows, (slice(top, bottom), slice(left, right)))


def masks_of(layers: list[Layer], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Full and visible masks, bool [n, S, S]: a pixel belongs to a shape that covers at least half of it."""
    full = np.zeros((len(layers), image_size, image_size), bool)
    for mask, layer in zip(full, layers, strict=True):
        mask[layer.window] = layer.cover >= 0.5
    visible = full.copy()
    for later in range(1, len(full)):
        visible[:later] &= ~full[later]
    return full, visible


def draw_ground(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Float [S, S, 3]: a slanted gradient of muted colours with soft blotches, grey strokes and specks."""
    first, second = (rng.uniform(95, 215) + rng.uniform(-14, 14, 3) for _ in range(2))
    steps = np.linspace(0, 1, image_size)
    slant = rng.random()
    blend = (slant * steps[:, None] + (1 - slant) * steps[None, :])[..., None]
    blotches = Image.fromarray(rng.normal(0, 14, (6, 6)).astype(np.float32))
    ground = first + (second - first) * blend
    ground += np.asarray(blotches.resize((image_size, image_size), Image.Resampling.BICUBIC))[..., None]

    strokes = Image.new("L", (2 * image_size, 2 * image_size), 128)
    pen = ImageDraw.Draw(strokes)
    side = 2 * image_size
    for _ in range(rng.integers(6, 14)):
        x, y, reach = (
            rng.uniform(-0.2, 1.0) * side,
            rng.uniform(-0.2, 1.0) * side,
            rng.uniform(0.1, 0.7) * side,
        )
        start, sweep = rng.uniform(0, 360), rng.uniform(20, 160)
        grey, width = int(rng.integers(80, 177)), int(rng.integers(1, max(3, side // 64)))
        pen.arc((x, y, x + reach, y + reach), start, start + sweep, fill=grey, width=width)
    for _ in range(rng.integers(3, 8)):  # pebbles
        corners = rng.uniform((-0.05, -0.03), (0.05, 0.03), (7, 2)) * side + rng.uniform(0, side, 2)
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=int(rng.integers(105, 152)))
    for _ in range(rng.integers(10, 30)):
        x, y, reach = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.004, 0.014) * side
        pen.rectangle((x, y, x + reach, y + reach), fill=int(rng.integers(70, 187)))
    return ground + (np.asarray(strokes.reduce(2), np.float64)[..., None] - 128)


def paint(picture: np.ndarray, thing: SceneObject, layer: Layer, rng: np.random.Generator) -> None:
    """Lay one object, with shadow, texture, light and outline, over float [S, S, 3] in place."""
    image_size = len(picture)
    rows, columns = layer.window
    y = ((np.arange(rows.start, rows.stop) + 0.5) / image_size - thing.y)[:, None] / thing.radius
    x = ((np.arange(columns.start, columns.stop) + 0.5) / image_size - thing.x)[None, :] / thing.radius
    tint = np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10, 3)
    light = 1 - 0.12 * (x + y)
    pattern = _pattern(thing.texture, x, y, float(rng.uniform(0, math.pi)))
    marks = tint * 0.45 if rng.random() < 0.5 else tint * 0.35 + 165
    paint = tint + (marks - tint) * pattern[..., None]
    paint = paint * light[..., None] * (1 - 0.55 * layer.edge[..., None])
    part = picture[layer.window]
    part *= 1 - 0.4 * (layer.shadow * (1 - layer.cover))[..., None]
    part += (paint - part) * layer.cover[..., None]


def _pattern(texture: str, x: np.ndarray, y: np.ndarray, turn: float) -> np.ndarray:
    """Marks of a texture, float [h, w] in [0, 1], at coordinates in units of the object's radius."""
    u = (x * math.cos(turn) + y * math.sin(turn)) * 1.8
    v = (y * math.cos(turn) - x * math.sin(turn)) * 1.8
    if texture == "striped":
        return np.clip(0.5 + 8 * (np.abs(u % 1 - 0.5) - 0.25), 0, 1)
    if texture == "dotted":
        return np.clip(0.5 + 6 * (0.3 - np.hypot(u % 1 - 0.5, v % 1 - 0.5)), 0, 1)
    return np.zeros_like(u)


def _outlines(thing: SceneObject) -> list[tuple[list[tuple[float, float]], int]]:
    """Polygons in fractions of the picture, each with its fill value (0 cuts a hole)."""
    rings = [(_unit_outline(thing.shape), 255)]
    if thing.shape == "ring":
        rings.append(([(0.52 * x, 0.52 * y) for x, y in rings[0][0]], 0))
    cosine, sine = thing.radius * math.cos(thing.angle), thing.radius * math.sin(thing.angle)
    return [
        ([(thing.x + cosine * x - sine * y, thing.y + sine * x + cosine * y) for x, y in points], value)
        for points, value in rings
    ]


def _unit_outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within the unit circle, y downwards."""
    if shape in ("circle", "ring"):
        return _polar([1.0] * 48)
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return _polar([1.0] * 3)
    if shape == "star":
        return _polar([1.0, 0.45] * 5)
    if shape == "cross":
        arm = [(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32)]
        return [_quarter_turns(point, turns) for turns in range(4) for point in arm]
    turns = [2 * math.pi * i / 40 for i in range(40)]  # heart
    return [
        (
            0.92 * math.sin(t) ** 3,
            -0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 0.1,
        )
        for t in turns
    ]


def _polar(radii: list[float]) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]


def _quarter_turns(point: tuple[float, float], turns: int) -> tuple[float, float]:
    x, y = point
    for _ in range(turns):
        x, y = -y, x
    return x, y
