"""Strategies, projections and scores of the alignment; parity with the released program's numbers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from aml.alignment import GAUSSIAN_DIM, STRATEGIES, AlignmentLoss, GaussianProjection, alignment_scores
from aml.models.base import AlignmentInputs
from aml_kernels import masked_loss, pixel_text_similarity

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "fixtures" / "golden"
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


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.6])
def test_all_filters_keep_the_same_number_of_pixels_in_every_sample(quantile, protect):
    logits, target, alignment = example()
    kept = {}
    for strategy in ("loss", "random", "easiest"):
        aligner = build(strategy, quantile=quantile, protect_target=protect)
        arguments = aligner._filter(logits, target, aligner.similarity(alignment).detach(), None, step=7)
        kept[strategy] = masked_loss(logits, target, return_stats=True, **arguments)[1].kept
    assert torch.equal(kept["loss"], kept["random"])
    assert torch.equal(kept["loss"], kept["easiest"])
    left_out = 1 - kept["loss"] / target[0].numel()
    if quantile == 0:
        assert left_out.max() <= 0
    else:
        # Not the quantile itself: resizing the map to pixels smooths it, and target pixels are protected.
        assert (left_out > 0.05).all() and (left_out < quantile + 0.15).all()


def test_the_count_is_exact_among_equal_losses():
    _, target, alignment = example()
    logits = torch.full((3, 8, 8), -200.0)  # the loss of every background pixel is exactly 0
    counts = []
    for strategy in ("loss", "easiest"):
        aligner = build(strategy, quantile=0.5)
        arguments = aligner._filter(logits, target, aligner.similarity(alignment).detach(), None, step=0)
        counts.append(masked_loss(logits, target, return_stats=True, **arguments)[1].kept)
    assert torch.equal(*counts)


def test_easiest_leaves_out_the_lowest_losses():
    logits, target, alignment = example()
    aligner = build("easiest", quantile=0.5, protect_target=False)
    aligner(logits, target, alignment, step=0)[0].backward()
    full = torch.nn.functional.interpolate(logits[:, None], size=32, mode="bilinear", align_corners=True)[:, 0]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(full, target.float(), reduction="none").detach()
    rank = aligner._filter(logits, target, aligner.similarity(alignment).detach(), None, 0)
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
    assert (after["kept"] < 1) == (strategy != "none")


@pytest.mark.parametrize("strategy", ["loss", "random", "easiest"])
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
        return alignment_scores(aligner.similarity(alignment).detach(), target, 0.25)[0].mean().item()

    aligner = build("loss", aux_weight=1.0)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    untrained = auc(aligner)
    for step in range(60):
        optimizer.zero_grad()
        aligner(*batch(), step)[0].backward()
        optimizer.step()
    assert auc(aligner) > max(0.97, untrained)


def test_the_gaussian_projection_equals_the_wide_product():
    projection = GaussianProjection(12, 10, seed=4)
    wide = torch.randn(GAUSSIAN_DIM, 22, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wide /= math.sqrt(GAUSSIAN_DIM)
    _, _, alignment = example()
    visual = torch.einsum("dc,bchw->bdhw", wide[:, :12], alignment.visual.double())
    text = alignment.text.double() @ wide[:, 12:].T
    expected = pixel_text_similarity(visual, text, alignment.text_mask)
    aligner = build("loss", projection="gaussian", seed=4)
    assert torch.equal(aligner.projection.visual, projection.visual)
    torch.testing.assert_close(aligner.similarity(alignment).double(), expected, atol=2e-6, rtol=0)
    assert not list(aligner.parameters())
    loss, record = aligner(*example(), 0)
    assert "aux" not in record and loss.requires_grad


def test_padding_words_and_invalid_cells_change_nothing():
    logits, target, alignment = example()
    aligner = build("loss", quantile=0.5)
    valid = torch.ones(3, 6, 6, dtype=torch.bool)
    valid[:, 4:] = False
    results = []
    for filler in (0.0, 50.0):
        visual = alignment.visual.masked_fill(~valid[:, None], filler)
        text = alignment.text.masked_fill(~alignment.text_mask[..., None], filler)
        loss, record = aligner(logits, target, AlignmentInputs(visual, text, alignment.text_mask, valid), 0)
        results.append(record["aux"])
        similarity = aligner.similarity(AlignmentInputs(visual, text, alignment.text_mask))
        arguments = aligner._filter(logits, target, similarity.detach(), valid, 0)
        results.append(masked_loss(logits, target, return_stats=True, **arguments)[1].threshold)
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_auc_counts_pairs_and_halves_ties():
    similarity = torch.tensor([[[0.1, 0.5], [0.5, 0.9]], [[0.0, 0.0], [0.0, 0.0]], [[0.3, 0.1], [0.2, 0.4]]])
    target = torch.tensor([[[0, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    auc, left_out = alignment_scores(similarity, target, 0.5)
    # First sample: the pairs (0.5; 0.1), (0.5; 0.5), (0.9; 0.1), (0.9; 0.5) count 1, 1/2, 1, 1.
    assert auc[0] == 3.5 / 4 and auc[1] == 0.5 and auc[2].isnan()
    assert left_out[0] == 0 and left_out[1] == 0 and left_out[2].isnan()


def test_left_out_share_is_what_the_loss_leaves_out():
    logits, target, alignment = example()
    aligner = build("loss", quantile=0.4, protect_target=False)
    similarity = aligner.similarity(alignment).detach()
    _, stats = masked_loss(logits, target, similarity, quantile=0.4, return_stats=True)
    _, left_out = alignment_scores(similarity, target, 0.4)
    torch.testing.assert_close(left_out, 1 - stats.kept_target / target.sum((1, 2)).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "lose"}, "strategy='lose'.*none, loss, random, easiest"),
        ({"projection": "linear"}, "projection='linear'.*trained or gaussian"),
        ({"quantile": 1.0}, "quantile=1.0.*\\[0, 1\\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentLoss(**{**SIZES, **options})


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")
@pytest.mark.parametrize(
    "case", ["small14", "small7_L5", "small7_L1", "sat14", "rect", "real7_L5", "real14", "real14_sat", "real15"]
)
def test_released_alignment_is_reproduced(case):
    """Softmax over all words, padding included, of unnormalised products, then the maximum."""
    safetensors = pytest.importorskip("safetensors")
    sys.path.insert(0, str(GOLDEN))
    try:
        from golden_recipe import gauss
    finally:
        sys.path.remove(str(GOLDEN))
    with safetensors.safe_open(GOLDEN / "alignment.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["json"])["cases"][case]
        relevance = file.get_tensor(f"{case}.relevance")
    batch, length, seed = meta["B"], meta["L"], meta["seed"]
    visual_dim, text_dim = meta["visual_dim"], meta["text_dim"]

    def draw(offset: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.from_numpy(gauss(seed + offset, shape, scale))

    weight = draw(0, (visual_dim, text_dim), text_dim**-0.5)
    text = draw(4, (batch, length, text_dim), meta["text_scale"]) @ weight.T + draw(1, (visual_dim,), 0.1)
    visual = draw(5, (batch, visual_dim, meta["H"], meta["W"]), meta["visual_scale"])
    result = pixel_text_similarity(visual, text, normalize=False, softmax=True)
    torch.testing.assert_close(result.flatten(1), relevance, atol=1e-5, rtol=0)
