"""Metrics as a pure function of records, evaluation as a pure function of model and data, and perturbations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from aml.alignment import AlignmentLoss
from aml.data.dataset import RISDataset
from aml.data.refer import ReferDataset
from aml.data.scenes import render_scenes
from aml.evaluation import counts, evaluate, metrics, resized
from aml.models.base import AlignmentInputs, RISModel
from aml.perturbations import KINDS, OCCLUDED_SHARE, perturb

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "fixtures" / "golden"
SIZE = 48


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
    ranks = [
        evaluate(model, dataset, batch_size=4, aligner=judge, indices=range(rank, len(dataset), 3), progress=False)
        for rank in range(3)
    ]
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


def test_perturbation_is_the_same_for_all_sentences_of_a_photograph(dataset):
    images: dict = {}

    class Spy(RedPixels):
        def forward(self, image, *arguments, **options):
            for index, one in zip(order[len(images_seen) : len(images_seen) + len(image)], image, strict=True):
                images.setdefault(dataset.expressions[index].image_id, []).append(one)
                images_seen.append(index)
            return super().forward(image, *arguments, **options)

    order, images_seen = list(range(len(dataset))), []
    first = evaluate(Spy(), dataset, batch_size=5, perturb=("noise", 3), progress=False)
    assert all(torch.equal(other, group[0]) for group in images.values() for other in group)
    assert not torch.equal(images[dataset.expressions[0].image_id][0], dataset[0]["image"])
    assert first == evaluate(RedPixels(), dataset, batch_size=2, perturb=("noise", 3), progress=False)
    assert first != evaluate(RedPixels(), dataset, progress=False)


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


@pytest.mark.parametrize("kind", KINDS)
def test_perturbations_grow_with_severity_and_repeat(kind):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image[20:40, 30:60] = 200
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
    distance = []
    for severity in range(1, 6):
        changed = perturb(image, kind, severity, seed=5)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        assert np.array_equal(changed, perturb(image, kind, severity, seed=5))
        as_tensor = perturb(tensor, kind, severity, seed=5)
        assert as_tensor.dtype == tensor.dtype and 0 <= as_tensor.min() and as_tensor.max() <= 1
        assert np.abs(as_tensor.permute(1, 2, 0).numpy() * 255 - changed).max() <= 0.5001
        distance.append(np.square(changed.astype(float) - image).mean())
    assert all(low < high for low, high in zip(distance, distance[1:], strict=False))
    assert (kind == "blur") == np.array_equal(perturb(image, kind, 3, seed=5), perturb(image, kind, 3, seed=6))


def test_occlusion_hides_the_stated_share():
    image = torch.zeros(3, 64, 128)
    for severity, share in enumerate(OCCLUDED_SHARE, start=1):
        hidden = (perturb(image, "occlusion", severity, seed=1) > 0).float().mean().item()
        assert hidden == pytest.approx(share, abs=1 / 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((8, 8, 3), np.uint8), "nois", 1), "kind='nois'.*did you mean 'noise'"),
        ((np.zeros((8, 8, 3), np.uint8), "noise", 0), "severity=0"),
        ((np.zeros((8, 8), np.uint8), "noise", 1), r"expected uint8 \[H, W, 3\]"),
        ((torch.zeros(8, 8, 3), "noise", 1), r"expected float \[3, H, W\]"),
    ],
)
def test_wrong_images_and_kinds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        perturb(*arguments)
