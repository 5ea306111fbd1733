"""Training, evaluation and prediction on every kind of data set, in a few steps of a tiny model."""

import json

import pytest
import tiny
from refer_files import ref
from test_data_sets import write_grefcoco, write_union
from test_refer import REAL, needs_real

from aml import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.write_text_encoder(tmp_path_factory.mktemp("runs") / "encoder")


def trained(tmp_path, encoder, data, *more):
    """The run directory and the lines of its log."""
    out = tmp_path / "run"
    words = tiny.settings(data, encoder, out, "train.steps=2", "train.batch_size=2", "alignment.warmup=0", *more)
    assert cli.main(["train", *words]) == 0
    return out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@needs_real
def test_letterboxed_photographs(tmp_path, encoder, capsys):
    out, log = trained(tmp_path, encoder, REAL, "data.resize=letterbox")
    assert log[-1]["sentences"] == 162
    photo = next((REAL / "images" / "train2014").iterdir())
    assert cli.main(["predict", str(photo), "the dog", "--checkpoint", str(out), "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{photo.stem}-mask.png").is_file()


def test_sentences_with_several_targets_and_with_none(tmp_path, encoder):
    refs = [ref(0, "train", ann_id=[7, 8]), ref(1, "train", ann_id=[-1]), ref(2, "val", ann_id=[-1])]
    _, log = trained(tmp_path, encoder, write_grefcoco(tmp_path, refs), "data.dataset=grefcoco")
    assert log[-1]["sentences"] == 2 and all(line["loss"] > 0 for line in log if line["kind"] == "train")


def test_a_union_without_an_image(tmp_path, encoder, capsys):
    places = {"refcoco(unc)": {1: "train", 2: "val", 3: "train"}, "refcocog(umd)": {1: "train", 3: "val", 4: "train"}}
    (tmp_path / "bad.txt").write_text("4.png\ttruncated\n")
    words = "data.dataset=refcoco(unc),refcocog(umd)", f"data.skip={tmp_path / 'bad.txt'}"
    out, log = trained(tmp_path, encoder, write_union(tmp_path, places), *words)
    said = capsys.readouterr()
    assert "2 objects, 4 validation sentences" in said.out  # image 1 of each; image 3 is held out, 4 left out
    assert f"data.skip={tmp_path / 'bad.txt'}: 1 objects left out of all splits" in said.err
    command = ["eval", "--checkpoint", str(out), "--split", "val", "data.dataset=refcocog(umd)"]
    assert cli.main([*command, "--out", str(tmp_path / "eval.json")]) == 0
    assert "objects left out" in capsys.readouterr().err
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"]["sentences"] == 2
