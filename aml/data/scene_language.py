"""Sentences that pick one object out of a rendered scene, and nothing else.

Three kinds, after what people write in RefCOCO: by attribute ("the small striped square"), by position among
alike objects ("the second red circle from the left"), by relation to another object ("the circle above the
blue star"). A sentence is only formed if it fits its target clearly and fits no other object even loosely, so
every one is unambiguous by construction. Position and relation are used only where the words for the object
alone fit several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

# Distances are fractions of the picture's side. An object counts as first along an axis, or as "left of"
# another, only if it is so by this much ...
_CLEAR = 0.10
# ... and another object is ruled out only if it is not so by even this much.
_LOOSE = -0.02
_LARGER = 1.3  # "largest": at least this much larger than all others
_NEARER = 0.7  # "closest to": at most this part of the distance of all others
_OVERLAP = 0.06  # "behind": at least this part of the smaller object is shared ...
_APART = 1.2  # ... and all others are this many times the sum of both radii away, so that they do not touch

ORDINALS = ("second", "third")


@dataclass(frozen=True)
class SceneObject:
    """One object; position and radius are fractions of the picture's side, y grows downwards."""

    shape: str
    colour: str
    size: str  # "small", "medium" or "large"; sentences never say medium
    texture: str  # "plain", "striped" or "dotted"; sentences never say plain
    x: float
    y: float
    radius: float
    angle: float  # radians


@dataclass(frozen=True)
class Phrase:
    """Words for some attributes; None leaves one open."""

    size: str | None
    texture: str | None
    colour: str | None
    shape: str | None

    def fits(self, thing: SceneObject) -> bool:
        """Whether every attribute that is named is the object's."""
        return (
            self.size in (None, thing.size)
            and self.texture in (None, thing.texture)
            and self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
        )

    def __str__(self) -> str:
        words = [self.size, self.texture, self.colour, self.shape or "object"]
        return " ".join(word for word in words if word)


# Words for one object, each with the set of all objects that they fit.
Choices = list[tuple[frozenset[int], Phrase]]


def describe(objects: list[SceneObject], overlap: np.ndarray) -> list[dict[str, list[str]]]:
    """Every sentence that this module can form, for each object by kind; kinds without one are left out.

    Args:
        objects: all objects of the scene, in drawing order (a later one hides an earlier one).
        overlap: float [n, n], part of the smaller of two objects that the two share.
    """
    choices = [_choices(objects, thing) for thing in objects]
    found = [
        {
            "attribute": list(_by_attribute(objects, choices[target], target)),
            "position": list(_by_position(objects, choices[target], target)),
            "relation": list(_by_relation(objects, choices, overlap, target)),
        }
        for target in range(len(objects))
    ]
    return [{kind: sentences for kind, sentences in kinds.items() if sentences} for kinds in found]


def _choices(objects: list[SceneObject], thing: SceneObject) -> Choices:
    """For each set of objects that words for `thing` can select: the shortest such words. And its colour and
    shape, which people name even where one of them would do."""
    size = thing.size if thing.size != "medium" else None
    texture = thing.texture if thing.texture != "plain" else None
    options = product((None, size), (None, texture), (None, thing.colour), (None, thing.shape))
    # Sizes are compared among like shapes only: a star is smaller than a circle of its radius.
    phrases = sorted((Phrase(*o) for o in options if any(o) and (o[0] is None or o[3])), key=_effort)
    shortest: dict[frozenset[int], Phrase] = {}
    for phrase in phrases:
        shortest.setdefault(_fitting(objects, phrase), phrase)
    usual = Phrase(None, None, thing.colour, thing.shape)
    choices = list(shortest.items())
    if usual not in shortest.values():
        choices.append((_fitting(objects, usual), usual))
    return choices


def _fitting(objects: list[SceneObject], phrase: Phrase) -> frozenset[int]:
    return frozenset(i for i, thing in enumerate(objects) if phrase.fits(thing))


def _effort(phrase: Phrase) -> tuple[int, bool, str]:
    named = (phrase.size, phrase.texture, phrase.colour, phrase.shape)
    return sum(word is not None for word in named), phrase.shape is None, str(phrase)


def _by_attribute(objects: list[SceneObject], choices: Choices, target: int) -> Iterator[str]:
    for group, phrase in choices:
        if len(group) == 1:
            yield from (f"the {phrase}", str(phrase))
            continue
        radii = [objects[i].radius for i in group if i != target]
        if phrase.size or not phrase.shape:
            continue
        if objects[target].radius >= _LARGER * max(radii):
            yield f"the largest {phrase}"
        if objects[target].radius * _LARGER <= min(radii):
            yield f"the smallest {phrase}"


def _by_position(objects: list[SceneObject], choices: Choices, target: int) -> Iterator[str]:
    for group, phrase in choices:
        if len(group) < 2:
            continue
        yield from _along([objects[i].x for i in group], objects[target].x, _horizontal, str(phrase))
        yield from _along([objects[i].y for i in group], objects[target].y, _vertical, str(phrase))


def _along(
    places: list[float], place: float, words: Callable[[int, int, str], list[str]], phrase: str
) -> list[str]:
    """Sentences for the object at `place`, which must be clear of all others at `places` along one axis."""
    before = sum(other < place for other in places)
    if sum(abs(other - place) < _CLEAR for other in places) > 1:  # itself is one of them
        return []
    return words(before, len(places), phrase)


def _horizontal(rank: int, count: int, phrase: str) -> list[str]:
    last = count - 1
    if count == 2:
        side = ("left", "right")[rank]
        return [f"the {side} {phrase}", f"{side} {phrase}", f"the {phrase} on the {side}"]
    if rank in (0, last):
        return [f"the {'leftmost' if rank == 0 else 'rightmost'} {phrase}"]
    sentences = [f"the {ORDINALS[rank - 1]} {phrase} from the left"] if rank <= len(ORDINALS) else []
    if last - rank <= len(ORDINALS):
        sentences.append(f"the {ORDINALS[last - rank - 1]} {phrase} from the right")
    return sentences


def _vertical(rank: int, count: int, phrase: str) -> list[str]:
    if rank not in (0, count - 1):
        return []
    if count == 2:
        return [f"the {('upper', 'lower')[rank]} {phrase}", f"{('top', 'bottom')[rank]} {phrase}"]
    return [f"the {'topmost' if rank == 0 else 'lowest'} {phrase}"]


def _by_relation(
    objects: list[SceneObject], choices: list[Choices], overlap: np.ndarray, target: int
) -> Iterator[str]:
    for anchor in range(len(objects)):
        names = [name for group, name in choices[anchor] if len(group) == 1]
        if anchor == target or not names:
            continue
        for group, phrase in choices[target]:
            rivals = sorted(group - {anchor, target})
            if rivals:
                for words in _relations(objects, overlap, target, anchor, rivals):
                    yield from (f"the {phrase} {words} the {name}" for name in names)


def _relations(
    objects: list[SceneObject], overlap: np.ndarray, target: int, anchor: int, rivals: list[int]
) -> list[str]:
    """Words for what holds clearly between target and anchor, and not even loosely between a rival and it."""
    here, there = objects[target], objects[anchor]
    dx, dy = here.x - there.x, here.y - there.y
    found = []
    apart = [_distance(objects[i], there) > _APART * (objects[i].radius + there.radius) for i in rivals]
    if overlap[target, anchor] >= _OVERLAP and all(apart):
        found.append("in front of" if target > anchor else "behind")
    for words, along, across, ahead in (
        ("to the left of", -dx, dy, lambda other: there.x - other.x),
        ("to the right of", dx, dy, lambda other: other.x - there.x),
        ("above", -dy, dx, lambda other: there.y - other.y),
        ("below", dy, dx, lambda other: other.y - there.y),
    ):
        clear = along >= _CLEAR and abs(across) <= 0.7 * along
        if clear and all(ahead(objects[rival]) <= _LOOSE for rival in rivals):
            found.append(words)
    nearest_rival = min(_distance(objects[rival], there) for rival in rivals)
    if not found and _distance(here, there) <= _NEARER * nearest_rival:
        found.append("closest to")
    return found


def _distance(one: SceneObject, other: SceneObject) -> float:
    return float(np.hypot(one.x - other.x, one.y - other.y))
