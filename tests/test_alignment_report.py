"""`aml alignment-report` in miniature: its files, and its numbers against those of an evaluation and by hand."""

import argparse
import json
import math
import pickle
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from aml import alignment_maps, assembly, checkpoint, cli, evaluation, predict
from aml.alignment_tables import markdown
from aml.commands import alignment_report
from aml.config import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tiny.write_data(folder / "data", train=6, val=3)
    tiny.write_text_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A run of two steps, and a report on it."""
    words = tiny.settings(place / "data", place / "encoder", place / "run", "train.steps=2", "alignment.warmup=0")
    assert cli.main(["train", *words]) == 0
    options = ["--steps", "3", "--seeds", "2", "--sentences", "9", "--pictures", "2"]
    out = place / "report"
    assert cli.main(["alignment-report", "--checkpoint", str(place / "run"), "--out", str(out), *options]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_files_are_there_and_show_something(run):
    out, results = run
    for name in ("scores.png", "maps.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, name
    text = (out / "report.md").read_text()
    assert text == markdown(results)
    for name, seeds in results["maps"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert all(f"{seed['auc']:.3f}" in row for seed in seeds[:1])
    assert set(results["maps"]) == {
        "of this run", "trained", "trained, softmax", *alignment_maps.UNTRAINED, *alignment_maps.WITHOUT_TEXT,
    }  # fmt: skip
    assert len(results["maps"]["gaussian"]) == 2 and results["sentences"] == 9
    assert "--steps 3 --seeds 2 --sentences 9 --pictures 2 --checkpoint run --out report`" in text


def test_the_map_of_the_run_is_scored_as_an_evaluation_does(run, place):
    _, results = run
    folder = checkpoint.resolve(place / "run")
    settings = load(folder / "config.yaml")
    model = predict.load_model(folder)
    aligner = assembly.build_aligner(settings, model)
    checkpoint.load_weights(folder, aligner=aligner)
    dataset = assembly.build_dataset(settings, assembly.open_data(settings), model, "val", train=False)
    records = {r["sample_id"]: r for r in evaluation.evaluate(model, dataset, aligner=aligner, progress=False)}
    for record in results["records"]:
        (auc, wrong, *shares) = record["maps"]["of this run"][0]
        expected = records[record["sample_id"]]
        assert [auc, wrong, shares[alignment_maps.QUANTILES.index(0.25)]] == pytest.approx(
            [expected["auc"], expected["auc_wrong_sentence"], expected["target_left_out"]], abs=1e-4
        )


def test_means_and_their_error_over_images():
    """Two sentences of an image that say the same are worth no more than one."""

    def records(repeat: int) -> list[dict]:
        aucs = (0.2, 0.4, 0.9)
        shares = [0.5] * 2 * len(alignment_maps.QUANTILES)
        return [
            {"image_id": image, "maps": {"x": [[auc, 0.5, *shares]]}}
            for image, auc in enumerate((*aucs, math.nan))
            for _ in range(repeat)
        ]

    once, thrice = (alignment_maps.summary(records(count), "x", 0) for count in (1, 3))
    assert once["auc"] == pytest.approx(0.5) and once["wrong"] == 0.5
    assert once["error"] == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3))
    assert [thrice["auc"], thrice["error"]] == pytest.approx([once["auc"], once["error"]])


def test_the_paper_to_the_letter_is_degenerate(run):
    """Whether a pixel is weak depends on the number of words alone: 1 / L against 0.4."""
    paper = run[1]["literal"]["paper: entries N(0, 1/2048)"]
    for count, row in paper.items():
        if count == "all":
            continue
        assert row["largest"] == pytest.approx(1 / int(count), rel=0.12)
        assert row["below"] == row["target_below"] == row["by_pixel"] == (0.0 if int(count) < 3 else 1.0)
    assert set(paper) > {"all"}


def test_the_released_masking_blanks_nearly_everything():
    rows = alignment_maps.released_shares(draws=4)
    scattered, smooth = ([row[name] for row in rows] for name in ("scattered", "smooth"))
    assert rows[3]["low"] == pytest.approx(20 / 196)
    assert 0.7 < scattered[3] <= 1 and 0.9 < smooth[3] <= 1 and rows[3]["quarter"] < 0.03
    assert scattered == sorted(scattered)


def test_literal_readings_of_a_quarter():
    similarity = torch.ones(2, 4, 4)
    similarity[1] = 0
    image, target = torch.zeros(2, 3, 128, 128), torch.zeros(2, 128, 128)
    target[:, :9] = 1
    found = alignment_maps._literal(similarity, image, target)
    expected = {"largest": [1, 0], "below": [0, 1], "target_below": [0, 1], "by_pixel": [0, 1], "by_block": [0, 0.25]}
    for name, values in (expected | {"released": [0, 1]}).items():
        assert found[name].tolist() == pytest.approx(values), name


def test_literal_readings_leave_padding_out():
    """A picture of 64 x 128 in a letterbox, its upper half weak, gives what it gives without the padding."""
    similarity = torch.full((1, 4, 4), 0.1)
    similarity[:, 2:] = 0.9
    target = torch.zeros(1, 128, 128, dtype=torch.uint8)
    target[:, 80:90, 10:20] = 1
    valid = torch.zeros(1, 128, 128, dtype=torch.bool)
    valid[:, 32:96] = True
    found = alignment_maps._literal(similarity, torch.zeros(1, 3, 128, 128), target, valid)
    inside = alignment_maps._literal(similarity[:, 1:3], torch.zeros(1, 3, 64, 128), target[:, 32:96])
    for name in ("largest", "below", "target_below", "by_pixel"):
        torch.testing.assert_close(found[name], inside[name], rtol=0, atol=1e-6)
    assert found["by_block"] == 0.125 and "released" not in found  # one of eight blocks


def test_the_trained_pair_learns(place):
    settings = load(None, tiny.settings(place / "data", place / "encoder", place / "unused"))
    torch.manual_seed(0)
    from aml.models import build_model

    model = build_model(**settings.model.options()).eval()
    dataset = assembly.build_dataset(settings, assembly.open_data(settings), model, "train", train=False)
    options = {"dim": 8, "batch_size": 4, "lr": 0.02, "device": torch.device("cpu")}
    losses = []
    for steps in (1, 25):
        pair = alignment_maps.trained_maps(model, dataset, steps=steps, **options)["trained"][0]
        batch = alignment_maps.collate([dataset[i] for i in range(len(dataset))])
        with torch.no_grad():
            features = model.encode(batch["image"], batch["tokens"], batch["text_mask"])
            losses.append(pair.auxiliary_loss(pair(features), batch["target"]).item())
    assert losses[1] < 0.8 * losses[0]


def test_a_checkpoint_keeps_its_settings_where_scenes_are_rendered(run, place, tmp_path, monkeypatch):
    """As one of `aml convert`, which names no data."""
    folder = checkpoint.resolve(place / "run")
    with checkpoint.written_whole(tmp_path / "converted") as converted:
        for file in folder.iterdir():
            if file.name != "COMPLETE":
                shutil.copyfile(file, converted / file.name)
        text = (converted / "config.yaml").read_text()
        (converted / "config.yaml").write_text(text.replace(f"root: {place / 'data'}", "root: ''"))
    monkeypatch.setattr(alignment_report, "_render", lambda folder: place / "data")
    few = ["--steps", "0", "--seeds", "1", "--sentences", "2", "--pictures", "0"]
    words = ["--checkpoint", str(tmp_path / "converted"), "--out", str(tmp_path / "report"), *few]
    assert cli.main(["alignment-report", *words]) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["data"] == "rendered scenes" and "of this run" in results["maps"]


def test_settings_that_the_checkpoint_has_settled_are_refused(run, place, tmp_path, capsys):
    words = ["--checkpoint", str(place / "run"), "--out", str(tmp_path / "report"), "model.name=caris"]
    assert cli.main(["alignment-report", *words]) == 2
    assert "model.name=caris: the checkpoint's own is used" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_the_command_in_a_report_can_be_given_to_a_shell():
    parser = argparse.ArgumentParser()
    alignment_report.add_arguments(parser)
    options = parser.parse_args(["--out", "runs/the report", "--data", "my data", "--pictures", "0"])
    options.settings = ["data.dataset=refcoco(unc)", "data.field=raw"]
    assert alignment_report._command(options) == (
        "aml alignment-report --pictures 0 --data 'my data' --out 'the report' "
        "'data.dataset=refcoco(unc)' data.field=raw"
    )


def test_mistakes(place, capsys):
    for words, message in (
        (["--out", "x", "--steps", "-1"], "'-1': expected a whole number"),
        (["--out", "x", "--checkpoint", str(place / "data")], "data"),
        (["--out", "x", "--data", str(place / "data"), "--split", "nonsense"], "nonsense"),
        ([], "--out"),
    ):
        try:
            assert cli.main(["alignment-report", *words]) == 2
        except SystemExit as stop:
            assert stop.code == 2
        assert message in capsys.readouterr().err


def test_a_sentence_without_a_target_leaves_the_results_json(run, place, tmp_path):
    """Which has no word for NaN, its AUC."""
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    file = next(data.rglob("refs(*).p"))
    refs = pickle.loads(file.read_bytes())
    next(ref for ref in refs if ref["split"] == "val")["ann_id"] = -1
    file.write_bytes(pickle.dumps(refs))
    few = ["--steps", "0", "--seeds", "1", "--pictures", "0", "--data", str(data)]
    assert cli.main(["alignment-report", "--checkpoint", str(place / "run"), "--out", str(tmp_path / "x"), *few]) == 0
    text = (tmp_path / "x/results.json").read_text()
    results = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert None in [record["maps"]["of this run"][0][0] for record in results["records"]]


def test_padding_is_no_part_of_a_letterboxed_picture(place, tmp_path):
    """Of wide pictures, half the square: what is left out at a quantile is that share of the picture."""
    root = tmp_path / "data"
    shutil.copytree(place / "data", root)
    file = next(root.rglob("instances.json"))
    instances = json.loads(file.read_text())
    for image in instances["images"]:
        path = next(root.rglob(image["file_name"]))
        Image.open(path).crop((0, 16, 64, 48)).save(path)
        image["height"] = 32
    for each in instances["annotations"]:
        mask = coco_mask.decode(each["segmentation"] | {"counts": each["segmentation"]["counts"].encode()})[16:48]
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        each["segmentation"] = {"size": [32, 64], "counts": counts}
    file.write_text(json.dumps(instances))
    few = ["--steps", "2", "--seeds", "1", "--pictures", "1", "--data", str(root), "--out", str(tmp_path / "report")]
    words = tiny.settings(root, place / "encoder", tmp_path / "unused", "data.resize=letterbox", "model.image_size=256")
    assert cli.main(["alignment-report", *few, *words]) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    for name, (found,) in results["maps"].items():
        assert found["left_out"] == pytest.approx(results["quantiles"], abs=0.12), name  # of cells, resized
