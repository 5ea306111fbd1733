"""REFER annotations: parity with the golden files, every mask format, refusal of damaged or hostile input."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from refer_files import SQUARE, annotation, ref, write_refer

from aml.data.plain_pickle import load_plain_pickle
from aml.data.refer import ReferDataset
from aml.data.refs import FIELDS
from aml.data.segmentation import decode_segmentation

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
GOLDEN = FIXTURES / "golden"
REAL = FIXTURES / "real_ris"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden fixtures are not at {GOLDEN}")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"real photographs are not at {REAL}")


# Parity with the released program


@needs_golden
@pytest.mark.parametrize("dataset", ["refcoco", "refcocog", "refcocom"])
@pytest.mark.parametrize("split", ["train", "val", "test", "testA", "testB", "testC", "testAB"])
def test_splits_match_golden(dataset, split):
    expected = json.loads((GOLDEN / "refer_data.json").read_text())[dataset]["splits"][split]
    data = ReferDataset(GOLDEN / "refer_tiny", dataset)
    if not expected["ref_ids"]:
        with pytest.raises(ValueError, match=r"its splits are train, val"):
            data.expressions(split)
        return
    expressions = data.expressions(split)
    assert list(dict.fromkeys(e.ref_id for e in expressions)) == expected["ref_ids"]
    assert len(expressions) == expected["n_sents"]
    assert sorted({e.annotation_ids[0] for e in expressions}) == expected["ann_ids"]
    assert sorted({e.image_id for e in expressions}) == expected["img_ids_sorted"]


@needs_golden
@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
def test_masks_sentences_and_categories_match_golden(split):
    golden = json.loads((GOLDEN / "refer_data.json").read_text())
    arrays = np.load(GOLDEN / "refer_data.npz")
    data = ReferDataset(GOLDEN / "refer_tiny")
    names = list(data.categories.values())
    expected_category = {item["ref_id"]: names[item["cls"]] for item in golden["dataset"][split]["items"]}
    for expression in data.expressions(split):
        mask = data.mask(expression)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, arrays[f"mask.{expression.ref_id}"])
        assert expression.sentence in golden["masks"][str(expression.ref_id)]["sents"]
        assert expression.category == expected_category[expression.ref_id]


@needs_golden
def test_run_lengths_match_the_polygon_they_were_made_of():
    truth = np.load(GOLDEN / "refer_data.npz")["rle.truth"]
    data = ReferDataset(GOLDEN / "refer_tiny", "refcoco+")
    for expression in data.expressions("train"):
        mask = data.mask(expression)
        if expression.sentence == "rle compressed list2":  # two parts: the truth and one more
            assert mask.sum() > truth.sum() and (mask >= truth).all()
        else:
            np.testing.assert_array_equal(mask, truth, err_msg=expression.sentence)


@needs_real
def test_real_photographs_are_read_whole():
    data = ReferDataset(REAL)
    assert data.splits() == ["train", "val"]
    expressions = data.expressions("train") + data.expressions("val")
    assert len(expressions) == 648
    assert len({e.ref_id for e in expressions}) == 190
    assert len({e.sample_id for e in expressions}) == 648
    for expression in expressions:
        mask = data.mask(expression)
        assert mask.shape == (expression.height, expression.width)
        assert mask.any(), expression
    photo = expressions[0]
    assert Image.open(photo.image_path).size == (photo.width, photo.height)


# Layout, fields, splits


def test_reads_either_field_and_takes_the_image_by_id(tmp_path):
    write_refer(tmp_path)
    first = ReferDataset(tmp_path).expressions("train")[0]
    assert (first.sample_id, first.sentence, first.category) == ("0-0", "box 0", "box")
    assert first.image_path == tmp_path / "images" / "train2014" / "a.png"
    assert ReferDataset(tmp_path, field="raw").expressions("train")[0].sentence == "Box 0!"
    with pytest.raises(ValueError, match="field='words': expected one of sent, raw"):
        ReferDataset(tmp_path, field="words")


@pytest.mark.parametrize(
    ("stored", "read"),
    [("the \ud800 dog", "the \ufffd dog"), ("a\udce9", "a\ufffd"), ("\ud83d\ude00\x00é", "\U0001f600\x00é")],
    ids=ascii,
)
@pytest.mark.parametrize("suffix", ["p", "json"])
def test_half_a_character_is_replaced_and_nothing_else(tmp_path, stored, read, suffix):
    """Neither a tokenizer takes it, nor a file in UTF-8. Two halves that belong together are put together."""
    refs = [ref(0, "train", sentences=[{"sent_id": 1, "sent": stored, "raw": f"{stored}!"}])]
    path = write_refer(tmp_path, refs) / "refcoco" / "refs(unc).p"
    if suffix == "json":
        path.unlink()
        path.with_suffix(".json").write_text(json.dumps(refs))
    assert [ReferDataset(tmp_path, field=f).expressions("train")[0].sentence for f in FIELDS] == [read, f"{read}!"]


def test_several_targets_and_none(tmp_path):
    right = [[6.0, 1.0, 9.0, 1.0, 9.0, 5.0, 6.0, 5.0]]
    refs = [ref(0, "train", ann_id=[7, 8]), ref(1, "train", ann_id=[-1])]
    data = ReferDataset(write_refer(tmp_path, refs, [annotation(7), annotation(8, right)]))
    both, _, none, _ = data.expressions("train")
    left_mask = decode_segmentation(SQUARE, 8, 10)
    right_mask = decode_segmentation(right, 8, 10)
    np.testing.assert_array_equal(data.mask(both), left_mask | right_mask)
    assert none.annotation_ids == () and not data.mask(none).any()


def test_a_ref_of_several_test_splits_belongs_to_each(tmp_path):
    data = ReferDataset(write_refer(tmp_path, [ref(0, "testAB"), ref(1, "testB")]))
    found = {
        split: {e.ref_id for e in data.expressions(split)} for split in ("testA", "testB", "test", "testAB")
    }
    assert found == {"testA": {0}, "testB": {0, 1}, "test": {0, 1}, "testAB": {0}}


def test_of_several_partitions_the_usual_one_is_read(tmp_path):
    write_refer(tmp_path, split_by="google")
    assert ReferDataset(tmp_path).name == "refcoco(google)"  # the only one there
    write_refer(tmp_path)
    assert ReferDataset(tmp_path).name == "refcoco(unc)"
    assert ReferDataset(tmp_path, split_by="google").refs_path.name == "refs(google).p"
    with pytest.raises(FileNotFoundError, match=r"split_by: 'umd'; .*google, unc: .* 'refcoco\(google\)' or 'refcoco"):
        ReferDataset(tmp_path, split_by="umd")
    for split_by in ("google", "umd"):
        write_refer(tmp_path, split_by=split_by, dataset="refcocog")
    assert ReferDataset(tmp_path, "refcocog").name == "refcocog(umd)"


def test_split_by_must_be_named_where_several_lie_and_none_is_usual(tmp_path):
    for split_by in ("mine", "yours"):
        write_refer(tmp_path, split_by=split_by, dataset="dogs")
    with pytest.raises(FileNotFoundError, match=r"not given.* has mine, yours: name the data set as 'dogs\(mine\)' or"):
        ReferDataset(tmp_path, "dogs")


def test_fingerprint_follows_the_content(tmp_path):
    one = ReferDataset(write_refer(tmp_path / "one")).fingerprint
    assert ReferDataset(write_refer(tmp_path / "same")).fingerprint == one
    assert ReferDataset(write_refer(tmp_path / "refs", [ref(0, "train")])).fingerprint != one
    assert ReferDataset(write_refer(tmp_path / "boxes", annotations=[annotation(7)])).fingerprint != one


def test_photographs_where_refer_itself_has_them_are_found(tmp_path):
    write_refer(tmp_path, images="images/mscoco/images/train2014")
    assert ReferDataset(tmp_path).expressions("train")[0].image_path.is_file()


def test_missing_parts_are_named(tmp_path):
    write_refer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dataset='refcocog'.*data sets under .*: refcoco"):
        ReferDataset(tmp_path, "refcocog")
    with pytest.raises(FileNotFoundError, match="no folder .*elsewhere: name the folder that holds annotations"):
        ReferDataset(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no image folder .*nowhere; name it: data.images=DIR"):
        ReferDataset(tmp_path, images=tmp_path / "nowhere")
    data = ReferDataset(tmp_path)
    (tmp_path / "images" / "train2014" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images of split 'train' are missing in .*\(a.png\)"):
        data.expressions("train")
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances.json is missing"):
        ReferDataset(tmp_path)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ([ref(0, "train", ann_id=99)], r"ref 0 of refs\(unc\).p: ann_id 99 is not in .*has 2 \(7, 8\)"),
        ([ref(0, "train", image_id=99)], r"image_id 99 is not in .*has 1 \(3\)"),
        ([ref(0, "train"), ref(0, "val")], "sentence 0 of ref 0 occurs twice"),
        (
            [ref(0, "train"), ref(0, "train", ann_id=8, sentences=[{"sent_id": 9, "sent": "other"}])],
            r"ref_id 0 is given to image 3 with ann_id \[7\] and image 3 with ann_id \[8\]; give each ref an id",
        ),
        ([{"ref_id": 0}], "entry 0 has no 'image_id'; it has ref_id"),
        ([ref(0, 3)], "entry 0: split is of type int"),
        ([ref(0, "train", sentences=[])], "ref 0 has no sentences"),
        ([], "expected a list of refs that is not empty"),
        ({"refs": []}, "holds dict, expected a list"),
    ],
)
def test_contradictions_are_errors(tmp_path, refs, message):
    with pytest.raises(ValueError, match=message):
        ReferDataset(write_refer(tmp_path, refs))


OTHER = [[5.0, 1.0, 9.0, 1.0, 9.0, 5.0, 5.0, 5.0]]


@pytest.mark.parametrize("change", [{"segmentation": OTHER}, {"category_id": 2}, {"image_id": 4}], ids=str)
@pytest.mark.parametrize("last", [0, 1])
def test_an_id_of_annotations_that_differ_is_an_error(tmp_path, change, last):
    """Whichever comes last; where a ref uses it."""
    twins = [annotation(7), annotation(7) | change]
    for refs in ([ref(0, "train")], [ref(0, "train", ann_id=[8, 7])]):
        write_refer(tmp_path, refs, [twins[1 - last], annotation(8), twins[last]])
        with pytest.raises(ValueError, match=r"ref 0 of .*: ann_id 7 is given to entries of .*instances.json that"):
            ReferDataset(tmp_path)
    assert ReferDataset(write_refer(tmp_path, [ref(0, "train", ann_id=8)], [*twins, annotation(8)])).splits()


def test_an_annotation_that_is_there_twice_and_the_same_is_one(tmp_path):
    """In what is used of it; three times, where the third differs, is an error."""
    twins = [annotation(7) | {"area": 16.0}, annotation(7)]
    data = ReferDataset(write_refer(tmp_path, [ref(0, "train")], twins))
    assert data.area(data.expressions("train")[0]) == 16
    with pytest.raises(ValueError, match="ann_id 7 is given to entries"):
        ReferDataset(write_refer(tmp_path, [ref(0, "train")], [*twins, annotation(7, OTHER), annotation(7)]))


def test_an_id_of_images_that_differ_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"image_id 3 is given to entries of .* differ: give each an id of its own"):
        ReferDataset(write_refer(tmp_path, files=((3, "a.png"), (3, "b.png"))))


# Hostile and damaged pickles


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    trace = tmp_path / "trace"
    for payload in (Hostile(os.mkdir, str(trace)), Hostile(eval, f"__import__('os').mkdir({str(trace)!r})")):
        refs = [ref(0, "train", file_name=payload)]
        write_refer(tmp_path, pickle.dumps(refs, protocol))
        with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\).p was not read: it asks for .*trust"):
            ReferDataset(tmp_path)
        assert not trace.exists()
    assert pickle.loads(pickle.dumps([Hostile(os.mkdir, str(trace))], protocol)) and trace.exists()


@pytest.mark.parametrize(
    "value", [np.float64(1.0), Path("x"), int, len], ids=["numpy", "object", "class", "function"]
)
def test_nothing_but_plain_values_is_unpickled(value):
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        load_plain_pickle(pickle.dumps([value]), "refs")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_plain_values_survive_and_truncated_ones_are_refused(data):
    leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    value = data.draw(st.recursive(leaf, lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=8))
    content = pickle.dumps(value, protocol=4)
    assert load_plain_pickle(content, "refs") == value
    with pytest.raises(pickle.UnpicklingError, match="refs was not read"):
        load_plain_pickle(content[: data.draw(st.integers(0, len(content) - 1))], "refs")


def test_python_2_text_is_read_as_utf8_else_latin1():
    assert load_plain_pickle(b"\x80\x02]q\x00U\x05caf\xc3\xa9q\x01a.", "refs") == ["café"]
    assert load_plain_pickle(b"\x80\x02]q\x00U\x04caf\xe9q\x01a.", "refs") == ["café"]


# Segmentations

masks = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)
)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


@given(masks)
@settings(max_examples=150, deadline=None)
def test_run_lengths_of_any_mask_come_back(mask):
    height, width = mask.shape
    compressed = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": [height, width], "counts": run_lengths(mask)}
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    for segmentation in (compressed, text, plain, [text], [plain, text]):
        np.testing.assert_array_equal(decode_segmentation(segmentation, height, width), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12) | st.binary(max_size=12))
@settings(max_examples=300, deadline=None)
def test_damaged_run_lengths_never_give_garbage(counts):
    try:
        mask = decode_segmentation({"size": [4, 5], "counts": counts}, 4, 5)
    except ValueError:
        return
    assert mask.shape == (4, 5) and mask.max() <= 1
    np.testing.assert_array_equal(
        mask, decode_segmentation({"size": [4, 5], "counts": run_lengths(mask)}, 4, 5)
    )


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 4], "counts": [20]}, r"RLE size is \[5, 4\], expected \[4, 5\]"),
        ({"size": [4, 5], "counts": [19]}, "RLE counts add up to 19 pixels, the image has 20"),
        ({"size": [4, 5], "counts": [30, -10]}, "RLE counts are not a list of run lengths"),
        ({"size": [4, 5], "counts": "P"}, "end in the middle of a number"),
        ({"size": [4, 5], "counts": "é"}, "no COCO run-length character"),
        ({"size": [4, 5]}, "RLE counts are not"),
        ([[0.0, 0.0, float("nan"), 1.0, 1.0, 1.0]], "finite coordinates"),
        ([[0.0, 0.0, 1e9, 1.0, 1.0, 1.0]], "finite coordinates"),
        ([[0.0, 0.0, 1.0, 1.0, 1.0]], "polygon is not a list x0, y0"),
        ([["a", "b"]], "polygon is not a list of numbers"),
        (None, "segmentation is NoneType"),
    ],
)
def test_damaged_segmentations_are_errors(segmentation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 4, 5)


def test_a_damaged_mask_names_annotation_and_sample(tmp_path):
    data = ReferDataset(
        write_refer(
            tmp_path, annotations=[annotation(7, {"size": [1, 1], "counts": [1]})], refs=[ref(0, "train")]
        )
    )
    with pytest.raises(ValueError, match="annotation 7 of sample 0-0: RLE size"):
        data.mask(data.expressions("train")[0])
    stranger = ReferDataset(write_refer(tmp_path / "b", [ref(5, "train", ann_id=8)])).expressions("train")[0]
    with pytest.raises(KeyError, match="annotation 8 of sample 5-50 is not in this data set"):
        data.mask(stranger)


def test_parts_of_less_than_three_points_cover_nothing():
    assert not decode_segmentation([], 4, 5).any()
    assert not decode_segmentation([[1.0, 1.0, 3.0, 3.0]], 4, 5).any()
