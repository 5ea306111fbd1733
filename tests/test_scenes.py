"""Rendered scenes: reproducible, whole or absent, and every sentence true of exactly one object.

The sentences are read here by a parser of their English, not by the code that formed them.
"""

import math
import pickle
import re

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from aml.data import scenes
from aml.data.refer import ReferDataset
from aml.data.scene_drawing import COLOURS, SHAPES
from aml.data.scenes import render_scene, render_scenes

WORD = rf"(?:small |large )?(?:striped |dotted )?(?:(?:{'|'.join(COLOURS)}) )?(?:object|{'|'.join(SHAPES)})"
RELATION = "to the left of|to the right of|above|below|closest to|in front of|behind"
SIDE = {"left": ("x", 1), "right": ("x", -1), "upper": ("y", 1), "lower": ("y", -1), "top": ("y", 1)}
SIDE |= {
    "bottom": ("y", -1),
    "leftmost": ("x", 1),
    "rightmost": ("x", -1),
    "topmost": ("y", 1),
    "lowest": ("y", -1),
}


def read(sentence: str, scene) -> list[int]:
    """Indices of the objects of `scene` that an English reader could mean; nothing that is not understood."""
    sentence = sentence.removeprefix("the ")
    if match := re.fullmatch(f"({WORD}) ({RELATION}) the ({WORD})", sentence):
        phrase, relation, anchor_phrase = match.groups()
        (anchor,) = alike(anchor_phrase, scene)
        return related(relation, [i for i in alike(phrase, scene) if i != anchor], anchor, scene)
    if match := re.fullmatch(f"(second|third) ({WORD}) from the (left|right)", sentence):
        ordinal, phrase, side = match.groups()
        return placed(phrase, side, ("second", "third").index(ordinal) + 1, scene)
    if match := re.fullmatch(f"({WORD}) on the (left|right)", sentence):
        return placed(match[1], match[2], 0, scene)
    if match := re.fullmatch(f"({'|'.join(SIDE)}) ({WORD})", sentence):
        return placed(match[2], match[1], 0, scene)
    if match := re.fullmatch(f"(largest|smallest) ({WORD})", sentence):
        by_size = sorted(alike(match[2], scene), key=lambda i: scene.objects[i].radius)
        return [by_size[-1 if match[1] == "largest" else 0]]
    assert re.fullmatch(WORD, sentence), f"not understood: {sentence}"
    return alike(sentence, scene)


def alike(phrase: str, scene) -> list[int]:
    *attributes, noun = phrase.split()
    return [
        i
        for i, thing in enumerate(scene.objects)
        if noun in ("object", thing.shape)
        and all(word in (thing.size, thing.texture, thing.colour) for word in attributes)
    ]


def placed(phrase: str, side: str, rank: int, scene) -> list[int]:
    """The object of that rank from that side, if no other is so near along this axis that one could doubt."""
    axis, direction = SIDE[side]
    group = alike(phrase, scene)
    assert len(group) > 1, f"{side} {phrase}: a position that is not needed"
    places = {i: direction * getattr(scene.objects[i], axis) for i in group}
    chosen = sorted(group, key=places.get)[rank]
    return [i for i in group if abs(places[i] - places[chosen]) < 0.09]


def related(relation: str, group: list[int], anchor: int, scene) -> list[int]:
    assert len(group) > 1, f"{relation}: a relation that is not needed"
    there = scene.objects[anchor]
    offsets = {i: (scene.objects[i].x - there.x, scene.objects[i].y - there.y) for i in group}
    if relation == "closest to":
        return [min(group, key=lambda i: math.hypot(*offsets[i]))]
    if relation in ("in front of", "behind"):
        touching = [i for i in group if touch(scene.masks[i], scene.masks[anchor])]
        return [i for i in touching if (i > anchor) == (relation == "in front of")]
    holds = {
        "to the left of": lambda dx, dy: dx < 0,
        "to the right of": lambda dx, dy: dx > 0,
        "above": lambda dx, dy: dy < 0,
        "below": lambda dx, dy: dy > 0,
    }[relation]
    return [i for i in group if holds(*offsets[i])]


def touch(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the visible parts share a border: pixels next to each other, up, down, left or right."""
    return bool((one[1:] & other[:-1]).any() or (one[:-1] & other[1:]).any()) or bool(
        (one[:, 1:] & other[:, :-1]).any() or (one[:, :-1] & other[:, 1:]).any()
    )


@pytest.fixture(scope="module")
def many_scenes():
    return [render_scene(seed=5, index=i, image_size=96) for i in range(250)]


def test_every_sentence_fits_exactly_its_target(many_scenes):
    kinds = dict.fromkeys(("attribute", "position", "relation"), 0)
    said = set()
    for scene in many_scenes:
        assert 2 <= len(scene.references) <= 3
        for reference in scene.references:
            assert 2 <= len(reference.sentences) <= 3
            assert len(set(reference.sentences)) == len(reference.sentences)
            for sentence, kind in zip(reference.sentences, reference.kinds, strict=True):
                assert read(sentence, scene) == [reference.target], sentence
                kinds[kind] += 1
                said |= set(re.findall(r"[a-z]+", sentence))
    assert min(kinds.values()) > 0.2 * sum(kinds.values()), kinds
    # The whole vocabulary is in use, so the reading above has tested each kind of sentence.
    words = set(re.findall("[a-z]+", " ".join([*COLOURS, *SHAPES, *SIDE, RELATION])))
    assert words | {"second", "third", "largest", "smallest", "small", "large", "striped", "dotted"} <= said


def test_the_reader_of_this_test_notices_wrong_sentences(many_scenes):
    scene = next(s for s in many_scenes if len({o.shape for o in s.objects}) > 1)
    other = next(i for i, thing in enumerate(scene.objects) if thing.shape != scene.objects[0].shape)
    assert 0 not in read(f"the {scene.objects[other].shape}", scene)
    with pytest.raises(AssertionError, match="not understood"):
        read("the grey circle", scene)


def test_targets_are_visible_and_have_distractors(many_scenes):
    alike_shapes = 0
    for scene in many_scenes:
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.objects), 96, 96) and scene.masks.dtype == bool
        assert scene.masks.sum(0).max() == 1, "a pixel belongs to two objects"
        assert (scene.masks.sum((1, 2)) >= 15).all()
        alike_shapes += len({thing.shape for thing in scene.objects}) < len(scene.objects)
    assert alike_shapes == len(many_scenes)


def test_masks_lie_on_the_colours_they_name(many_scenes):
    """The median colour under a plain object's mask is nearest to the colour of its name."""
    palette = np.array(list(COLOURS.values()), float)
    seen = right = 0
    for scene in many_scenes[:60]:
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            if thing.texture == "plain" and thing.size != "small":
                median = np.median(scene.image[mask], axis=0)
                nearest = list(COLOURS)[int(np.abs(palette - median).sum(1).argmin())]
                seen, right = seen + 1, right + (nearest == thing.colour)
    assert seen > 50 and right >= 0.98 * seen, (right, seen)


def test_a_scene_is_a_function_of_seed_and_index():
    forwards = [render_scene(3, i, 64) for i in (0, 1, 2)]
    backwards = [render_scene(3, i, 64) for i in (2, 1, 0)][::-1]
    for one, again in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one.image, again.image)
        assert (one.objects, one.references) == (again.objects, again.references)
    assert render_scene(4, 0, 64).objects != forwards[0].objects != forwards[1].objects


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_written_scenes_are_the_same_bytes_and_splits_are_independent(tmp_path):
    one = files_of(render_scenes(tmp_path / "one", train=3, val=2, image_size=64))
    assert one == files_of(render_scenes(tmp_path / "two", train=3, val=2, image_size=64))
    more = files_of(render_scenes(tmp_path / "more", train=4, val=2, test=1, image_size=64))
    pictures = {path for path in one if path.suffix == ".png"}
    assert len(pictures) == 5 and all(more[path] == one[path] for path in pictures)
    other = files_of(render_scenes(tmp_path / "other", train=3, val=2, image_size=64, seed=1))
    assert not any(other[path] == one[path] for path in pictures)


def test_the_data_set_reads_back_as_rendered(tmp_path):
    root = render_scenes(tmp_path / "new" / "scenes", train=3, val=2, test=1, image_size=64, seed=2)
    data = ReferDataset(root)
    assert data.splits() == ["train", "val", "test"]
    first = data.expressions("train")[0].image_id
    scene = render_scene(2, first, 64)
    expressions = [e for e in data.expressions("train") if e.image_id == first]
    assert [e.sentence for e in expressions] == [s for r in scene.references for s in r.sentences]
    for expression in expressions:
        reference = next(r for r in scene.references if expression.sentence in r.sentences)
        np.testing.assert_array_equal(data.mask(expression), scene.masks[reference.target])
        assert expression.category == scene.objects[reference.target].shape
    refs = pickle.loads(data.refs_path.read_bytes())
    assert {s["kind"] for r in refs for s in r["sentences"]} <= {"attribute", "position", "relation"}


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def fail_at_the_third(seed, index, image_size):
        if index == 2:
            raise KeyboardInterrupt
        return render_scene(seed, index, image_size)

    monkeypatch.setattr(scenes, "render_scene", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        render_scenes(tmp_path / "scenes", train=4, val=0, image_size=64)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_kept(tmp_path, monkeypatch):
    root = render_scenes(tmp_path / "scenes", train=1, val=1, image_size=64)
    before = files_of(root)
    (tmp_path / "empty").mkdir()
    assert files_of(render_scenes(tmp_path / "empty", train=1, val=1, image_size=64)) == before
    monkeypatch.setattr(scenes, "render_scene", None)  # the same again: nothing is rendered
    assert render_scenes(root, train=1, val=1, image_size=64) == root
    for changed in ({"seed": 1}, {"train": 2}):
        with pytest.raises(FileExistsError, match="holds other files than these scenes"):
            render_scenes(root, **({"train": 1, "val": 1, "image_size": 64} | changed))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="name a new folder"):
        render_scenes(tmp_path / "notes", train=1, val=1, image_size=64)
    assert files_of(root) == before and (tmp_path / "notes" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": -1}, "train=-1: expected at least 0"),
        ({"image_size": 32}, "image_size=32: expected at least 64"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"train": 0, "val": 0}, "expected at least one scene"),
        ({"train": 1_000_001}, "at most 1000000 in a split"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        render_scenes(tmp_path / "scenes", **({"train": 1, "val": 1} | arguments))
    assert not (tmp_path / "scenes").exists()
