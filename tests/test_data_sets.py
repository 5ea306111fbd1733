"""Data sets beside RefCOCO: gRefCOCO, RRSIS-D, unions; annotations as JSON; images left out."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from refer_files import SQUARE, annotation, ref, write_refer
from test_dataset import PLAIN, tokenize_letters
from test_refer import GOLDEN, REAL, Hostile, needs_golden, needs_real

from aml.assembly import open_data
from aml.config import load
from aml.data import refs as refs_module
from aml.data.convert import convert
from aml.data.dataset import RISDataset
from aml.data.refer import ReferDataset
from aml.data.segmentation import decode_segmentation, segmentation_area
from aml.data.union import UNION, UnionDataset, open_dataset, read_skip_list, shared_images

RIGHT = [[6.0, 1.0, 9.0, 1.0, 9.0, 5.0, 6.0, 5.0]]
LEFT_MASK, RIGHT_MASK = (decode_segmentation(s, 8, 10) for s in (SQUARE, RIGHT))


# gRefCOCO


def write_grefcoco(root: Path, refs) -> Path:
    """gRefCOCO comes as JSON, under a name of its own."""
    write_refer(root, refs, [annotation(7), annotation(8, RIGHT)], dataset="grefcoco")
    (root / "grefcoco" / "refs(unc).p").unlink()
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    return root


def test_grefcoco_has_one_target_several_or_none(tmp_path):
    refs = [
        ref(0, "train", ann_id=[7], category_id=[1]),
        ref(1, "train", ann_id=[7, 8], category_id=[1, 1], no_target=False),
        ref(2, "train", ann_id=[-1], category_id=[-1], no_target=True),
    ]
    data = ReferDataset(write_grefcoco(tmp_path, refs), "grefcoco")
    assert (data.refs_path.name, data.name) == ("grefs(unc).json", "grefcoco(unc)")
    one, _, both, _, none, _ = data.expressions("train")
    np.testing.assert_array_equal(data.mask(one), LEFT_MASK)
    np.testing.assert_array_equal(data.mask(both), LEFT_MASK | RIGHT_MASK)
    assert not data.mask(none).any()
    assert [e.annotation_ids for e in (one, both, none)] == [(7,), (7, 8), ()]
    assert (one.category, none.category) == ("box", "")


@pytest.mark.parametrize("marks", [{"ann_id": -1}, {"ann_id": []}, {"ann_id": None}, {"ann_id": [-1], "no_target": 1}])
@pytest.mark.parametrize("train", [True, False])
def test_a_sentence_without_a_target_has_an_empty_one(tmp_path, marks, train):
    refer = ReferDataset(write_grefcoco(tmp_path, [ref(0, "val", **marks)]), "grefcoco")
    data = RISDataset(refer, "val", image_size=16, tokenize=tokenize_letters, train=train, **PLAIN)
    item = data[0, 0] if train else data[0]
    assert item["target"].shape == (16, 16) and not item["target"].any()
    assert train or not item["full_target"].any()


def test_photographs_without_a_target_are_cropped_like_others(tmp_path):
    refer = ReferDataset(write_grefcoco(tmp_path, [ref(0, "train", ann_id=[-1])]), "grefcoco")
    path = refer.expressions("train")[0].image_path
    Image.fromarray(np.arange(240, dtype=np.uint8).reshape(8, 10, 3)).resize((100, 80)).save(path)
    for image in refer._images.values():
        image |= {"height": 80, "width": 100}
    options = {"image_size": 16, "tokenize": tokenize_letters, "train": True, **PLAIN}
    data = RISDataset(refer, "train", **options)
    assert len({data[epoch, 0]["image"].sum().item() for epoch in range(4)}) == 4


def test_a_target_that_is_none_and_some_is_an_error(tmp_path):
    write_grefcoco(tmp_path, [ref(0, "train", ann_id=[7], no_target=True)])
    with pytest.raises(ValueError, match=r"ref 0 is marked no_target, but has ann_id \[7\]"):
        ReferDataset(tmp_path, "grefcoco")


# RRSIS-D


def test_rrsisd_is_read_in_its_layout(tmp_path):
    rle = coco_mask.encode(np.asfortranarray(RIGHT_MASK))
    segmentation = [{"size": [8, 10], "counts": rle["counts"].decode()}]
    places = {"dataset": "rrsisd", "images": "images/rrsisd/JPEGImages"}
    write_refer(tmp_path, [ref(0, "train"), ref(1, "test")], [annotation(7, segmentation)], **places)
    data = ReferDataset(tmp_path, "rrsisd")
    np.testing.assert_array_equal(data.mask(data.expressions("test")[0]), RIGHT_MASK)
    assert data.image_folder == tmp_path / places["images"]
    (tmp_path / places["images"]).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image folder .*images/rrsisd/JPEGImages"):
        ReferDataset(tmp_path, "rrsisd")


@pytest.mark.parametrize("folder", ["images", "annotations"])
def test_incomplete_instances_are_named(tmp_path, folder):
    path = write_refer(tmp_path) / "refcoco" / "instances.json"
    instances = json.loads(path.read_text())
    gone = {"images": "height", "annotations": "category_id"}[folder]
    for entry in instances[folder]:
        del entry[gone]
    path.write_text(json.dumps(instances))
    with pytest.raises(ValueError, match=rf"{folder[:-1]} \d has no '{gone}'"):
        ReferDataset(tmp_path)


@needs_golden
@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "refcocog"])
def test_areas_without_masks_are_those_of_the_masks(dataset):
    data = ReferDataset(GOLDEN / "refer_tiny", dataset)
    for expression in data.all_expressions():
        assert data.area(expression) == data.mask(expression).sum()
    assert segmentation_area([], 4, 5) == 0


# JSON instead of a pickle


def converted(root: Path, **options) -> list[str]:
    return list(convert(root, **options))


@needs_golden
def test_json_reads_like_the_pickle_it_was_made_of(tmp_path, monkeypatch):
    source, changes = GOLDEN / "refer_tiny", {"images": GOLDEN / "refer_tiny/images/train2014"}
    lines = converted(source, out=tmp_path)
    assert len(lines) == 4 and lines[0].endswith(f"{tmp_path}/refcoco/refs(unc).json: 11 refs, 0.0 MB")
    monkeypatch.setattr(refs_module, "load_plain_pickle", None)  # not called any more
    for dataset in ("refcoco", "refcoco+", "refcocog", "refcocom"):
        data = ReferDataset(tmp_path, dataset, **changes)
        assert data.refs_path.suffix == ".json"
        monkeypatch.undo()
        pickled = ReferDataset(source, dataset, **changes)
        assert pickled.refs_path.suffix == ".p"
        assert data.all_expressions() == pickled.all_expressions()
        assert data.fingerprint == pickled.fingerprint


def test_json_is_preferred_to_the_pickle_beside_it(tmp_path, monkeypatch):
    write_refer(tmp_path)
    before = ReferDataset(tmp_path)
    assert converted(tmp_path) == [f"wrote {tmp_path}/refcoco/refs(unc).json: 2 refs, 0.0 MB"]
    monkeypatch.setattr(refs_module, "load_plain_pickle", None)
    after = ReferDataset(tmp_path)
    assert (after.refs_path.name, after.name) == ("refs(unc).json", "refcoco(unc)")
    assert (after.fingerprint, after.all_expressions()) == (before.fingerprint, before.all_expressions())
    assert sorted(path.name for path in (tmp_path / "refcoco").iterdir()) == [
        "instances.json", "refs(unc).json", "refs(unc).p"
    ]  # fmt: skip


def test_all_fields_are_kept(tmp_path):
    entry = ref(0, "train", extra={"tokens": ["a", 1.5, None, True]}, sent_ids=(0, 1))
    converted(write_refer(tmp_path, [entry]))
    stored = json.loads((tmp_path / "refcoco" / "refs(unc).json").read_text())["refs"]
    assert stored == [entry | {"sent_ids": [0, 1]}]


def test_a_pickle_that_was_replaced_after_conversion_is_noticed(tmp_path):
    converted(write_refer(tmp_path))
    write_refer(tmp_path, [ref(5, "train")])
    with pytest.raises(ValueError, match=r"was converted from another refs\(unc\).p than the one beside it: run  aml"):
        ReferDataset(tmp_path)
    converted(tmp_path)
    assert ReferDataset(tmp_path).all_expressions()[0].ref_id == 5
    (tmp_path / "refcoco" / "refs(unc).p").unlink()
    assert ReferDataset(tmp_path).all_expressions()[0].ref_id == 5


@pytest.mark.parametrize("moment", ["write", "read back", "replace"])
def test_an_interrupted_conversion_leaves_what_was_there(tmp_path, monkeypatch, moment):
    write_refer(tmp_path)
    target = tmp_path / "refcoco" / "refs(unc).json"
    target.write_text('{"aml_refs": 1, "old": true}')

    def fail(*arguments, **options):
        raise OSError("no space left")

    if moment == "write":
        monkeypatch.setattr(Path, "write_text", lambda path, *a, **k: (path.write_bytes(b"[{"), fail()))
    elif moment == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(json, "dumps", lambda value, **_: '{"aml_refs": 1, "sha256": "", "refs": []}')
    with pytest.raises((OSError, ValueError)):
        converted(tmp_path)
    assert target.read_text() == '{"aml_refs": 1, "old": true}'
    assert len(list(target.parent.iterdir())) == 3


def test_json_from_elsewhere_is_read_and_left_alone(tmp_path):
    write_refer(tmp_path)
    path = tmp_path / "refcoco" / "refs(unc).json"
    path.write_text(json.dumps([ref(9, "train")]))
    assert [e.ref_id for e in ReferDataset(tmp_path).all_expressions()] == [9, 9]
    assert converted(tmp_path)[0].startswith(f"left {path} as it is")
    (line,) = converted(tmp_path, out=tmp_path / "out")
    assert line.startswith(f"left {path} as it is") and not (tmp_path / "out").exists()
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"refs\(unc\).json is not JSON"):
        ReferDataset(tmp_path)
    path.write_text('{"aml_refs": 99}')
    with pytest.raises(ValueError, match="is of format 99, this version reads 1: convert it again"):
        ReferDataset(tmp_path)


def test_nothing_is_converted_of_a_hostile_or_odd_pickle(tmp_path):
    write_refer(tmp_path, pickle.dumps([ref(0, "train", extra=Hostile(os.mkdir, str(tmp_path / "trace")))]))
    with pytest.raises(pickle.UnpicklingError, match="trust"):
        converted(tmp_path)
    write_refer(tmp_path, [ref(0, "train", extra={1, 2})])
    with pytest.raises(ValueError, match="cannot be written as JSON: Object of type set"):
        converted(tmp_path)
    assert not list(tmp_path.rglob("*.json*"))[1:] and not (tmp_path / "trace").exists()
    with pytest.raises(FileNotFoundError, match=r"no file refs\(<split_by>\).p under"):
        converted(tmp_path / "images")


# Unions


def write_union(root: Path, places: dict[str, dict[int, str]]) -> Path:
    """Data sets by name ("refcocog(umd)") with one object on each of their images; places: image -> split."""
    for name, splits in places.items():
        dataset, split_by = name.rstrip(")").split("(")
        refs = [ref(image, split, ann_id=image, image_id=image) for image, split in splits.items()]
        images = {image for other, own in places.items() if other.startswith(f"{dataset}(") for image in own}
        annotations = [annotation(image, image_id=image) for image in images]
        files = [(image, f"{image}.png") for image in images]
        write_refer(root, refs, annotations, split_by, dataset, files=files)
    return root


def test_a_union_trains_on_no_image_that_a_member_holds_out(tmp_path):
    places = {
        "refcoco(unc)": {1: "train", 2: "val", 3: "testA", 4: "train"},
        "refcoco+(unc)": {1: "train", 2: "train", 3: "train", 5: "testB"},
        "refcocog(umd)": {1: "train", 4: "test", 5: "train", 6: "train"},
    }
    data = open_dataset(write_union(tmp_path, places), "union")
    assert isinstance(data, UnionDataset) and data.name == UNION
    train = data.expressions("train")
    assert [(e.sample_id, e.image_id) for e in train] == [
        ("refcoco(unc)/1-10", 1), ("refcoco(unc)/1-11", 1), ("refcoco+(unc)/1-10", 1), ("refcoco+(unc)/1-11", 1),
        ("refcocog(umd)/1-10", 1), ("refcocog(umd)/1-11", 1), ("refcocog(umd)/6-60", 6), ("refcocog(umd)/6-61", 6),
    ]  # fmt: skip
    assert [e.sample_id for e in data.expressions("val")] == ["refcoco(unc)/2-20", "refcoco(unc)/2-21"]
    assert {e.image_id for e in data.expressions("test")} == {3, 4, 5}
    for expression in train:
        np.testing.assert_array_equal(data.mask(expression), LEFT_MASK)
    items = RISDataset(data, "train", image_size=16, tokenize=tokenize_letters, train=True, **PLAIN)
    assert len(items) == 4  # objects, although their ref_ids are the same
    with pytest.raises(ValueError, match="none of .* has it; their splits: train, val, testA, testB, test"):
        data.expressions("testC")


def test_a_member_may_lie_in_a_folder_of_its_own(tmp_path):
    """So that its name holds a slash."""
    root = write_union(tmp_path, {"mine/boxes(me)": {1: "train", 2: "val"}, "refcoco(unc)": {1: "train"}})
    data = open_dataset(root, "mine/boxes,refcoco")
    (expression,) = (e for e in data.expressions("train") if e.sample_id == "mine/boxes(me)/1-10")
    np.testing.assert_array_equal(data.mask(expression), LEFT_MASK)
    assert data.images_of("val") == open_dataset(root, "mine/boxes").images_of("val")


def test_a_partition_holds_out_images_of_a_union_where_it_is_a_member(tmp_path):
    places = {
        "refcoco(unc)": {1: "train", 2: "train"}, "refcoco+(unc)": {1: "train"},
        "refcocog(umd)": {2: "train", 3: "train"}, "refcocog(google)": {1: "train", 2: "val", 3: "train"},
    }
    root = write_union(tmp_path, places)
    google = open_dataset(root, "refcocog(google)")
    for name, images, shared in (("union", {1, 2, 3}, 1), (f"{UNION},refcocog(google)", {1, 3}, 0)):
        trained = open_dataset(root, name)
        assert {e.image_id for e in trained.expressions("train")} == images
        assert shared_images(trained, google, "val") == (shared, 1)


def test_images_are_shared_although_the_photographs_of_the_training_are_not_there(tmp_path):
    root = write_union(tmp_path, {"refcoco(unc)": {1: "train", 2: "train"}, "refcoco+(unc)": {2: "val", 3: "val"}})
    for photograph in ("1.png", "2.png"):
        next(root.rglob(photograph)).unlink()
    assert shared_images(open_dataset(root, "refcoco"), open_dataset(root, "refcoco+"), "val") == (1, 2)


@given(st.data())
@settings(max_examples=25)
def test_no_union_leaks(tmp_path_factory, data):
    splits = st.sampled_from(["train", "train", "train", "val", "test"])
    names = ["refcoco(unc)", "refcocog(umd)", "refcocog(google)"]
    images = st.dictionaries(st.integers(1, 6), splits, min_size=1)
    places = data.draw(st.fixed_dictionaries({name: images for name in names}))
    root = write_union(tmp_path_factory.mktemp("union"), places)
    held_out = {i for splits in places.values() for i, split in splits.items() if split != "train"}
    free = {(name[:8], i) for name, splits in places.items() for i in splits if i not in held_out}
    union = open_dataset(root, ",".join(names))
    if not free:
        with pytest.raises(ValueError):
            union.expressions("train")
        return
    train = union.expressions("train")
    assert {(e.sample_id[:8], e.image_id) for e in train} == free
    assert len(train) == 2 * len(free)  # a sentence of both partitions of RefCOCOg is there once


@needs_golden
def test_the_union_of_the_golden_sets():
    """Their own mixture of the same refs also leaves out the image that its validation split holds."""
    golden = json.loads((GOLDEN / "refer_data.json").read_text())
    union = open_dataset(GOLDEN / "refer_tiny", "union")
    train = union.expressions("train")
    assert {e.image_id for e in train} == set(golden["refcocom"]["splits"]["train"]["img_ids_sorted"])
    of_refcoco = {e.ref_id for e in train if e.sample_id.startswith("refcoco(unc)/")}
    assert of_refcoco >= set(golden["refcocom"]["splits"]["train"]["ref_ids"])
    held_out = {i for s in ("val", "test") for i in golden["refcoco"]["splits"][s]["img_ids_sorted"]}
    kept = {i for i in golden["refcoco"]["splits"]["train"]["img_ids_sorted"] if i not in held_out}
    assert {e.image_id for e in train if e.sample_id.startswith("refcoco(unc)/")} == kept
    assert union.fingerprint not in {member.fingerprint for member in union.members.values()}


@pytest.mark.parametrize(
    ("dataset", "split_by", "message"),
    [
        ("refcoco(unc)", "google", "says unc, split_by says google"),
        ("refcoco(unc),refcoco(unc)", None, "each may be given once"),
        ("refcoco,refcoco+", "unc", "part of the name, as in refcoco"),
        ("refcoco(unc", None, r"'refcoco\(unc' is not of the form name or name\(split_by\)"),
        ("refcoco,", None, "'' is not of the form"),
    ],
)
def test_names_that_say_nothing_are_errors(tmp_path, dataset, split_by, message):
    write_union(tmp_path, {"refcoco(unc)": {1: "train"}, "refcoco+(unc)": {1: "train"}})
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, dataset, split_by)


def test_a_name_may_hold_the_partition(tmp_path):
    write_union(tmp_path, {"refcocog(umd)": {1: "train"}})
    write_refer(tmp_path, [ref(1, "val")], split_by="google", dataset="refcocog")
    for arguments in (("refcocog(google)",), ("refcocog", "google"), ("refcocog(google)", "google")):
        assert open_dataset(tmp_path, *arguments).splits() == ["val"]


# Images left out


@needs_real
def test_images_are_left_out_when_asked_and_counted(tmp_path):
    whole = ReferDataset(REAL)
    name = whole.expressions("train")[0].image_path.name
    (tmp_path / "bad.txt").write_text(f"{name}\ttruncated file\n\nnowhere.jpg\n")
    skip = read_skip_list(tmp_path / "bad.txt")
    assert skip == [name, "nowhere.jpg"]
    part = open_dataset(REAL, skip=skip)
    lost = {e.ref_id for e in whole.all_expressions() if e.image_path.name == name}
    assert part.skipped == len(lost) > 0 and whole.skipped == 0
    assert part.expressions("train") == [e for e in whole.expressions("train") if e.image_path.name != name]
    assert part.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="skip names all of its images"):
        ReferDataset(REAL, skip={e.image_path.name for e in whole.all_expressions()})


def test_a_list_of_images_from_another_editor_is_read(tmp_path):
    """Windows begins files with a mark, and ends lines otherwise."""
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfa.png\tmissing\r\nb c.png \r\n  \r\n")
    assert read_skip_list(tmp_path / "bad.txt") == ["a.png", "b c.png"]


@pytest.mark.parametrize("dataset", ["refcoco", "refcoco,refcocog"])
def test_names_to_leave_out_that_no_image_has_are_told(tmp_path, capsys, dataset):
    parts = [ref(0, "train"), ref(1, "val", image_id=4, ann_id=9)], [annotation(7), annotation(9, image_id=4)]
    write_refer(tmp_path, *parts, files=((3, "a.png"), (4, "b.png")))
    write_refer(tmp_path, *parts, files=((3, "a.png"), (4, "c.png")), dataset="refcocog", split_by="umd")
    (tmp_path / "bad.txt").write_text("b.png\nc.png\n./a.png\n")
    open_data(load(None, [f"data.root={tmp_path}", f"data.dataset={dataset}", f"data.skip={tmp_path / 'bad.txt'}"]))
    told = capsys.readouterr().err
    unknown = "./a.png, c.png" if dataset == "refcoco" else "./a.png"
    assert f"{1 + (dataset == 'refcoco')} of 3 names are of no image of refcoco(unc)" in told and f"({unknown})" in told
