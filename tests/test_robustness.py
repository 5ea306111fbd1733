"""`aml robustness`: every condition, pooled numbers by hand, going on after an interruption, two ranks."""

import json
import os
import shutil
import socket

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from aml import cli, robustness, stored, trained
from aml.perturbations import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    data, encoder = tiny.write_data(folder / "data", val=1), tiny.write_text_encoder(folder / "encoder")
    words = tiny.settings(data, encoder, folder / "run", "train.steps=40", "optim.lr=0.01", "eval.every=100")
    assert cli.main(["train", *words]) == 0  # so long that it predicts something
    return folder


@pytest.fixture(scope="module")
def made(place):
    """A run that was interrupted after five conditions, and repeated."""
    out, evaluate, calls = place / "out", trained.Trained.evaluate, []

    def interrupted(self, dataset, ranks, judge_map):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(dataset.perturb)
        return evaluate(self, dataset, ranks, judge_map)

    words = ["robustness", "--checkpoint", str(place / "run"), "--out", str(out), "train.batch_size=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.Trained, "evaluate", interrupted)
        assert cli.main(words) == 130
    assert sorted(path.name for path in out.glob("*.json")) == [
        "clean.json", "occlusion-1.json", "occlusion-2.json", "occlusion-3.json", "occlusion-4.json"
    ]  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    return out


def test_every_condition_has_its_records(made):
    names = dict(robustness.conditions())
    assert len(names) == 36 and list(names)[:3] == ["clean", "occlusion-1", "occlusion-2"]
    found = {name: stored.load(made / f"{name}.json") for name in names}
    assert {name: each["perturb"] and tuple(each["perturb"]) for name, each in found.items()} == names
    assert len({tuple(r["sample_id"] for r in each["records"]) for each in found.values()}) == 1
    assert found["noise-5"]["records"] != found["clean"]["records"]
    assert not list(made.glob(".*"))


def measure_as_rank(rank, port, words):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    if rank:
        del os.replace  # by which any result appears: rank 0 alone may write
    raise SystemExit(cli.main(words))


def test_two_ranks_find_what_one_finds(place, made, tmp_path):
    """To the bit, and what an earlier call has done is left alone."""
    assert stored.load(made / "clean.json")["metrics"]["sentences"] > 1, "nothing to share"
    done = [file for file in sorted(made.iterdir()) if file.stem.startswith(("clean", "blur", "haze", "jpeg", "noise"))]
    times = {file.name: shutil.copyfile(file, tmp_path / file.name).stat().st_mtime_ns for file in done}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["robustness", "--checkpoint", str(place / "run"), "--out", str(tmp_path), "train.batch_size=1"]
    ranks = [tiny.start(measure_as_rank, rank, port, words) for rank in (0, 1)]
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    for file in made.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list(tmp_path.iterdir())) == len(list(made.iterdir()))


def test_numbers_of_a_kind_are_over_all_its_sentences(made):
    results = json.loads((made / "results.json").read_text())
    records = [r for s in range(1, 6) for r in stored.load(made / f"haze-{s}.json")["records"]]
    found = results["kinds"]["haze"]
    assert found["sentences"] == len(records) == 5 * results["conditions"]["clean"]["sentences"]
    assert found["oIoU"] == sum(r["intersection"] for r in records) / sum(r["union"] for r in records)
    mean = np.mean([results["conditions"][f"haze-{s}"]["mIoU"] for s in range(1, 6)])
    assert found["mIoU"] == pytest.approx(mean)


def test_tables_and_curves(made):
    results, text = json.loads((made / "results.json").read_text()), (made / "robustness.md").read_text()
    for metric in ("mIoU", "oIoU"):
        part = next(part for part in text.split("\n## ") if part.startswith(metric))
        rows = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("| ")][2:]
        assert [row[0].strip() for row in rows] == ["clean", *KINDS]
        row = next(row for row in rows if row[0].strip() == "jpeg")
        expected = [results["conditions"][f"jpeg-{s}"][metric] for s in range(1, 6)]
        expected.append(results["kinds"]["jpeg"][metric])
        assert [float(cell) for cell in row[1:7]] == pytest.approx([100 * value for value in expected], abs=0.006)
        lost = results["kinds"]["jpeg"][metric] - results["conditions"]["clean"][metric]
        assert float(row[7]) == pytest.approx(100 * lost, abs=0.006)
    assert "## Published" not in text
    with Image.open(made / "robustness.png") as drawn:
        assert np.asarray(drawn.convert("L")).std() > 5


def test_published_numbers_stand_below_where_there_are_any(made):
    results = json.loads((made / "results.json").read_text())
    text = robustness.markdown(results | {"dataset": "refcoco+(unc)", "split": "val"})
    assert "| noise | AMLRIS | 67.9 | severity not stated |" in text


def test_results_of_another_model_or_data_are_not_taken_for_done(place, made, tmp_path, capsys):
    other = stored.load(made / "clean.json") | {"weights": "0" * 64}
    stored.save(tmp_path, other, "clean")
    assert cli.main(["robustness", "--checkpoint", str(place / "run"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is of another model or data; give another --out" in said and f"weights: {'0' * 64} instead of" in said
    words = ["data.resize=letterbox", "--out", str(made)]
    assert cli.main(["robustness", "--checkpoint", str(place / "run"), *words]) == 2
    assert "resize: squash instead of letterbox" in capsys.readouterr().err
