"""`aml eval`: splits, files, tables beside published numbers, and two ranks that find what one finds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from refer_files import annotation, ref, write_refer

from aml import checkpoint, cli, evaluation_tables, stored
from aml.data.published import PUBLISHED
from aml.metrics import iou, metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def sentences(ref_id, count):
    return [{"sent_id": 10 * ref_id + i, "sent": f"the red circle {i}", "raw": f"Red {i}!"} for i in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained run, and data whose splits have 1, 3, 5 and 7 sentences."""
    folder = tmp_path_factory.mktemp("eval")
    data, encoder = tiny.write_data(folder / "scenes"), tiny.write_text_encoder(folder / "encoder")
    words = tiny.settings(data, encoder, folder / "run", "train.steps=40", "optim.lr=0.01", "eval.every=100")
    assert cli.main(["train", *words]) == 0  # so long that it predicts something
    splits = {"val": 1, "testA": 3, "testB": 5, "testAB": 7}
    refs = [
        ref(i, split, image_id=3 + i, ann_id=7 + i, sentences=sentences(i, count))
        for i, (split, count) in enumerate([("train", 2), *splits.items()])
    ]
    annotations = [annotation(7 + i, image_id=3 + i) for i in range(len(refs))]
    write_refer(folder / "data", refs, annotations, files=[(3 + i, f"{i}.png") for i in range(len(refs))])
    return folder


@pytest.fixture(scope="module")
def evaluated(place):
    """One process, all splits."""
    words = ["--data", str(place / "data"), "--split", "all", "train.batch_size=2"]
    assert cli.main(["eval", "--checkpoint", str(place / "run"), *words]) == 0
    return stored.folder_of(checkpoint.resolve(place / "run"))


def test_images_that_were_trained_on_are_said(place, capsys):
    for folder, held_out, said in (("apart", 2, False), ("shared", 1, True)):
        refs = [ref(i, split, image_id=image, ann_id=i) for i, split, image in ((1, "train", 1), (2, "val", held_out))]
        annotations = [annotation(each["ann_id"], image_id=each["image_id"]) for each in refs]
        data = write_refer(place / folder, refs, annotations, files=[(1, "1.png"), (2, "2.png")])
        words = ["--checkpoint", str(place / "run"), "--data", str(data), "--out", str(place / f"{folder}-results")]
        assert cli.main(["eval", *words]) == 0
        warning = "warning: 1 of the 1 images of refcoco(unc) val are in the training split of refcoco(unc)"
        assert (warning in capsys.readouterr().err) == said


def test_a_damaged_sentence_costs_no_evaluation(place, tmp_path):
    damaged = [{"sent_id": 1, "sent": "the red \ud800 circle"}]
    data = write_refer(tmp_path / "data", [ref(0, "train"), ref(1, "val", sentences=damaged)])
    words = ["--checkpoint", str(place / "run"), "--data", str(data), "--out", str(tmp_path)]
    assert cli.main(["eval", *words]) == 0
    with (tmp_path / "refcoco-unc-val.csv").open(encoding="utf-8", newline="") as file:
        assert [row["sentence"] for row in csv.DictReader(file)] == ["the red \ufffd circle"]


def test_all_are_all_but_train(evaluated):
    assert evaluated.parent.name == "evaluations" and evaluated.name == "step-00000040"
    sizes = {"val": 1, "testA": 3 + 7, "testB": 5 + 7}  # REFER's testAB belongs to both
    assert {path.name for path in evaluated.iterdir()} == {
        "refcoco-unc-results.md",
        *(f"refcoco-unc-{split}.{kind}" for split in sizes for kind in ("json", "csv")),
    }
    for split, size in sizes.items():
        found = stored.load(evaluated / f"refcoco-unc-{split}.json")
        assert (found["dataset"], found["split"], found["perturb"]) == ("refcoco(unc)", split, None)
        assert len(found["records"]) == found["metrics"]["sentences"] == size
        ids = [record["sample_id"] for record in found["records"]]
        assert metrics(found["records"], ids) == found["metrics"]
        assert any(record["union"] > record["target"] for record in found["records"]), "nothing is predicted"
        assert found["config"]["train"]["steps"] == 40 and len(found["weights"]) == 64


def test_the_csv_holds_the_records(evaluated):
    records = stored.load(evaluated / "refcoco-unc-testB.json")["records"]
    with (evaluated / "refcoco-unc-testB.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample_id"] for row in rows] == [record["sample_id"] for record in records]
    for row, record in zip(rows, records, strict=True):
        assert float(row["IoU"]) == iou(record) and float(row["full_IoU"]) == iou(record, "full_")
        assert row["sentence"] == record["sentence"] and int(row["union"]) == record["union"]
        assert row["image"].endswith(".png") and row["no_target"] == "False"


def test_two_ranks_find_what_one_finds(place, evaluated, tmp_path):
    """To the bit, for splits of 1, 10 and 12 sentences in batches of 2, and of 3 in one of 4."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "aml"]
    words = ["eval", "--checkpoint", str(place / "run"), "--data", str(place / "data"), "--split", "val,testA,testB"]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        [*command, *words, "train.batch_size=2", "--out", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("wrote") == 7  # rank 0 alone speaks
    names = sorted(path.name for path in evaluated.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes(), name


def gather_as_rank(rank, rendezvous):
    import datetime

    import torch

    from aml.ranks import Ranks

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=limit)
    team = Ranks(rank, 2, torch.device("cpu"))
    for own, merged in (([["a"], []], ["a"]), ([[], ["b"]], ["b"]), ([["a", "b"], ["c"]], ["a", "b", "c"])):
        assert team.gather(own[rank]) == (merged if rank == 0 else None)
    assert team.as_on_main(f"of rank {rank}") == "of rank 0" and team.is_main == (rank == 0)
    torch.distributed.destroy_process_group()


def test_lists_are_gathered_in_the_order_of_the_ranks(tmp_path):
    rendezvous = (tmp_path / "rendezvous").as_uri()
    ranks = [tiny.start(gather_as_rank, rank, rendezvous) for rank in (0, 1)]
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_ranks_without_or_with_uneven_work(place, length):
    """What each of two (three) ranks evaluates, put together, is the set: none twice, none left out."""
    from aml.evaluation import evaluate, part_of_rank
    from aml.ranks import Ranks
    from aml.trained import open_trained

    subject = open_trained(str(place / "run"), str(place / "data"), [], "cpu")
    dataset = subject.dataset("testAB")
    dataset.expressions, dataset._sentences_of_item = dataset.expressions[:length], dataset._sentences_of_item[:length]
    options = {"batch_size": 1, "aligner": subject.aligner, "progress": False}
    alone = evaluate(subject.model, dataset, **options)
    assert Ranks(0, 1, "cpu").gather(alone) == alone and len(alone) == length
    for world in (2, 3):
        parts = [part_of_rank(length, 1, rank, world) for rank in range(world)]
        found = [record for part in parts for record in evaluate(subject.model, dataset, indices=part, **options)]
        assert sorted(found, key=lambda r: r["sample_id"]) == sorted(alone, key=lambda r: r["sample_id"])


def test_the_table_stands_beside_published_numbers(evaluated):
    text = (evaluated / "refcoco-unc-results.md").read_text()
    found = stored.load(evaluated / "refcoco-unc-testA.json")
    own, full = (f"{100 * found['metrics'][name]:.2f}" for name in ("mIoU", "full_mIoU"))
    _, first, second, *splits = text.split("\n## ")
    assert f"| testA | 10 | {own} |" in first and "(64 x 64, squash)" in first
    assert f"| testA | 10 | {full} |" in second
    section = next(part for part in text.split("\n### ") if part.startswith("testA"))
    assert f"| this checkpoint, 64 x 64 | {own} |" in section
    assert "| CARIS, released weights | 79.71 | 78.19 | 91.13 |  | model card" in section
    assert "| AMLRIS | 79.53 |  |  |" in section and "| LAVT | 76.89 | 75.82 |" in section
    assert "**Not comparable**: 10 sentences here, 5657 there." in section
    assert text.index("### val") < text.index("### testA") and splits
    whole = stored.load(evaluated / "refcoco-unc-testA.json")
    whole["metrics"]["sentences"] = 5657
    assert "Not comparable" not in evaluation_tables.markdown([whole])


def test_published_numbers_belong_to_a_data_set_and_split():
    rows = evaluation_tables.published("refcocog(google)", "val")
    assert {row["method"]: row["mIoU"] for row in rows} == {
        "CARIS, released weights": "67.80", "LAVT": "63.66", "DETRIS-B": "65.9",
    }  # fmt: skip
    assert not evaluation_tables.published("refcocog(google)", "test")
    assert [row["mIoU"] for row in evaluation_tables.published("refcoco+(unc)", "val", "noise")] == ["64.8", "67.9"]
    with evaluation_tables.PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 58 and all(row["source"] for row in rows)
    for row in rows:
        values = [float(row[name]) for name in ("mIoU", "oIoU", "P@0.5") if row[name]]
        assert values and all(50 < value < 95 for value in values)
        assert PUBLISHED[row["dataset"], row["split_by"]][row["split"]].sentences


def test_a_file_is_for_one_split(place, tmp_path, capsys):
    words = ["eval", "--checkpoint", str(place / "run"), "--data", str(place / "data")]
    assert cli.main([*words, "--split", "val,testA", "--out", str(tmp_path / "x.json")]) == 2
    assert "a file is for one split; for 2 of them give a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["model.image_size=32", "alignment.quantile=0.5", "optim.lr=1"])
def test_what_the_checkpoint_has_settled_cannot_be_set(place, capsys, word):
    assert cli.main(["eval", "--checkpoint", str(place / "run"), word]) == 2
    assert f"{word}: the checkpoint's own is used" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_noticed_first(place, tmp_path, capsys, monkeypatch):
    from aml import evaluation

    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert cli.main(["eval", "--checkpoint", str(place / "run"), "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["data.resize=letterbox", "data.field=raw", "data"])
def test_an_evaluation_with_other_settings_does_not_replace_the_runs_own(place, tmp_path, monkeypatch, capsys, other):
    from aml import evaluation

    out = ["--out", str(tmp_path / "found")]
    words = ["eval", "--checkpoint", str(place / "run"), "--data", str(place / "data")]
    assert cli.main([*words, *out]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    assert cli.main([*words, *out]) == 0, "the same again may"
    more = [other]
    if other == "data":
        refs = [ref(1, "val", image_id=4, ann_id=8)]
        data = write_refer(tmp_path / "data", refs, [annotation(8, image_id=4)], files=[(4, "1.png")])
        more = ["--data", str(data)]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", None)
        assert cli.main([*words, *more, *out]) == 2
    told = capsys.readouterr().err
    assert "refcoco-unc-val.json is of other data or settings; give another --out" in told
    assert {path: path.read_bytes() for path in (tmp_path / "found").iterdir()} == before
    assert cli.main([*words, *more, "--out", str(tmp_path / "elsewhere")]) == 0


def test_a_disturbed_evaluation_has_a_name_of_its_own(place, tmp_path):
    words = ["eval", "--checkpoint", str(place / "run"), "--data", str(place / "data"), "--out", str(tmp_path)]
    assert cli.main([*words, "--perturb", "blur:2"]) == 0
    found = stored.load(tmp_path / "refcoco-unc-val-blur-2.json")
    assert found["perturb"] == ["blur", 2]
    assert "Disturbed: blur:2" in (tmp_path / "refcoco-unc-results-blur-2.md").read_text()


def test_evaluations_are_found_by_run_checkpoint_and_file(place, evaluated, tmp_path):
    file = evaluated / "refcoco-unc-val.json"
    for path in (place / "run", checkpoint.resolve(place / "run"), file):
        assert stored.find(path, "val") == file
    with pytest.raises(FileNotFoundError, match="no evaluation of split 'test'.*\n.*aml eval --checkpoint"):
        stored.find(place / "run", "test")
    (tmp_path / "evaluations").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"evaluations/{name}-val.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several evaluations of split 'val' \(a-val, b-val\)"):
        stored.find(tmp_path, "val")
    with pytest.raises(ValueError, match="a-val.json is no evaluation of format 1"):
        stored.load(tmp_path / "evaluations/a-val.json")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    evaluation = {"dataset": "x", "split": "val", "perturb": None, "records": [
        {"sample_id": "1", "image": "a", "sentence": "s", "no_target": False, **dict.fromkeys(
            ("intersection", "union", "full_intersection", "full_union"), 1), "auc": None},
    ]}  # fmt: skip
    stored.save(tmp_path, evaluation)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before[tmp_path / "x-val.json"])["records"] == evaluation["records"]

    def full(self, text, **options):
        with open(self, "w") as file:
            file.write(text[:5])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        stored.save(tmp_path, evaluation | {"checkpoint": "another"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (2, 1), (4, 3)])
def test_ranks_share_the_gpus_that_are_visible(monkeypatch, visible, expected):
    import torch

    from aml import ranks

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.joined() as own:
        assert own.device.index == expected and chosen == [own.device]
