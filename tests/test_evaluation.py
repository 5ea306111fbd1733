"""Metrics as a pure function of records, evaluation as a pure function of model and data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from refer_files import ref
from test_data_sets import write_grefcoco

from aml.alignment import AlignmentLoss
from aml.data.dataset import RISDataset
from aml.data.refer import ReferDataset
from aml.data.scenes import render_scenes
from aml.evaluation import counts, evaluate, metrics, part_of_rank, resized
from aml.models.base import AlignmentInputs, RISModel

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "fixtures" / "golden"
SIZE = 48
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class RedPixels(RISModel):
    """Calls reddish pixels the referent, and only in eval mode; its features are the image and the tokens."""

    image_size, image_mean, image_std, max_tokens = SIZE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 4

    def __init__(self):
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(20.0))

    def tokenize(self, sentences):
        tokens = torch.tensor([[len(sentence) % 7, sum(map(ord, sentence)) % 5, 1, 0] for sentence in sentences])
        return tokens, torch.tensor([True, True, True, False]).expand(len(sentences), 4).clone()

    def encode(self, image, tokens, text_mask):
        words = torch.nn.functional.one_hot(tokens, 7).float()
        return AlignmentInputs(torch.nn.functional.avg_pool2d(image, 8), words, text_mask)

    def forward(self, image, tokens, text_mask, return_alignment=False):
        assert not self.training
        colour = image * torch.tensor(self.image_std).view(3, 1, 1) + torch.tensor(self.image_mean).view(3, 1, 1)
        logits = self.sharpness * (colour[:, 0] - colour[:, 1] - 0.2)
        logits = torch.nn.functional.avg_pool2d(logits[:, None], 2)[:, 0]
        return (logits, self.encode(image, tokens, text_mask)) if return_alignment else logits


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = render_scenes(tmp_path_factory.mktemp("scenes") / "data", train=2, val=4, image_size=80, seed=3)
    return build_dataset(ReferDataset(root))


def build_dataset(refer, train=False):
    model = RedPixels()
    options = {"image_size": SIZE, "tokenize": model.tokenize, "mean": model.image_mean, "std": model.image_std}
    return RISDataset(refer, "val", train=train, **options)


def aligner():
    torch.manual_seed(0)
    return AlignmentLoss(visual_dim=3, text_dim=7, dim=8)


def same(first, second):
    return all(
        a.keys() == b.keys() and all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


def test_counts_are_right_at_both_resolutions(dataset):
    model = RedPixels()
    records = evaluate(model, dataset, batch_size=3, progress=False)
    assert [record["sample_id"] for record in records] == dataset.sample_ids
    for index in (0, len(dataset) - 1):
        item = dataset[index]
        logits = model.eval()(item["image"][None], item["tokens"][None], item["text_mask"][None])
        for prefix, target in (("", item["target"]), ("full_", item["full_target"])):
            up = torch.nn.functional.interpolate(logits[None], target.shape, mode="bilinear", align_corners=True)[0, 0]
            predicted = set(map(tuple, (up > 0).nonzero().tolist()))
            wanted = set(map(tuple, target.nonzero().tolist()))
            assert records[index][f"{prefix}intersection"] == len(predicted & wanted)
            assert records[index][f"{prefix}union"] == len(predicted | wanted)
            assert records[index][f"{prefix}target"] == len(wanted)
    assert dataset[0]["full_target"].shape == (80, 80)
    assert sum(record["intersection"] for record in records) > 0


def test_batch_size_and_sharding_change_nothing(dataset):
    model, judge = RedPixels(), aligner()
    whole = evaluate(model, dataset, batch_size=8, aligner=judge, progress=False)
    assert same(evaluate(model, dataset, batch_size=1, aligner=judge, progress=False), whole)
    parts = [part_of_rank(len(dataset), 4, rank, 3) for rank in range(3)]
    ranks = [evaluate(model, dataset, batch_size=4, aligner=judge, indices=p, progress=False) for p in parts]
    merged = [record for records in reversed(ranks) for record in records]
    expected = metrics(whole, dataset.sample_ids)
    assert metrics(merged, dataset.sample_ids) == pytest.approx(expected, abs=0)


def test_the_model_is_left_as_it_was(dataset):
    model = RedPixels().train()
    evaluate(model, dataset, indices=[0], progress=False)
    assert model.training
    with pytest.raises(ValueError, match="train=True"):
        evaluate(model, build_dataset(dataset.refer, train=True))


def test_the_wrong_sentence_is_about_another_photograph_and_is_used(dataset):
    class Spy(RedPixels):
        def encode(self, image, tokens, text_mask):
            seen.append(tokens)
            return super().encode(image, tokens, text_mask)

    seen: list = []
    records = evaluate(Spy(), dataset, batch_size=1, aligner=aligner(), indices=[0], progress=False)
    right, wrong = seen
    assert torch.equal(right[0], dataset[0]["tokens"])
    allowed = [
        RedPixels().tokenize([other.sentence])[0][0].tolist()
        for other in dataset.expressions
        if other.image_id != dataset.expressions[0].image_id
    ]
    assert wrong[0].tolist() in allowed
    assert 0 <= records[0]["auc"] <= 1 and 0 <= records[0]["auc_wrong_sentence"] <= 1


def test_a_rank_has_whole_batches_and_all_ranks_have_every_sample_once():
    for length in (0, 1, 2, 3, 4, 5, 11, 12, 21):
        for world in (1, 2, 3, 5):
            parts = [part_of_rank(length, 3, rank, world) for rank in range(world)]
            assert sorted(sum(parts, [])) == list(range(length))
            for part in parts:  # evaluated in threes, they are the batches of one process
                batches = [part[first : first + 3] for first in range(0, len(part), 3)]
                assert all(b == list(range(b[0], min(b[0] + 3, length))) and b[0] % 3 == 0 for b in batches)
    with pytest.raises(ValueError, match="rank=2, world=2"):
        part_of_rank(4, 2, 2, 2)


def test_records_say_what_they_are_of(dataset):
    for record, expression in zip(evaluate(RedPixels(), dataset, progress=False), dataset.expressions, strict=True):
        assert record["image"] == expression.image_path.name and record["sentence"] == expression.sentence
        assert record["no_target"] is False


def test_a_disturbed_photograph_is_the_same_for_all_its_sentences(dataset):
    disturbed = dataset.disturbed(("noise", 3))
    images: dict = {}
    for index, expression in enumerate(dataset.expressions):
        images.setdefault(expression.image_id, []).append(disturbed[index]["image"])
    assert len(images) == 4 and max(map(len, images.values())) > 1
    assert all(torch.equal(other, group[0]) for group in images.values() for other in group)
    assert not torch.equal(disturbed[0]["image"], dataset[0]["image"])
    assert torch.equal(disturbed.disturbed(None)[0]["image"], dataset[0]["image"])
    first = evaluate(RedPixels(), disturbed, batch_size=5, progress=False)
    assert first == evaluate(RedPixels(), disturbed, batch_size=2, progress=False)
    assert first != evaluate(RedPixels(), dataset, progress=False)
    with pytest.raises(ValueError, match="only for evaluation"):
        build_dataset(dataset.refer, train=True).disturbed(("noise", 3))


def test_a_disturbance_is_the_same_for_models_of_other_input_sizes(dataset):
    """It happens to the photograph: the input of 40 pixels is that of 80, made smaller."""
    large, small = (
        RISDataset(dataset.refer, "val", train=False, image_size=size, tokenize=RedPixels().tokenize, **PLAIN)
        .disturbed(("occlusion", 5))[0]["image"]
        for size in (80, 40)
    )
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.02


def record(name, intersection, union, target=10, full=(0, 0, 0), **more):
    names = ("full_intersection", "full_union", "full_target")
    counted = {"intersection": intersection, "union": union, "target": target}
    return {"sample_id": name, **counted, **dict(zip(names, full, strict=True)), **more}


def test_metrics_by_hand():
    records = [
        record("a", 7, 10, target=8, full=(1, 2, 1), auc=1.0, target_left_out=0.5),
        record("b", 1, 20, target=4, full=(3, 4, 3), auc=math.nan, target_left_out=math.nan),
        record("c", 0, 0, target=0, full=(0, 5, 5), auc=0.5, target_left_out=0.0),
    ]
    result = metrics(records, ["c", "b", "a"])
    assert result == metrics(records[::-1], {"a", "b", "c"})
    assert result["sentences"] == 3 and result["empty_unions"] == 1 and result["full_empty_unions"] == 0
    assert result["mIoU"] == pytest.approx((0.7 + 0.05 + 0) / 3, abs=1e-15)
    assert result["oIoU"] == 8 / 30
    assert result["P@0.7"] == 1 / 3 and result["P@0.8"] == 0
    assert result["full_mIoU"] == pytest.approx((0.5 + 0.75 + 0) / 3) and result["full_P@0.5"] == 2 / 3
    assert result["area_ratio"] == (10 + 7 - 8 + 20 + 1 - 4) / 12
    assert result["auc"] == 0.75 and result["target_left_out"] == 0.25
    assert "auc_wrong_sentence" not in result


def test_sentences_without_a_target_by_hand():
    """As in GRES: right is to predict nothing, which counts 1 in gIoU; in P@X they do not count."""
    records = [
        record("half", 5, 10, no_target=False),
        record("missed", 0, 10, no_target=False),
        record("nothing, right", 0, 0, target=0, no_target=True),
        record("nothing, wrong", 0, 30, target=0, no_target=True),
        record("lost in resizing", 0, 0, target=0, no_target=False),
    ]
    result = metrics(records, [r["sample_id"] for r in records])
    assert (result["sentences"], result["no_target"], result["empty_unions"]) == (5, 2, 1)
    assert result["gIoU"] == pytest.approx((0.5 + 0 + 1 + 0 + 0) / 5)
    assert result["N-acc"] == 1 / 2 and result["T-acc"] == 1 / 3
    assert result["mIoU"] == pytest.approx(0.5 / 3) and result["P@0.5"] == 1 / 3
    assert result["oIoU"] == 5 / 50
    alone = metrics(records[2:4], ["nothing, right", "nothing, wrong"])
    assert alone["mIoU"] == alone["P@0.5"] == alone["T-acc"] == 0 and alone["gIoU"] == 0.5
    with_targets = metrics(records[:2], ["half", "missed"])
    assert not {"gIoU", "N-acc", "T-acc", "no_target"} & with_targets.keys()


def test_sentences_without_a_target_are_evaluated(tmp_path):
    refs = [ref(0, "val"), ref(1, "val", ann_id=[-1])]
    refer = ReferDataset(write_grefcoco(tmp_path, refs), "grefcoco")
    data = build_dataset(refer)
    records = evaluate(RedPixels(), data, aligner=aligner(), progress=False)
    assert [record["no_target"] for record in records] == [False, False, True, True]
    assert [record["auc"] is None for record in records] == [False, False, True, True]
    result = metrics(records, data.sample_ids)  # a navy photograph: nothing is red, so nothing is predicted
    assert result["full_gIoU"] == 0.5 and result["full_N-acc"] == 1 and result["full_T-acc"] == 0


@pytest.mark.parametrize(
    ("ids", "expected", "message"),
    [
        ("ab", "abcd", r"expected each of 4 sample ids exactly once, got 2 missing \(c, d\)"),
        ("aab", "ab", r"1 repeated \(a\)"),
        ("abx", "ab", r"1 unknown \(x\)"),
        ("", "", "got nothing"),
    ],
)
def test_an_incomplete_set_has_no_metrics(ids, expected, message):
    with pytest.raises(ValueError, match=message):
        metrics([record(name, 1, 2) for name in ids], list(expected))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")
@pytest.mark.parametrize("case", ["plain", "with_union0", "all_empty"])
def test_released_metrics_are_reproduced(case):
    """Except that an empty union makes the released mIoU NaN; here it counts as 0, as it does in the precision."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(GOLDEN / "schedule_metrics.safetensors", "pt") as file:
        expected = json.loads(file.metadata()["json"])["metrics"][case]
        prediction, target, ious, intersections, unions = (
            file.get_tensor(f"metrics.{case}.{name}") for name in ("pred", "gt", "eval.iou", "eval.I", "eval.U")
        )
    intersection, union, area = counts(prediction, target)
    assert torch.equal(intersection, intersections) and torch.equal(union, unions)
    rows = zip(intersection.tolist(), union.tolist(), area.tolist(), strict=True)
    result = metrics([record(str(i), *row) for i, row in enumerate(rows)], [str(i) for i in range(len(union))])
    assert result["mIoU"] == pytest.approx(ious.double().nan_to_num(0).mean().item(), abs=1e-7)
    assert result["empty_unions"] == ious.isnan().sum()
    if not math.isnan(expected["mIoU"]):
        assert 100 * result["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-6)  # of float32 IoUs
    if not math.isnan(expected["oIoU"]):
        assert 100 * result["oIoU"] == pytest.approx(expected["oIoU"], abs=1e-9)
    for limit, share in expected["precision"].items():
        assert 100 * result[f"P@{limit}"] == pytest.approx(share, abs=1e-9)


def test_resized_aligns_corners():
    logits = torch.arange(6.0).view(1, 2, 3)
    assert torch.equal(resized(logits, (3, 5))[0, ::2, ::2], logits[0])
