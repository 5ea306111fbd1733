"""Samples and batches: golden parity; pure functions of (seed, epoch, index) for any workers and order."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aml.data import pixels
from aml.data.dataset import EpochBatches, RISDataset, collate, full_targets
from aml.data.loading import read_batches
from aml.data.refer import ReferDataset
from aml.data.scenes import render_scenes
from aml.models.words import TokenizedModel

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden fixtures are not at {GOLDEN}")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def tokenize_letters(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a character, as wide as the longest sentence may be."""
    tokens = torch.zeros(len(sentences), 64, dtype=torch.int64)
    for row, sentence in zip(tokens, sentences, strict=True):
        row[: len(sentence[:64])] = torch.tensor([ord(c) for c in sentence[:64]])
    return tokens, tokens > 0


def text_of(item) -> str:
    return "".join(chr(token) for token in item["tokens"][item["text_mask"]].tolist())


@pytest.fixture(scope="module")
def scene_root(tmp_path_factory):
    return render_scenes(tmp_path_factory.mktemp("data") / "scenes", train=8, val=4, image_size=80, seed=1)


@pytest.fixture
def refer(scene_root):
    return ReferDataset(scene_root)


def training_set(refer, **changes):
    return RISDataset(
        refer, "train", **({"image_size": 64, "tokenize": tokenize_letters, "train": True} | PLAIN | changes)
    )


def evaluation_set(refer, **changes):
    return training_set(refer, **({"train": False} | changes))


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


# Parity with the released program


@needs_golden
@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
def test_images_and_targets_match_golden_to_the_last_bit(split):
    items = json.loads((GOLDEN / "refer_data.json").read_text())["dataset"][split]["items"]
    arrays = np.load(GOLDEN / "refer_data.npz")
    refer = ReferDataset(GOLDEN / "refer_tiny")
    options = {"tokenize": tokenize_letters, "train": True, "augment": False} | IMAGENET
    data = RISDataset(refer, split, image_size=448, **options)
    assert len(data) == len(items)
    for index, expected in enumerate(items):
        item = data[0, index]
        image = item["image"].numpy()
        assert item["sample_id"].startswith(f"{expected['ref_id']}-")
        assert hashlib.sha256(image.tobytes()).hexdigest() == expected["image_sha"]
        np.testing.assert_array_equal(image[:, ::32, ::32], arrays[f"{split}.{index}.image448_sub32"])
        np.testing.assert_array_equal(item["target"], arrays[f"{split}.{index}.target448"])
    small = RISDataset(refer, split, image_size=64, **options)[0, 0]
    np.testing.assert_array_equal(small["image"], arrays[f"{split}.sent0.image64"])
    np.testing.assert_array_equal(small["target"], arrays[f"{split}.sent0.target64"])


class Words(TokenizedModel):
    """As much of a model as tokenizes: 20 tokens, by the golden vocabulary."""

    max_tokens = 20

    def __init__(self, keep_end):
        super().__init__()
        self.keep_end, self.weight = keep_end, torch.nn.Parameter(torch.zeros(1))
        vocabulary = str(GOLDEN / "refer_tiny" / "bert" / "vocab.txt")
        self.set_tokenizer(pytest.importorskip("tokenizers").BertWordPieceTokenizer(vocabulary)._tokenizer)


@needs_golden
@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
@pytest.mark.parametrize("keep_end", [False, True])
def test_tokens_match_golden(split, keep_end):
    """Cut by slicing, as the released program does, or with [SEP] in the place of the last token."""
    refer = ReferDataset(GOLDEN / "refer_tiny")
    options = {"image_size": 32, "tokenize": Words(keep_end).tokenize, "train": False} | IMAGENET
    data = RISDataset(refer, split, **options)
    batch = collate([data[i] for i in range(len(data))])
    arrays = np.load(GOLDEN / "refer_data.npz")
    expected = arrays[f"{split}.sent.input_ids"].copy()
    if keep_end:
        assert (expected[:, -1] > 0).any() == (split == "train")  # only there a sentence is too long
        expected[expected[:, -1] > 0, -1] = 3
    np.testing.assert_array_equal(batch["tokens"], expected)
    np.testing.assert_array_equal(batch["text_mask"], arrays[f"{split}.sent.attention_mask"])


# Training items


def test_training_items_do_not_depend_on_order_workers_or_global_generators(refer):
    data = training_set(refer, seed=3)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(len(data))]
    expected = {key: data[key] for key in keys}
    np.random.seed(0)
    torch.manual_seed(0)
    for key in reversed(keys):
        assert_same(training_set(refer, seed=3)[key], expected[key])
    for workers in (0, 2):
        batches = EpochBatches(len(data), 4, seed=3, epoch=1)
        for batch, batch_keys in zip(read_batches(data, batches, workers, "cpu"), batches, strict=True):
            assert_same(batch, collate([expected[key] for key in batch_keys]))


def test_every_sentence_and_new_pictures_come_with_the_epochs(refer):
    data = training_set(refer)
    seen = {data[epoch, index]["sample_id"] for epoch in range(40) for index in range(len(data))}
    assert seen == set(data.sample_ids)
    assert not torch.equal(data[0, 0]["image"], data[1, 0]["image"])
    assert not torch.equal(data[0, 0]["image"], training_set(refer, seed=1)[0, 0]["image"])
    still = training_set(refer, augment=False)
    assert torch.equal(still[0, 0]["image"], still[1, 0]["image"])


def test_items_are_as_documented(refer):
    data = training_set(refer)
    item = data[2, 5]
    shapes = {
        name: (value.dtype, tuple(value.shape))
        for name, value in item.items()
        if isinstance(value, torch.Tensor)
    }
    assert shapes == {
        "image": (torch.float32, (3, 64, 64)),
        "target": (torch.uint8, (64, 64)),
        "tokens": (torch.int64, (64,)),
        "text_mask": (torch.bool, (64,)),
    }
    assert item["index"] == 5 and item["sample_id"] in data.sample_ids
    assert 0 <= item["image"].min() and item["image"].max() <= 1 and item["target"].max() == 1
    sentence = next(e.sentence for e in data.expressions if e.sample_id == item["sample_id"])
    assert text_of(item) == sentence
    assert len(data) == len({e.ref_id for e in data.expressions})


def test_crops_move_picture_and_target_together_and_never_mirror(refer, monkeypatch):
    """Under the target lie the same colours as without the crop, near the place where they were."""
    monkeypatch.setattr(pixels, "_COLOUR_RANGE", 0.0)
    moved, still = training_set(refer), training_set(refer, augment=False)
    shifts, changes = [], []
    for index in range(len(moved)):
        colour, centre = under_target(still[0, index])
        for epoch in range(4):
            moved_colour, moved_centre = under_target(moved[epoch, index])
            changes.append((moved_colour - colour).abs().max().item())
            shifts.append((moved_centre - centre).abs().max().item())
    assert 2 < max(shifts) <= 0.1 * 64 + 1
    assert np.mean(changes) < 0.02 and max(changes) < 0.1


def under_target(item) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean colour and centre (row, column) of the pixels of the target."""
    inside = item["target"].bool()
    return item["image"][:, inside].mean(1), inside.nonzero().float().mean(0)


def test_colours_change_little_and_stay_in_range(refer):
    rng = np.random.default_rng(0)
    picture = rng.random((3, 16, 16), dtype=np.float32)
    jittered = pixels.jitter_colours(picture, np.random.default_rng(1))
    assert jittered.dtype == np.float32 and jittered.min() >= 0 and jittered.max() <= 1
    assert 0.01 < np.abs(jittered - picture).mean() < 0.2
    red = np.zeros((3, 4, 4), np.float32) + np.array([0.8, 0.2, 0.2], np.float32)[:, None, None]
    for seed in range(20):
        shades = pixels.jitter_colours(red, np.random.default_rng(seed))
        assert shades[0].min() > shades[1].max() and shades[0].min() > shades[2].max()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_crops_keep_the_whole_target(data):
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(data.draw(st.integers(0, 3))):
        mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 1
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    left, top, right, bottom = pixels.crop_around(mask, rng)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert right - left >= 0.8 * width - 1 and bottom - top >= 0.8 * height - 1


def test_masks_are_resized_as_pillow_does():
    rng = np.random.default_rng(0)
    for size in (7, 32, 100):
        mask = (rng.random((45, 61)) < 0.5).astype(np.uint8)
        expected = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(pixels.resized_mask(mask, pixels.Box(0, 0, 61, 45), (size, size)), expected)


# Evaluation items


def test_evaluation_has_every_sentence_once_with_the_full_mask(refer):
    data = evaluation_set(refer)
    items = [data[i] for i in range(len(data))]
    assert [item["sample_id"] for item in items] == data.sample_ids == [e.sample_id for e in data.expressions]
    for item, expression in zip(items, data.expressions, strict=True):
        np.testing.assert_array_equal(item["full_target"], refer.mask(expression))
        assert item["full_target"].dtype == torch.uint8
        assert text_of(item) == expression.sentence
        assert_same(item, evaluation_set(refer)[item["index"]])
    with pytest.raises(IndexError, match=f"indexed by 0 to {len(data) - 1}"):
        data[len(data)]


def test_changing_an_item_does_not_change_the_next(refer):
    data = evaluation_set(refer)
    assert data.expressions[0].ref_id == data.expressions[1].ref_id
    expected = evaluation_set(refer)[1]
    first = data[0]
    for name in ("image", "target", "full_target"):
        first[name].fill_(1)
    assert_same(data[1], expected)


def test_collate_joins_what_differs_in_size(refer):
    data = evaluation_set(refer)
    batch = collate([data[i] for i in (4, 1, 2)])
    assert batch["image"].shape == (3, 3, 64, 64) and batch["index"].tolist() == [4, 1, 2]
    assert batch["sample_id"] == [data.sample_ids[i] for i in (4, 1, 2)]
    masks = [torch.randint(2, size, dtype=torch.uint8) for size in ((3, 5), (4, 2), (1, 7))]
    batch = collate([data[i] | {"full_target": mask} for i, mask in zip((4, 1, 2), masks, strict=True)])
    assert all(torch.equal(*pair) for pair in zip(full_targets(batch), masks, strict=True))
    assert "full_target" not in collate([training_set(refer)[0, 0]])


# Fingerprint, errors


def test_fingerprint_tells_sets_apart(refer, scene_root):
    one = training_set(refer).fingerprint
    assert training_set(ReferDataset(scene_root), seed=9).fingerprint == one
    others = [
        evaluation_set(refer),
        RISDataset(refer, "val", image_size=64, tokenize=tokenize_letters, train=True, **PLAIN),
    ]
    assert len({one, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_names_file_and_sample(tmp_path, workers):
    refer = ReferDataset(render_scenes(tmp_path / "scenes", train=2, val=0, image_size=64))
    data = training_set(refer)
    broken = data.expressions[0].image_path
    broken.write_bytes(broken.read_bytes()[:2000])
    batches = EpochBatches(len(data), len(data), seed=0, epoch=0)
    # From a worker process too, without the traceback that PyTorch makes the message of.
    with pytest.raises(OSError, match=rf"^sample \d+-\d+: image .*{broken.name} was not read"):
        list(read_batches(data, batches, workers, "cpu"))
    assert not multiprocessing.active_children()
    broken.write_bytes(b"no image")
    with pytest.raises(OSError, match=f"{broken.name} was not read"):
        evaluation_set(refer)[0]
    Image.new("I;16", (64, 64), 30000).save(broken, "PNG")
    with pytest.raises(OSError, match=rf"{broken.name} was not read \(has 16 bits .*mode I;16\); save it with 8"):
        evaluation_set(refer)[0]
    Image.new("RGB", (30, 20)).save(broken)
    with pytest.raises(ValueError, match=f"{broken.name} is 30 x 20, its annotations say 64 x 64"):
        evaluation_set(refer)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size=0: expected at least 1"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
        ({"std": (1.0, 0.0, 1.0)}, "three numbers each, std above 0"),
        ({"mean": (0.5,)}, "three numbers each"),
        (
            {"tokenize": lambda s: (torch.zeros(len(s), 4), torch.zeros(len(s), 4, dtype=torch.bool))},
            "tokens int64",
        ),
        ({"tokenize": lambda s: tokenize_letters(s[:1])}, r"tokenize: expected \[\d+, L\]"),
    ],
)
def test_bad_arguments_are_named(refer, changes, message):
    with pytest.raises(ValueError, match=message):
        training_set(refer, **changes)


def test_keys_of_the_other_kind_are_refused(refer):
    with pytest.raises(TypeError, match=r"indexed by \(epoch, index\)"):
        training_set(refer)[0]
    with pytest.raises(IndexError, match="evaluation set is indexed by"):
        evaluation_set(refer)[0, 0]


# Batches of an epoch


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 40), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_ranks_share_an_epoch_evenly_and_resume_exactly(world, batch_size, extra, seed, epoch):
    length = world * batch_size + extra
    ranks = [list(EpochBatches(length, batch_size, seed, epoch, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {length // (world * batch_size)}
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert len(set(keys)) == len(keys) > length - world * batch_size
    assert {e for e, _ in keys} == {epoch} and all(0 <= index < length for _, index in keys)
    for rank, batches in enumerate(ranks):
        for start in range(len(batches) + 1):
            rest = EpochBatches(length, batch_size, seed, epoch, rank, world, start)
            assert len(rest) == len(batches) - start
            assert list(rest) == list(rest) == batches[start:]


def test_order_changes_with_seed_and_epoch_and_not_with_world():
    def order(seed, epoch, world=1):
        ranks = [EpochBatches(64, 8 // world, seed, epoch, rank, world) for rank in range(world)]
        return [index for batches in zip(*ranks, strict=True) for batch in batches for _, index in batch]

    assert sorted(order(0, 0)) == list(range(64))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) == order(0, 0, world=2) == order(0, 0, world=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2}, "rank=2, world=2: expected 0 <= rank < world"),
        ({"length": 7}, "length=7: fewer items than one batch of 4 on each of 2"),
        ({"start": 3}, "start=3: expected 0 to 2"),
        ({"epoch": -1}, "epoch=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_batches_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EpochBatches(**({"length": 16, "batch_size": 4, "seed": 0, "epoch": 0, "world": 2} | changes))
