"""A miniature of the demo: every file, numbers equal to a fresh evaluation, going on, and refusals."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from aml import demo, demo_examples, demo_results, evaluation, figures
from aml.config import ConfigError

TRAIN = ("train.log_every=2", "train.steps=6", "train.batch_size=4", "optim.lr=0.003")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text_encoder = tiny.write_text_encoder(folder / "text")
    model = [w for w in tiny.settings("unused", text_encoder, "unused") if w.startswith(("model", "alignment"))]
    settings = demo.DemoSettings(
        train_scenes=4,
        val_scenes=1,
        test_scenes=3,
        scene_size=64,
        seed=3,
        train=(*model, "train.workers=0", *TRAIN),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report = demo.run_demo(folder / "out", settings)
    yield folder / "out", settings, json.loads((folder / "out" / "results.json").read_text()), report
    torch.set_num_threads(threads)


def test_every_file_is_there_and_is_a_picture(made):
    out, _, _, report = made
    assert report == out / "report.html"
    for name in figures.PICTURES:
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{name} is blank"
    with Image.open(out / "picture.png") as picture:
        assert picture.width == 1600


def test_the_report_is_self_contained_and_holds_the_numbers(made):
    _, _, results, report = made
    page = report.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name, found in results["strategies"].items():
        row = re.search(rf"<tr><td class=\"name\">[^\n]*?</span>{name}</td>(.*?)</tr>", page).group(1)
        cells = re.findall(r">([^<]+)</td>", row)
        wanted = [f"{100 * found[c][m]:.1f}" for c in demo_results.CONDITIONS for m in demo_results.SHOWN]
        assert cells == wanted
    assert demo_results.table(results).count("\n") > 15


def test_results_equal_a_fresh_evaluation(made):
    out, settings, results, _ = made
    for strategy, perturb in (("loss", None), ("random", ("blur", settings.severity))):
        run = demo.load_run(demo._config(out, settings, strategy))
        dataset, aligner = run.dataset("test"), None if perturb else run.aligner
        records = evaluation.evaluate(
            run.model, dataset.disturbed(perturb), batch_size=4, aligner=aligner, progress=False
        )
        fresh = evaluation.metrics(records, dataset.sample_ids)
        assert results["strategies"][strategy][perturb[0] if perturb else "clean"] == pytest.approx(fresh)
        assert results["sentences"] == len(dataset) > 0


def test_strategies_started_alike_and_left_out_alike(made):
    _, _, results, _ = made
    found = results["strategies"]
    assert found["none"]["kept"] == 1
    assert 0.7 < found["loss"]["kept"] < 1
    for control in ("random", "easiest"):  # as many as "loss", as far as their maps agree
        assert found[control]["kept"] == pytest.approx(found["loss"]["kept"], abs=0.01)
    assert all(each["target_left_out_of_loss"] == 0 for each in found.values())
    assert found["none"]["differences"]["clean"] == {"mIoU": 0, "low": 0, "high": 0}


def test_what_is_finished_is_not_done_again(made, monkeypatch):
    out, settings, results, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()}
    monkeypatch.setattr(demo, "_train", None)
    monkeypatch.setattr(demo, "_evaluate", None)
    demo.run_demo(out, settings)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/**/*") if path.is_file()} == before
    again = json.loads((out / "results.json").read_text())
    assert again["strategies"] == results["strategies"] and again["examples"] == results["examples"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"severity": 4}, "severity: 2 -> 4"),
        ({"test_scenes": 5}, "test_scenes: 3 -> 5"),
        ({"train": (*TRAIN, "optim.lr=0.1")}, "optim.lr: 0.003 -> 0.1"),
    ],
)
def test_other_settings_are_refused(made, change, told):
    out, settings, _, _ = made
    if "train" in change:
        change = {"train": (*settings.train, "optim.lr=0.1")}
    with pytest.raises(ValueError, match="other settings") as error:
        demo.run_demo(out, demo.replace(settings, **change))
    assert told in str(error.value) and "--out" in str(error.value)


def test_a_wrong_setting_starts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="train.stepps"):
        demo.run_demo(tmp_path / "out", demo.DemoSettings(train=("train.stepps=3",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("points", "width", "headline", "line"),
    [
        (0.5, 1.0, "no difference", "not distinguishable from zero"),
        (1.5, 1.0, "by less than another seed may: +1.5 on clean, +1.5 on noise", "another seed may undo it"),
        (6.0, 1.0, "better on clean, noise", "more than a seed usually changes"),
        (-6.0, 1.0, "worse on clean, noise", "more than a seed usually changes"),
        (6.0, 9.0, "no difference", "not distinguishable from zero"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals_allow(made, points, width, headline, line):
    results = json.loads(json.dumps(made[2]))
    for condition in demo_results.CONDITIONS:
        results["strategies"]["loss"]["differences"][condition] = {
            "mIoU": points / 100,
            "low": (points - width) / 100,
            "high": (points + width) / 100,
        }
    said = demo_results.verdict(results)
    assert headline in said[0] and said[-1] == demo_results.CAVEAT
    assert all(line in text for text in said[1 : 1 + len(demo_results.CONDITIONS)])


def test_paired_difference_by_hand():
    def records(ious):
        return [{"sample_id": name, "intersection": i, "union": 10, "target": 10} for name, i in ious.items()]

    base = records({"a": 1, "b": 2, "c": 3})
    better = records({"c": 5, "b": 4, "a": 3})  # paired by id, not by place
    images = {"a": 1, "b": 1, "c": 2}
    assert demo_results.paired_difference(better, base, images) == pytest.approx({"mIoU": 0.2, "low": 0.2, "high": 0.2})
    mixed = demo_results.paired_difference(records({"a": 5, "b": 6, "c": 2}), base, images)
    # Two images, gains .4, .4 and -.1: their resamples are (1, 1), (1, 2), (2, 2).
    assert mixed == pytest.approx({"mIoU": 0.7 / 3, "low": -0.1, "high": 0.4})
    with pytest.raises(ValueError, match="same sample ids"):
        demo_results.paired_difference(better[:2], base, images)


@pytest.mark.parametrize("protect", [True, False])
def test_pixels_shown_as_left_out_are_those_the_loss_leaves_out(protect):
    from aml_kernels import masked_loss

    torch.manual_seed(0)
    similarity, target = torch.rand(3, 5, 5), torch.rand(3, 40, 40) > 0.7
    shown, _ = demo_examples.left_out_pixels(similarity, target, 0.25, protect)
    _, stats = masked_loss(
        torch.zeros(3, 10, 10),
        target,
        similarity,
        quantile=0.25,
        protect_target=protect,
        bce_weight=1.0,
        dice_weight=1.0,
        return_stats=True,
    )
    assert shown.flatten(1).sum(1).tolist() == (1600 - stats.kept).tolist()


def test_examples_are_from_different_images_and_at_fixed_ranks():
    records = [{"sample_id": f"{i}-{j}", "intersection": i, "union": 100} for i in range(100) for j in range(2)]
    image_of = {record["sample_id"]: int(record["sample_id"].split("-")[0]) for record in records}
    chosen = demo_examples.choose_examples(records, image_of)
    assert len({image_of[name] for name in chosen}) == len(demo_examples.RANKS)
    for name, rank in zip(chosen, demo_examples.RANKS, strict=True):
        assert abs(image_of[name] - 100 * rank) <= 2
