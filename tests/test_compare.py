"""`aml compare`: groups, intervals against a closed form and by simulation, refusals, words."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aml import bootstrap, cli, comparison, stored


def record(name, image, intersection, union=100, **more):
    counted = {"intersection": intersection, "union": union, "target": union}
    full = {f"full_{key}": value for key, value in counted.items()}
    return {"sample_id": name, "image": image, "sentence": f"s {name}", "no_target": False, **counted, **full} | more


def write(folder, name, records, seed=0, strategy="none", **more):
    """The evaluation of a run, as `aml eval` stores it."""
    evaluation = {
        "checkpoint": name, "dataset": "refcoco(unc)", "split": "val", "perturb": None, "image_size": 64,
        "resize": "squash", "records": records, "metrics": {},
        "config": {
            "alignment": {"strategy": strategy, "quantile": 0.25},
            "train": {"seed": seed, "out": name, "steps": 9, "workers": seed},
            "data": {"root": f"/{name}", "dataset": "refcoco"},
        },
    }  # fmt: skip
    return str(stored.save(folder, evaluation | more, name)[0])


def drawn(seed, gain=0.0, photographs=40, noise=4.0):
    """Three sentences on each photograph, as hard as the photograph; `gain` in pixels of 100."""
    hardness = np.random.default_rng(0).uniform(20, 80, photographs)
    rng = np.random.default_rng(100 + seed)
    return [
        record(f"{i}-{j}", f"{i}.jpg", int(np.clip(hardness[i] + gain + rng.normal(0, noise), 0, 100)))
        for i in range(photographs)
        for j in range(3)
    ]


@pytest.mark.parametrize("given", ["run", "run/checkpoints/step-00000004"])
def test_an_evaluation_of_weights_that_are_gone_is_refused(tmp_path, given):
    """As after a run was made anew in a folder whose evaluations stayed."""
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    marker = checkpoint / "COMPLETE"
    marker.write_text(json.dumps({"files": {"model.safetensors": {"sha256": "a"}, "state.json": {"sha256": "b"}}}))
    (checkpoint.parent / "best").write_text(checkpoint.name + "\n")
    weights = stored.weights_of(checkpoint)
    path = write(stored.folder_of(checkpoint), "refcoco-unc-val", drawn(0), weights=weights)
    comparison.read_run(str(tmp_path / given), "val")
    marker.write_text(marker.read_text().replace('"a"', '"c"'))
    with pytest.raises(ValueError, match=r"val.json is of other weights than .*: aml eval --checkpoint .*run"):
        comparison.read_run(str(tmp_path / given), "val")
    comparison.read_run(path, "val")
    marker.unlink()
    comparison.read_run(str(tmp_path / given), "val")


def compared(paths):
    return comparison.compare([comparison.read_run(path, "val") for path in paths])


def test_runs_are_grouped_by_all_settings_but_the_seed(tmp_path):
    paths = [
        write(tmp_path, f"{strategy}-{seed}", drawn(seed), seed, strategy)
        for strategy in ("none", "loss")
        for seed in (2, 0, 1)
    ]
    found = compared(paths)
    assert [each.label for each in found.settings] == ["alignment.strategy=none", "alignment.strategy=loss"]
    assert [[run.seed for run in each.runs] for each in found.settings] == [[0, 1, 2]] * 2
    for run, value in zip(found.settings[0].runs, found.settings[0].values["mIoU"], strict=True):
        records = run.evaluation["records"]
        assert value == pytest.approx(np.mean([r["intersection"] / r["union"] for r in records]))
    text = comparison.markdown(found)
    values = 100 * np.array(found.settings[0].values["oIoU"])
    assert f"| {values.mean():.2f} ± {values.std(ddof=1):.2f} |" in text
    assert "120 sentences about 40 photographs" in text and "0, 1, 2" in text


def test_what_is_drawn_are_photographs():
    """An interval by the closed form for a mean over photographs, all with the same number of sentences."""
    rng = np.random.default_rng(1)
    gains = rng.normal(0, 8, 200).round().astype(int)
    ours = [record(f"{i}-{j}", f"{i}", 50 + int(gain)) for i, gain in enumerate(gains) for j in range(5)]
    theirs = [record(f"{i}-{j}", f"{i}", 50) for i in range(200) for j in range(5)]
    photographs = [r["image"] for r in ours]
    sums = np.stack([bootstrap.photograph_sums(each, photographs, ["mIoU"]) for each in (ours, theirs)])
    draws = bootstrap.resampled(sums)[..., 0]
    low, high = bootstrap.interval(draws[:, 0] - draws[:, 1])
    error = gains.std() / 100 / math.sqrt(200)  # were sentences drawn, it would be smaller by the root of 5
    mean = gains.mean() / 100
    assert [low, high] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=1e-3)


def test_draws_by_hand():
    """Two photographs: of four equally likely draws two are mixed. The ratio is of sums, not a mean of ratios."""
    records = [record("a", "1", 10, 10), record("b", "1", 10, 10), record("c", "2", 0, 90)]
    sums = bootstrap.photograph_sums(records, ["1", "1", "2"], ["mIoU", "oIoU"])
    draws = bootstrap.resampled(sums)
    assert draws.shape == (bootstrap.RESAMPLES, 2)
    for column, values in ((0, {0: 0.25, 2 / 3: 0.5, 1: 0.25}), (1, {0: 0.25, 20 / 110: 0.5, 1: 0.25})):
        for value, share in values.items():
            assert np.isclose(draws[:, column], value).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("paired", [True, False])
def test_with_seeds_the_interval_covers_as_often_as_it_says(paired):
    """No difference in truth, three seeds each: 95 in 100 intervals hold zero, and without the seeds far fewer."""
    rng = np.random.default_rng(2)
    photographs, held, without = np.zeros(bootstrap.RESAMPLES), 0, 0
    for _ in range(400):
        ours, theirs = rng.normal(0, 1, (2, 3))
        error, freedom = bootstrap.seed_error(ours, theirs, paired)
        noise = rng.normal(0, 0.3)  # of the photographs that were evaluated
        draws = photographs + rng.normal(0, 0.3, bootstrap.RESAMPLES) + ours.mean() - theirs.mean() + noise
        low, high = bootstrap.interval(bootstrap.with_seeds(draws, error, freedom))
        held += low <= 0 <= high
        low, high = bootstrap.interval(draws)
        without += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.995 and without / 400 < 0.7


def test_standard_errors_of_seeds_by_hand():
    assert bootstrap.seed_error([1.0, 2.0, 6.0], [0.0, 1.0, 5.0], paired=True) == (0.0, 2)
    assert bootstrap.seed_error([1.0, 2.0, 6.0], [0.0, 0.0, 5.0], paired=True) == (pytest.approx(1 / 3), 2)
    error, freedom = bootstrap.seed_error([1.0, 2.0, 6.0], [0.0, 1.0, 5.0], paired=False)
    assert error == pytest.approx(math.sqrt(2 * 7 / 3)) and freedom == pytest.approx(4)
    assert bootstrap.seed_error([1.0], [1.0, 2.0], paired=False) is None


def test_a_clear_gain_and_none_are_told_apart(tmp_path):
    def run(strategy, gain):  # each with noise of its own
        return [write(tmp_path, f"{strategy}-{s}", drawn(s + 10 * len(strategy), gain), s, strategy) for s in range(3)]

    found = compared([*run("none", 0), *run("loss", 8), *run("random", 0.2)])
    gains = {(each.metric, each.setting.split("=")[1]): each for each in found.differences}
    assert gains["mIoU", "loss"].value == pytest.approx(0.08, abs=0.01) and not gains["mIoU", "loss"].holds_zero
    assert gains["mIoU", "random"].holds_zero
    for each in found.differences:
        low, high = each.seeds
        assert low <= each.value <= high and each.low <= each.value <= each.high
    text = comparison.markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("| alignment.strategy=") and "[" in line]
    assert all(("holds zero" in row) == ("random" in row) for row in rows if "| mIoU |" in row)
    assert comparison.ONE_RUN not in text


def test_one_run_each_is_said_to_tell_nothing_of_seeds(tmp_path, capsys):
    paths = [write(tmp_path, "a", drawn(0), 0, "none"), write(tmp_path, "b", drawn(1, 0.5), 0, "loss")]
    out, plot = tmp_path / "new/table.md", tmp_path / "new/plot.png"
    assert cli.main(["compare", *paths, "--out", str(out), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "a gain of 0.5 is within the noise of one run" in said and "the interval holds zero" in said
    assert out.read_text() in said
    with Image.open(plot) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    found = compared([paths[0], write(tmp_path, "c", drawn(1, 9), 0, "loss")])
    assert comparison.meaning(found.differences[0]) == "higher on other photographs too; another seed was not tried"


def test_inputs_of_other_sizes_are_compared_at_the_photographs_own(tmp_path):
    paths = [write(tmp_path, "a", drawn(0), 0, "none"), write(tmp_path, "b", drawn(1), 0, "loss", image_size=96)]
    found = compared(paths)
    assert found.prefixes == ["full_"] and all(each.metric.startswith("full_") for each in found.differences)
    text = comparison.markdown(found)
    assert "At input size" not in text and "inputs differ (64 (squash), 96 (squash))" in text


def test_generalized_sets_are_compared_in_gIoU_too(tmp_path):
    nothing = [record(f"n{i}", f"{i}.jpg", 0, 0, no_target=True) for i in range(5)]
    paths = [write(tmp_path, name, drawn(0) + nothing, 0, name) for name in ("none", "loss")]
    found = compared(paths)
    assert found.settings[0].values["gIoU"][0] > found.settings[0].values["mIoU"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda records: records[:-2], "2 only in "),
        (lambda records: [*records, record("new", "0.jpg", 3)], "1 only in "),
        (lambda records: [records[0] | {"sentence": "raw!"}, *records[1:]], "1 with another text: 0-0"),
        (lambda records: [records[0] | {"full_target": 99}, *records[1:]], "1 with a mask of another size: 0-0"),
    ],
)
def test_runs_on_different_sentences_are_refused(tmp_path, capsys, change, said):
    paths = [write(tmp_path, "a", drawn(0)), write(tmp_path, "b", change(drawn(1)), 1)]
    assert cli.main(["compare", *paths]) == 2
    error = capsys.readouterr().err
    assert "were evaluated on different sentences" in error and all(path in error for path in paths) and said in error


def test_other_refusals(tmp_path, capsys):
    path = write(tmp_path, "a", drawn(0))
    for words, said in (
        ([path], "1 run: expected two or more"),
        ([path, path], "have the same settings and seed 0: give one of them"),
        ([path, write(tmp_path, "n", drawn(0), 1, perturb=["noise", 3])], "disturbed: None and ['noise', 3]"),
        ([path, str(tmp_path / "nowhere")], "no such run directory or file"),
        ([path, str(tmp_path)], "no evaluation of split 'val'"),
    ):
        assert cli.main(["compare", *words]) == 2
        assert said in capsys.readouterr().err
    second = write(tmp_path, "b", drawn(1), 1)
    assert cli.main(["compare", path, second, "--plot", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr()
    assert "All runs have one setting" in said.out and "no difference to draw" in said.err


def test_it_starts_without_torch(tmp_path):
    paths = [write(tmp_path, name, drawn(0), 0, name) for name in ("none", "loss")]
    code = f"""
import sys
from aml.cli import main
assert main({["compare", *paths]!r}) == 0
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "none.json").read_text())["aml_evaluation"] == stored.FORMAT
