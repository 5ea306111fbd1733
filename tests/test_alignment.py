"""The loss, and the strategies that leave pixels out of it; how a similarity map is scored."""

from __future__ import annotations

import math

import pytest
import torch

from aml import strategies
from aml.alignment import AlignmentLoss
from aml.alignment_scores import alignment_scores, target_below
from aml.models.base import AlignmentInputs
from aml.strategies import PIXEL_STRATEGIES, STRATEGIES
from aml_kernels import masked_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"visual_dim": 12, "text_dim": 10, "dim": 8}


def example(seed: int = 0, batch: int = 3, size: int = 32):
    """logits at a quarter of the resolution, a rectangular target per sample, and random features."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(batch, size, size, dtype=torch.uint8)
    for sample in range(batch):
        target[sample, 3 + sample : 12 + 3 * sample, 5 : 20 + sample] = 1
    logits = torch.randn(batch, size // 4, size // 4, generator=generator).requires_grad_()
    mask = torch.arange(5).expand(batch, 5) < torch.arange(2, 2 + batch)[:, None].clamp(max=5)
    alignment = AlignmentInputs(
        torch.randn(batch, 12, 6, 6, generator=generator), torch.randn(batch, 5, 10, generator=generator), mask
    )
    return logits, target, alignment


def build(strategy: str, **options) -> AlignmentLoss:
    torch.manual_seed(0)
    return AlignmentLoss(strategy=strategy, **{**SIZES, "warmup_steps": 0, **options})


@pytest.fixture
def stats(monkeypatch):
    """(loss, statistics) of the last call of `masked_loss`, in which the strategy ends."""
    seen = []

    def watched(*arguments, **options):
        result = masked_loss(*arguments, **options)
        seen[:] = [result[1]]
        return result

    monkeypatch.setattr("aml.alignment.masked_loss", watched)
    return lambda: seen[0]


@pytest.mark.parametrize("limit", [{"quantile": 0.0}, {"quantile": 0.25}, {"quantile": 0.6}, {"threshold": 0.2}])
@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_all_filters_keep_the_same_number_of_pixels_in_every_sample(stats, limit, protect, padded):
    logits, target, alignment = example()
    valid = torch.ones(3, 32, 32, dtype=torch.bool)
    valid[0, 25:] = valid[1, :, 28:] = False
    kept, thresholds = {}, set()
    for strategy in PIXEL_STRATEGIES:
        aligner = build(strategy, protect_target=protect, **limit)
        record = aligner(logits, target, alignment, 7, valid if padded else None)[1]
        kept[strategy] = stats().kept
        thresholds.add(record["threshold"].item())
    assert torch.equal(kept["loss"], kept["random"])
    assert torch.equal(kept["loss"], kept["easiest"])
    assert len(thresholds) == 1
    if padded or "threshold" in limit:
        assert "threshold" not in limit or list(thresholds) == pytest.approx([0.2])
        return
    quantile = limit["quantile"]
    left_out = 1 - kept["loss"] / target[0].numel()
    if quantile == 0:
        assert left_out.max() <= 0
    else:
        # Not the quantile itself: resizing the map to pixels smooths it, and target pixels are protected.
        assert (left_out > 0.05).all() and (left_out < quantile + 0.15).all()


def test_the_count_is_exact_among_equal_losses(stats):
    _, target, alignment = example()
    logits = torch.full((3, 8, 8), -200.0)  # the loss of every background pixel is exactly 0
    counts = []
    for strategy in ("loss", "easiest"):
        build(strategy, quantile=0.5)(logits, target, alignment, 0)
        counts.append(stats().kept)
    assert torch.equal(*counts)


def test_easiest_leaves_out_the_lowest_losses():
    logits, target, alignment = example()
    aligner = build("easiest", quantile=0.5, protect_target=False)
    aligner(logits, target, alignment, step=0)[0].backward()
    filtering = {"similarity": aligner.similarity(alignment).detach(), "quantile": 0.5, "protect_target": False}
    losses = strategies.pixel_losses(logits, target)
    rank, _ = strategies.worst_ranked(logits, target, losses, filtering | {"valid": None})
    full = torch.nn.functional.interpolate(logits[:, None], size=32, mode="bilinear", align_corners=True)[:, 0]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(full, target.float(), reduction="none").detach()
    for sample in range(3):
        out = rank["similarity"][sample] < rank["threshold"][sample]
        assert out.any() and loss[sample][out].max() <= loss[sample][~out].min()


def test_random_depends_on_seed_and_step_only():
    logits, target, alignment = example()

    def loss(seed: int, step: int) -> torch.Tensor:
        torch.rand(3)  # the global generator plays no part
        return build("random", seed=seed)(logits, target, alignment, step)[0]

    assert torch.equal(loss(1, 5), loss(1, 5))
    assert not torch.equal(loss(1, 5), loss(1, 6))
    assert not torch.equal(loss(1, 5), loss(2, 5))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_left_out_during_the_warm_up(strategy):
    logits, target, alignment = example()
    aligner = build(strategy, warmup_steps=10, quantile=0.5)
    before, after = (aligner(logits, target, alignment, step)[1] for step in (9, 10))
    assert before["kept"] == 1 and before["target_left_out"] == 0
    assert (after["kept"] < 1) == ("threshold" in after) == (strategy in PIXEL_STRATEGIES)


@pytest.mark.parametrize("strategy", PIXEL_STRATEGIES)
def test_a_protected_target_is_never_left_out(strategy):
    logits, target, alignment = example()
    record = build(strategy, quantile=0.9)(logits, target, alignment, 0)[1]
    assert record["target_left_out"] == 0
    assert record["kept"] < 0.7
    unprotected = build(strategy, quantile=0.9, protect_target=False)(logits, target, alignment, 0)[1]
    assert unprotected["target_left_out"] > 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_the_logits_and_the_projection_but_no_feature(strategy):
    logits, target, alignment = example()
    alignment.visual.requires_grad_()
    alignment.text.requires_grad_()
    aligner = build(strategy)
    loss, record = aligner(logits, target, alignment, 0)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    assert alignment.visual.grad is None and alignment.text.grad is None
    assert all(parameter.grad is not None for parameter in aligner.parameters())
    assert not any(value.requires_grad for value in record.values())


def test_the_record_adds_up():
    logits, target, alignment = example()
    aligner = build("loss", bce_weight=0.5, dice_weight=2.0, aux_weight=0.3)
    loss, record = aligner(logits, target, alignment, 0)
    assert math.isclose(record["loss"], 0.5 * record["bce"] + 2 * record["dice"] + 0.3 * record["aux"], rel_tol=1e-5)
    assert record["loss"] == loss.detach()


def test_the_auxiliary_loss_makes_the_map_point_at_the_target():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(4, 12, generator=generator)  # four kinds of object, each with its own visual code and word
    words = torch.randn(4, 10, generator=generator)

    def batch() -> tuple:
        kind = torch.randperm(4, generator=generator)
        cells = codes[kind].view(1, 2, 2, 12).repeat_interleave(3, 1).repeat_interleave(3, 2).expand(8, 6, 6, 12)
        asked = torch.randint(4, (8,), generator=generator)
        target = (kind.view(2, 2)[None] == asked[:, None, None]).repeat_interleave(16, 1).repeat_interleave(16, 2)
        visual = cells.permute(0, 3, 1, 2) + 0.3 * torch.randn(8, 12, 6, 6, generator=generator)
        mask = torch.ones(8, 1, dtype=torch.bool)
        return torch.zeros(8, 8, 8), target.to(torch.uint8), AlignmentInputs(visual, words[asked][:, None], mask)

    def auc(aligner: AlignmentLoss) -> float:
        _, target, alignment = batch()
        return alignment_scores(aligner.similarity(alignment).detach(), target, quantile=0.25)[0].mean().item()

    aligner = build("loss", aux_weight=1.0)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    untrained = auc(aligner)
    for step in range(60):
        optimizer.zero_grad()
        aligner(*batch(), step)[0].backward()
        optimizer.step()
    assert auc(aligner) > max(0.97, untrained)


def test_padding_words_and_invalid_cells_change_nothing():
    logits, target, alignment = example()
    aligner = build("loss", quantile=0.5)
    valid = torch.ones(3, 6, 6, dtype=torch.bool)
    valid[:, 4:] = False
    results = []
    for filler in (0.0, 50.0):
        visual = alignment.visual.masked_fill(~valid[:, None], filler)
        text = alignment.text.masked_fill(~alignment.text_mask[..., None], filler)
        record = aligner(logits, target, AlignmentInputs(visual, text, alignment.text_mask, valid), 0)[1]
        results += [record["aux"], record["threshold"]]
    torch.testing.assert_close(results[:2], results[2:])


def test_letterbox_padding_counts_for_nothing():
    """The same picture without its padding gives the same loss, shares and limit."""
    logits, target, alignment = example(size=36)
    logits = torch.randn(3, 36, 36, generator=torch.Generator().manual_seed(5))  # resized, they would reach beyond
    valid = torch.zeros(3, 36, 36, dtype=torch.bool)
    valid[:, :24] = True  # four of the six rows of cells
    visual = alignment.visual[:, :, :4]
    for strategy in ("none", "loss"):
        aligner = build(strategy, quantile=0.3)
        records = []
        for filler in (0.0, torch.nan):
            filled = alignment.visual.clone()
            filled[:, :, 4:] = 0 if filler == 0 else 30
            padded = AlignmentInputs(filled, alignment.text, alignment.text_mask)
            records.append(aligner(logits.masked_fill(~valid, filler), target, padded, 0, valid)[1])
        alone = AlignmentInputs(visual, alignment.text, alignment.text_mask)
        records.append(aligner(logits[:, :24], target[:, :24], alone, 0)[1])
        assert records[0]["iou"] == records[2]["iou"] and records[0]["aux"] == pytest.approx(records[2]["aux"].item())
        if strategy == "none":
            torch.testing.assert_close(records[0], records[1])
            torch.testing.assert_close(records[0], records[2])
        else:  # at the border to the padding, pixels are in between two cells
            torch.testing.assert_close(records[0]["threshold"], records[2]["threshold"])
            assert records[0]["kept"] == pytest.approx(records[2]["kept"].item(), abs=0.08)


def test_a_batch_without_target_has_left_out_none_of_it():
    logits, target, alignment = example()
    assert build("loss")(logits, torch.zeros_like(target), alignment, 0)[1]["target_left_out"] == 0


@pytest.mark.parametrize("projection", ["gaussian", "linear"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.4, "softmax": True, "normalize": False, "scale": 0.5}])
def test_the_fused_operator_gives_what_its_parts_give(projection, options):
    """An untrained map needs no gradient, so that one operator does it all."""
    logits, target, alignment = example()
    aligner = build("loss", projection=projection, bce_weight=0.7, class_weight=(0.9, 1.1), **options)
    loss, record = aligner(logits, target, alignment, 0)
    expected, stats = masked_loss(
        logits, target, aligner.similarity(alignment), **aligner.limit, protect_target=True, bce_weight=0.7,
        class_weight=(0.9, 1.1), return_stats=True,
    )  # fmt: skip
    assert torch.equal(loss, expected) and torch.equal(record["threshold"], stats.threshold.mean())
    assert 0 < record["kept"] < 1 and "aux" not in record
    assert torch.equal(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


def test_the_auxiliary_loss_reaches_the_encoders_only_if_asked():
    logits, target, alignment = example()
    alignment.visual.requires_grad_()
    alignment.text.requires_grad_()
    build("loss", aux_into_encoders=True)(logits, target, alignment, 0)[0].backward()
    assert alignment.visual.grad.abs().sum() > 0 and alignment.text.grad.abs().sum() > 0


def test_auc_counts_pairs_and_halves_ties():
    similarity = torch.tensor([[[0.1, 0.5], [0.5, 0.9]], [[0.0, 0.0], [0.0, 0.0]], [[0.3, 0.1], [0.2, 0.4]]])
    target = torch.tensor([[[0, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    auc, left_out = alignment_scores(similarity, target, quantile=0.5)
    # First sample: the pairs (0.5; 0.1), (0.5; 0.5), (0.9; 0.1), (0.9; 0.5) count 1, 1/2, 1, 1.
    assert auc[0] == 3.5 / 4 and auc[1] == 0.5 and auc[2].isnan()
    assert left_out[0] == 0 and left_out[1] == 0 and left_out[2].isnan()


def test_left_out_share_is_what_the_loss_leaves_out():
    logits, target, alignment = example()
    aligner = build("loss", quantile=0.4, protect_target=False)
    similarity = aligner.similarity(alignment).detach()
    _, stats = masked_loss(logits, target, similarity, quantile=0.4, return_stats=True)
    expected = 1 - stats.kept_target / target.sum((1, 2)).double()
    torch.testing.assert_close(alignment_scores(similarity, target, quantile=0.4)[1], expected)
    limits = torch.stack([stats.threshold - 1, stats.threshold])
    torch.testing.assert_close(target_below(similarity, target, limits), torch.stack([0 * expected, expected]))
    _, stats = masked_loss(logits, target, similarity, threshold=0.1, return_stats=True)
    expected = 1 - stats.kept_target / target.sum((1, 2)).double()
    torch.testing.assert_close(alignment_scores(similarity, target, threshold=0.1)[1], expected)


def test_scores_do_not_look_at_padding():
    _, target, alignment = example(size=36)
    similarity = build("loss").similarity(alignment).detach()
    valid = torch.ones(3, 36, 36, dtype=torch.bool)
    valid[:, 30:] = False
    auc, _ = alignment_scores(similarity, target, quantile=0.25, valid=valid)
    similarity[:, 5] -= 3  # pixels from row 27 on are in between with it
    cut = valid.clone()
    cut[:, 27:] = False
    changed, _ = alignment_scores(similarity, target, quantile=0.25, valid=cut)
    full = torch.nn.functional.interpolate(similarity[:, None], (36, 36), mode="bilinear")[:, 0, :27]
    direct, _ = alignment_scores(full, target[:, :27], quantile=0.25)
    torch.testing.assert_close(changed, direct)
    assert not torch.equal(auc, changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "lose"}, "strategy='lose'.*none, loss, random, easiest, image"),
        ({"projection": "linea"}, "projection='linea'.*trained, gaussian, shared, linear, model, none"),
        ({"projection": "model"}, "projection='model'.*12 channels and words 10"),
        ({"words": "some"}, "words='some'.*words, attended, all"),
        ({"quantile": 1.0}, "quantile=1.0.*\\[0, 1\\)"),
        ({"quantile": 0.5, "threshold": 0.4}, "quantile=0.5, threshold=0.4: expected one"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"drop_ratio": 1.5}, "drop_ratio=1.5.*\\[0, 1\\]"),
        ({"strategy": "image", "aux_into_encoders": True}, "aux_into_encoders=True.*'image'.*False"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentLoss(**{**SIZES, **options})
