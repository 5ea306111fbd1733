"""Squash and letterbox: places, items, what the loss is told of the padding, and the way back to the photograph."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pycocotools")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dataset import PLAIN, assert_same, tokenize_letters
from test_refer import REAL, needs_real

from aml import evaluation
from aml.alignment import AlignmentLoss
from aml.data.dataset import RISDataset, collate
from aml.data.pixels import Box, at_own_size, place, resized_mask, valid_cells
from aml.data.refer import ReferDataset
from aml.models.base import AlignmentInputs, RISModel
from aml.predict import predict
from aml_kernels import masked_loss, sample_quantile

SIZE = 96
SIDES = st.integers(1, 700)


@given(SIDES, SIDES, st.integers(1, 500))
def test_the_picture_keeps_its_shape_in_the_middle_of_the_square(height, width, size):
    box = place(height, width, size, "letterbox")
    assert max(box.height, box.width) == size and min(box.height, box.width) >= 1
    scale = size / max(height, width)
    for inner, side in ((box.height, height), (box.width, width)):
        assert abs(inner - side * scale) <= 0.5 or inner == 1
    assert 0 <= box.top - (size - box.bottom) + 1 <= 1 and 0 <= box.left - (size - box.right) + 1 <= 1
    assert place(height, width, size, "squash") == Box(0, 0, size, size)


@pytest.fixture(scope="module")
def refer():
    if not REAL.is_dir():
        pytest.skip(f"real photographs are not at {REAL}")
    return ReferDataset(REAL)


def dataset(refer, **changes):
    options = {"image_size": SIZE, "tokenize": tokenize_letters, "train": False, "resize": "letterbox"}
    return RISDataset(refer, "val", **(options | PLAIN | changes))


def test_items_hold_the_picture_and_say_where_it_is(refer):
    data = dataset(refer, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    squashed = dataset(refer, resize="squash")
    for index in range(0, len(data), 40):
        item, expression = data[index], data.expressions[index]
        box = place(expression.height, expression.width, SIZE, "letterbox")
        valid = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        valid[box.slices] = True
        assert item["valid"].dtype == torch.bool and torch.equal(item["valid"], valid)
        assert item["image"].shape == (3, SIZE, SIZE) and item["target"].shape == (SIZE, SIZE)
        assert not item["image"][:, ~valid].any() and not item["target"][~valid].any()
        photo = Image.open(expression.image_path).convert("RGB")
        expected = np.asarray(photo.resize((box.width, box.height), Image.Resampling.BILINEAR)) / 255
        normalised = torch.from_numpy((expected - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).permute(2, 0, 1).float()
        torch.testing.assert_close(item["image"][:, box.slices[0], box.slices[1]], normalised)
        mask = resized_mask(refer.mask(expression), Box(0, 0, *photo.size), (box.height, box.width))
        np.testing.assert_array_equal(item["target"][box.slices], mask)
        assert "valid" not in squashed[index]
        assert torch.equal(item["full_target"], squashed[index]["full_target"])


def test_training_items_are_cropped_and_placed(refer):
    data, still = dataset(refer, train=True), dataset(refer, train=True, augment=False)
    shapes = set()
    for epoch in range(6):
        item = data[epoch, 3]
        assert_same(item, dataset(refer, train=True)[epoch, 3])
        assert not item["image"][:, ~item["valid"]].any() and not item["target"][~item["valid"]].any()
        assert item["target"].any()
        rows, columns = item["valid"].any(1).sum().item(), item["valid"].any(0).sum().item()
        assert max(rows, columns) == SIZE and item["valid"].sum() == rows * columns
        shapes.add((rows, columns))
    assert len(shapes) > 2  # the crop's shape, not the photograph's
    assert torch.equal(still[0, 3]["valid"], still[1, 3]["valid"])


def test_batches_hold_valid_only_where_there_is_padding(refer):
    letterboxed, squashed = dataset(refer), dataset(refer, resize="squash")
    batch = collate([letterboxed[0], letterboxed[9]])
    assert batch["valid"].shape == (2, SIZE, SIZE) and batch["valid"].dtype == torch.bool
    assert "valid" not in collate([squashed[0]])
    assert letterboxed.fingerprint != squashed.fingerprint
    with pytest.raises(ValueError, match="resize='stretch': expected one of squash, letterbox"):
        dataset(refer, resize="stretch")


# What the loss is told


@given(st.data())
@settings(max_examples=40)
def test_cells_are_those_that_are_half_picture(data):
    size, cells = data.draw(st.sampled_from([(32, 4), (30, 7), (16, 16), (448, 14)]))
    box = place(data.draw(SIDES), data.draw(SIDES), size, "letterbox")
    valid = torch.zeros(1, size, size, dtype=torch.bool)
    valid[0][box.slices] = True
    found = valid_cells(valid, (cells, cells))
    assert found.shape == (1, cells, cells) and found.dtype == torch.bool and found.any()
    covered = F.adaptive_avg_pool2d(valid.float(), cells)
    assert (found | (covered < 0.5)).all()
    assert not (found & (covered == 0)).any()
    if covered.max() == 1:
        assert torch.equal(found, covered >= 0.5)


def test_without_padding_every_cell_counts():
    assert valid_cells(torch.ones(2, 48, 48, dtype=torch.bool), (5, 3)).all()


def test_the_loss_neither_sees_padding_nor_learns_from_it(refer):
    """Whatever stands in the padding, of logits and of the map: the same loss, and no gradient there."""
    data = dataset(refer)
    batch = collate([data[i] for i in range(0, 60, 20)])
    valid, target = batch["valid"], batch["target"]
    cells = valid_cells(valid, (12, 12))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, SIZE, SIZE, generator=generator)
    similarity = torch.randn(3, 12, 12, generator=generator)
    options = {"quantile": 0.3, "valid": valid, "map_valid": cells, "return_stats": True}
    _, plain = masked_loss(logits, target, similarity, **options)
    garbage = torch.where(valid, logits, torch.nan).requires_grad_()
    loss, stats = masked_loss(garbage, target, similarity, **options)
    loss.backward()
    assert loss.isfinite() and torch.equal(stats.kept, plain.kept)
    assert not garbage.grad[~valid].any() and garbage.grad[valid].any()
    for sample in range(3):
        expected = torch.quantile(similarity[sample][cells[sample]], 0.3)
        torch.testing.assert_close(stats.threshold[sample], expected)
    assert (stats.kept <= valid.sum((1, 2))).all()
    low_padding = torch.where(cells, similarity, -10.0)
    assert not torch.equal(sample_quantile(low_padding, 0.3), stats.threshold)  # without map_valid it would count
    torch.testing.assert_close(masked_loss(logits, target, low_padding, **options)[1].threshold, stats.threshold)


# Back to the photograph


@needs_real
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_masks_come_back_to_their_own_size(refer, resize):
    data = dataset(refer, resize=resize, image_size=448)
    for index in range(0, len(data), 60):
        item = data[index]
        full = item["full_target"]
        if full.float().mean() < 0.02:
            continue
        found = at_own_size(2.0 * item["target"] - 1, *full.shape, 448, resize) > 0
        intersection, union = (found & (full > 0)).sum(), (found | (full > 0)).sum()
        assert found.shape == full.shape and intersection / union > 0.95


def test_logits_of_any_resolution_come_back():
    ramp = torch.linspace(-1, 1, 448).expand(448, 448)
    coarse = F.interpolate(ramp[None, None], (112, 112), mode="bilinear", align_corners=True)[0, 0]
    squashed = at_own_size(coarse, 300, 600, 448, "squash")
    torch.testing.assert_close(squashed, torch.linspace(-1, 1, 600).expand(300, 600), atol=1e-5, rtol=0)
    letterboxed = at_own_size(coarse, 300, 600, 448, "letterbox")
    torch.testing.assert_close(letterboxed, torch.linspace(-1, 1, 600).expand(300, 600), atol=1e-5, rtol=0)
    upright = at_own_size(coarse, 600, 300, 448, "letterbox")
    assert upright.shape == (600, 300) and -0.51 < upright.min() < -0.49 and 0.49 < upright.max() < 0.51


class Everything(RISModel):
    """Calls everything the referent, padding too."""

    image_size, image_mean, image_std = SIZE, *PLAIN.values()

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def tokenize(self, sentences):
        return tokenize_letters(sentences)

    def forward(self, image, tokens, text_mask, return_alignment=False):
        logits = image.new_ones(len(image), SIZE // 4, SIZE // 4)
        return (logits, None) if return_alignment else logits


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_does_not_count_padding(refer, workers):
    data = dataset(refer)
    records = evaluation.evaluate(Everything(), data, indices=range(5), batch_size=2, workers=workers, progress=False)
    for item, record in zip((data[i] for i in range(5)), records, strict=True):
        assert record["sample_id"] == item["sample_id"]
        assert record["intersection"] == record["target"] == item["target"].sum()
        assert record["union"] == item["valid"].sum() < SIZE * SIZE
        assert record["full_union"] == item["full_target"].numel()


def test_the_similarity_map_is_judged_where_there_is_picture(refer, monkeypatch):
    class Features(Everything):
        def encode(self, image, tokens, text_mask):
            return AlignmentInputs(F.avg_pool2d(image, 8), torch.ones(len(image), 64, 7), text_mask)

        def forward(self, image, tokens, text_mask, return_alignment=False):
            return image[:, 0], self.encode(image, tokens, text_mask)

    def spy(similarity, target, **options):
        judged.append(options)
        return scores(similarity, target, **options)

    judged: list = []
    scores = evaluation.alignment_scores
    monkeypatch.setattr(evaluation, "alignment_scores", spy)
    judge, data = AlignmentLoss(visual_dim=3, text_dim=7, dim=4), dataset(refer)
    valid = collate([data[0], data[1]])["valid"]
    evaluation.evaluate(Features(), data, indices=[0, 1], aligner=judge, progress=False)
    assert len(judged) == 2  # with the right sentence and with a wrong one
    for options in judged:
        assert torch.equal(options["valid"], valid)
        assert torch.equal(options["map_valid"], valid_cells(valid, (SIZE // 8, SIZE // 8)))


def test_prediction_takes_the_picture_as_training_does(refer):
    class Redness(Everything):
        def forward(self, image, tokens, text_mask):
            assert image.shape == (1, 3, 448, 448)
            return image[:, 0] - 0.5

    expression = refer.expressions("val")[0]
    model = Redness()
    model.image_size = 448
    red = np.asarray(Image.open(expression.image_path).convert("RGB"), np.float32)[..., 0] / 255 - 0.5
    for model.resize in ("squash", "letterbox"):
        _, probability = predict(model, expression.image_path, "a dog")
        assert probability.shape == (expression.height, expression.width)
        logits = np.log(probability / (1 - probability))
        assert np.abs(logits - red).mean() < 0.05  # blurred by the way there and back
        assert np.corrcoef(logits.ravel(), red.ravel())[0, 1] > 0.95
