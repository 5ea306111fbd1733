"""`aml data`: counts against the published ones, every kind of damage with its remedy, statistics and their picture."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pycocotools")
from PIL import Image
from refer_files import annotation, ref, write_refer
from test_data_sets import write_grefcoco, write_union
from test_refer import GOLDEN, REAL, Hostile, needs_golden, needs_real

from aml import cli
from aml.data import stats
from aml.data.check import check
from aml.data.published import PUBLISHED, Counts, deviations
from aml.data.refer import ReferDataset
from aml.data.union import open_dataset


def run(capsys, *words) -> tuple[int, str]:
    """Exit code and output of `aml data`."""
    try:
        code = cli.main(["data", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


# Counts


def test_the_published_counts_add_up():
    """Sums that were published on their own."""
    sums = {
        name: [sum(counts) for counts in zip(*splits.values(), strict=True)]
        for name, splits in PUBLISHED.items()
        if name != ("refcoco", "google")
    }
    assert sums == {
        ("refcoco", "unc"): [50000, 142210, 19994],
        ("refcoco+", "unc"): [49856, 141564, 19992],
        ("refcocog", "umd"): [49822, 95010, 25799],
        ("refcocog", "google"): [49822, 95010, 29348],  # images overlap
    }


def test_what_differs_from_the_published_counts_is_told():
    right = PUBLISHED["refcoco", "unc"]
    assert deviations("refcoco", "unc", right) == [] == deviations("my_data", "unc", {"train": Counts(1, 1, 1)})
    assert deviations("refcoco", "unc", right | {"val": Counts(8811, 1, 1)}) == [
        "the counts of val differ",
        "its val refs are those of all partitions of refcoco together, as in some copies on hubs",
    ]
    renamed = {"train": right["train"], "val": right["val"], "test": right["testA"], "testB": right["testB"]}
    assert deviations("refcoco", "unc", renamed) == ["testA not there", "test not part of it"]
    for sentences in (259859, 278232):  # as distributed, and as in the paper
        assert deviations("grefcoco", "unc", {"train": Counts(9, sentences - 1, 1), "val": Counts(9, 1, 1)}) == []
    assert "published are 17402 / - / -" in deviations("rrsisd", "unc", {"train": Counts(17401, 1, 1)})[0]


@needs_golden
def test_golden_data_are_usable_but_not_the_published_ones(capsys):
    code, said = run(capsys, "check", GOLDEN / "refer_tiny")
    assert code == 0 and "4 data sets: usable" in said
    rows = [line.split()[:4] for line in said.splitlines() if line.startswith(("  train", "  val", "  test"))]
    golden = json.loads((GOLDEN / "refer_data.json").read_text())
    for row in rows[:4]:
        expected = golden["refcoco"]["splits"][row[0]]
        counts = len(expected["ref_ids"]), expected["n_sents"], len(expected["img_ids_sorted"])
        assert tuple(map(int, row[1:])) == counts
    assert "published: 42404 / 120624 / 16994" in said
    assert "this is not refcoco as published: the counts of train, val, testA, testB differ" in said
    assert "1 ref with an annotation that covers no pixel (40-1018)" in said
    assert "1 empty sentence (11-1009)" in said
    assert "of 3 images that refcoco(unc) trains on, others hold out: refcocog(umd) 1" in said


@needs_real
def test_real_photographs_are_usable(capsys):
    code, said = run(capsys, "check", REAL)
    assert code == 0
    assert ["train", "138", "486", "54"] in [line.split()[:4] for line in said.splitlines()]
    assert ["val", "52", "162", "18"] in [line.split()[:4] for line in said.splitlines()]
    assert "testA, testB not there" in said and "FAIL" not in said


def test_several_targets_and_none_are_counted(tmp_path, capsys):
    refs = [ref(0, "train", ann_id=[7, 8]), ref(1, "train", ann_id=[-1]), ref(2, "val", ann_id=[7])]
    code, said = run(capsys, "check", write_grefcoco(tmp_path, refs))
    assert code == 0 and "2 sentences have several targets, 2 have none" in said
    assert "WARN  1 training image also in other splits: results on the latter will be too good" in said


def test_damaged_characters_are_warned_of(tmp_path, capsys):
    sentences = [{"sent_id": i, "sent": text} for i, text in enumerate(["a dog", "a \ud800 dog"])]
    code, said = run(capsys, "check", write_refer(tmp_path, [ref(0, "train", sentences=sentences), ref(1, "val")]))
    assert code == 0 and "WARN  1 sentence with damaged characters, read as U+FFFD (0-1)" in said


@pytest.mark.parametrize(("there", "absent"), [("train", "val"), ("val", "train"), ("test", "train or val")])
def test_a_data_set_that_cannot_be_trained_on_is_warned_of(tmp_path, capsys, there, absent):
    code, said = run(capsys, "check", write_refer(tmp_path, [ref(0, there)]))
    assert code == 0 and f"WARN  no split {absent}; there is {there}" in said
    assert "no split" not in run(capsys, "check", write_refer(tmp_path))[1]


def test_partitions_by_object_share_images_by_design(tmp_path, capsys):
    write_refer(tmp_path, split_by="google", dataset="refcocog")
    code, said = run(capsys, "check", tmp_path)
    assert code == 0 and "note  1 training image also in other splits: this partition is by object" in said


def test_the_list_of_bad_images_is_made_room_for_before_the_search(tmp_path, capsys):
    write_refer(tmp_path)
    (tmp_path / "images/train2014/a.png").unlink()
    code, said = run(capsys, "check", tmp_path, "--bad", tmp_path / "new/bad.txt")
    assert code == 1 and (tmp_path / "new/bad.txt").read_text() == "a.png\tmissing\n"
    code, said = run(capsys, "check", tmp_path, "--bad", tmp_path / "new")
    assert code == 2 and "it is a folder" in said and "refcoco(unc)" not in said


# Damage


@pytest.fixture
def photographs(tmp_path):
    """A writable copy of the real photographs."""
    if not REAL.is_dir():
        pytest.skip(f"real photographs are not at {REAL}")
    root = shutil.copytree(REAL, tmp_path / "data", copy_function=shutil.copyfile)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    return root


def test_bad_images_are_named_counted_and_left_out_when_asked(photographs, tmp_path, capsys):
    data = ReferDataset(photographs)
    paths = list(dict.fromkeys(e.image_path for e in data.all_expressions()))
    missing, truncated, resized = paths[:2], paths[2], paths[3]
    for path in missing:
        path.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-5000])
    Image.new("RGB", (30, 20)).save(resized)
    bad = tmp_path / "bad.txt"
    code, said = run(capsys, "check", photographs, "--bad", bad)
    assert code == 1 and "NOT usable: refcoco(unc)" in said
    assert "FAIL  2 of 72 images are missing in" in said and all(path.name in said for path in missing)
    assert f"1 image cannot be read ({truncated.name}: image file is truncated" in said
    assert f"1 image of another size than the annotations say ({resized.name})" in said
    assert "http://images.cocodataset.org/zips/train2014.zip; or name the right folder with --images" in said
    lines = dict(line.split("\t") for line in bad.read_text().splitlines())
    assert lines.keys() == {path.name for path in paths[:4]}
    assert lines[missing[0].name] == "missing" and lines[resized.name].startswith("is 30 x 20, the annotations say")

    code, said = run(capsys, "check", photographs, "--skip", bad)
    lost = {e.ref_id for e in data.all_expressions() if e.image_path in paths[:4]}
    assert code == 0 and f"{len(lost)} refs are left out with the images of the skip list" in said
    for path in missing:
        Image.new("RGB", (30, 20)).save(path)
    resized.unlink()
    _, said = run(capsys, "check", photographs, "--quick")
    assert truncated.name not in said and resized.name in said


@pytest.mark.parametrize("words", [(), ("--quick",)])
def test_images_of_more_than_eight_bits_are_bad(tmp_path, capsys, words):
    write_refer(tmp_path)
    Image.new("I;16", (10, 8), 30000).save(tmp_path / "images/train2014/a.png")
    code, said = run(capsys, "check", tmp_path, "--bad", tmp_path / "bad.txt", *words)
    assert code == 1 and "1 image cannot be read (a.png: has 16 bits or more per channel (mode I;16)" in said
    assert (tmp_path / "bad.txt").read_text().startswith("a.png\thas 16 bits")


def test_images_under_their_names_of_2017_are_recognised(tmp_path, capsys):
    write_refer(tmp_path, files=((3, "COCO_train2014_000000000003.jpg"),))
    folder = tmp_path / "images" / "train2014"
    (folder / "COCO_train2014_000000000003.jpg").rename(folder / "000000000003.jpg")
    code, said = run(capsys, "check", tmp_path)
    assert code == 1 and "1 of them are there under their names of COCO 2017: rename or link them" in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "refcoco" / "instances.json").unlink(), "instances.json is missing"),
        (lambda root: (root / "refcoco" / "instances.json").write_text("{"), "is not a COCO instances file"),
        (lambda root: write_refer(root, b"\x80\x02]"), "was not read"),
        (lambda root: write_refer(root, pickle.dumps([Hostile(print, "hello")])), "it asks for"),
        (lambda root: write_refer(root, [ref(0, "train", ann_id=99)]), "ann_id 99 is not in"),
        (lambda root: write_refer(root, annotations=[annotation(7), annotation(7, None)]), "ann_id 7 is given to"),
        (lambda root: write_refer(root, annotations=[annotation(7, {"size": [1, 1], "counts": [1]})]), "2 damaged"),
        (lambda root: write_refer(root, annotations=[annotation(7) | {"segmentation": None}]), "2 damaged"),
    ],
)
def test_what_cannot_be_trained_on_is_a_failure(tmp_path, capsys, damage, message):
    damage(write_refer(tmp_path))
    write_refer(tmp_path, dataset="good")
    code, said = run(capsys, "check", tmp_path)
    failures = [line for line in said.splitlines() if "FAIL" in line]
    assert code == 1 and message in failures[0] and len(failures) == 1
    assert "annotations: github.com/lichengunc/refer" in said or "damaged" in message
    assert "hello" not in said
    assert said.endswith("2 data sets: NOT usable: refcoco(unc)\n")


def test_a_missing_image_folder_is_a_failure(tmp_path, capsys):
    shutil.rmtree(write_refer(tmp_path) / "images")
    code, said = run(capsys, "check", tmp_path)
    assert code == 1 and f"FAIL  no image folder {tmp_path}/images/train2014 or {tmp_path}/train2014" in said
    assert "images: COCO's train2014.zip" in said and "  train          1          2       1" in said


def test_one_data_set_may_be_chosen(tmp_path, capsys):
    write_union(tmp_path, {"refcocog(umd)": {1: "train"}, "refcoco(unc)": {1: "train"}})
    assert run(capsys, "check", tmp_path, "--dataset", "refcocog")[1].startswith("refcocog(umd)\n")
    code, said = run(capsys, "check", tmp_path, "--dataset", "refcocog", "--split-by", "google")
    assert code == 2 and f"no data set refcocog(google) under {tmp_path} (refcoco(unc), refcocog(umd))" in said
    (tmp_path / "empty").mkdir()
    code, said = run(capsys, "check", tmp_path / "empty")
    assert code == 2 and f"expected for example {tmp_path}/empty/refcoco/refs(unc).p beside an" in said
    code, said = run(capsys, "check", tmp_path, "--quik")
    assert code == 2 and "did you mean --quick?" in said


@pytest.mark.parametrize("command", ["check", "convert", "stats"])
def test_a_root_that_is_not_there_is_named(tmp_path, capsys, command):
    code, said = run(capsys, command, tmp_path / "nowhere")
    assert code == 2 and said.startswith(f"error: no folder {tmp_path}/nowhere: name the folder that holds annotations")


def test_check_and_convert_need_no_torch(tmp_path):
    code = f"""
import sys
from aml.cli import main
assert main(["data", "check", {str(write_refer(tmp_path))!r}]) == 0
assert main(["data", "convert", {str(tmp_path)!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_convert_says_what_it_wrote(tmp_path, capsys):
    code, said = run(capsys, "convert", write_refer(tmp_path))
    assert code == 0 and said == f"wrote {tmp_path}/refcoco/refs(unc).json: 2 refs, 0.0 MB\n"
    assert "is a pickle" not in run(capsys, "check", tmp_path)[1]
    code, said = run(capsys, "convert", tmp_path / "images")
    assert code == 2 and "no file refs(<split_by>).p" in said


# Statistics


def test_statistics_are_counted_by_hand(tmp_path):
    right = [[5.0, 0.0, 10.0, 0.0, 10.0, 8.0, 5.0, 8.0]]
    sentences = [{"sent_id": 1, "sent": "a red box"}, {"sent_id": 2, "sent": "box"}, {"sent_id": 3, "sent": "b c"}]
    refs = [
        ref(0, "train", ann_id=[7, 8], sentences=sentences),
        ref(1, "train", ann_id=[8]),
        ref(2, "train", ann_id=[-1]),
        ref(3, "val", ann_id=[7]),
    ]
    write_grefcoco(tmp_path, refs)
    instances = json.loads((tmp_path / "grefcoco/instances.json").read_text())
    instances["annotations"][1]["segmentation"] = right
    (tmp_path / "grefcoco/instances.json").write_text(json.dumps(instances))
    found = stats.collect(open_dataset(tmp_path, "grefcoco"))
    train = found["train"]
    assert (train.refs, train.images) == (3, 1)
    assert train.words.tolist() == [3, 1, 2, 2, 2, 2, 2]
    assert train.sentences.tolist() == [3, 2, 2] and train.targets.tolist() == [2, 1, 0]
    assert train.refs_per_image.tolist() == [3] and train.categories == {"box": 2, "(no target)": 1}
    assert train.area.tolist() == [pytest.approx((16 + 40) / 80), 0.5]
    assert (train.place[:, stats.GRID // 2 :] == 1).all() and train.place[0, 0] == 0
    row = stats.table(found).splitlines()[1].split("  ")
    assert [cell.strip() for cell in row if cell] == [
        "train", "3", "7", "1", "2, 3, 3", "2.33", "60.0, 51.0, 69.0", "1", "1"
    ]  # fmt: skip
    assert "most frequent targets: box 75 %, (no target) 25 %" in stats.table(found)


@needs_real
def test_statistics_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "stats.png"
    code, said = run(capsys, "stats", REAL, "--out", out)
    assert code == 0 and "train  138   486" in said and f"wrote {out}" in said
    picture = np.asarray(Image.open(out).convert("L"))
    panels = [panel for row in np.array_split(picture, 2) for panel in np.array_split(row, 3, axis=1)]
    assert all(len(np.unique(panel)) > 20 for panel in panels)


def test_statistics_of_a_set_without_any_target_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    write_grefcoco(tmp_path, [ref(0, "train", ann_id=[-1])])
    found = stats.collect(open_dataset(tmp_path, "grefcoco"))
    stats.draw(found, tmp_path / "stats.png", "nothing")
    assert "-" in stats.table(found) and (tmp_path / "stats.png").stat().st_size > 10_000


def test_masks_are_sampled_evenly(tmp_path):
    refs = [ref(i, "train") for i in range(10)]
    found = stats.collect(open_dataset(write_refer(tmp_path, refs)), masks=4)
    assert len(found["train"].area) == 4 and found["train"].refs == 10


@needs_golden
def test_reports_come_one_by_one():
    reports = check(GOLDEN / "refer_tiny", "refcoco", decode=False)
    assert next(reports).counts["train"] == Counts(5, 11, 3)
    assert next(reports, None) is None
