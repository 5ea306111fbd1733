"""Strategies that fill blocks of the image, their training steps, and parity with the released program's masking."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import partialmethod

import golden
import pytest
import tiny
import torch
from torch import nn

from aml.alignment import AlignmentLoss
from aml.config import load
from aml.models import FeatureTap
from aml.models.base import AlignmentInputs
from aml.runlog import read_log
from aml.strategies import STRATEGIES, BlockFilter, pixels_of_blocks, released_filter
from aml.training import train
from aml_kernels import filter_regions, sample_quantile

pytestmark = pytest.mark.usefixtures("one_thread")
needs_golden = pytest.mark.skipif(not golden.GOLDEN.is_dir(), reason=f"{golden.GOLDEN} is absent")
UNCAPPED = BlockFilter(drop_ratio=0.5, block_size=8, max_dropped=1.0)


class Plain(nn.Module):
    """A model with everything that stage 1 must not disturb: dropout, batch statistics, a part in another mode."""

    shares_space = False
    visual_dim, text_dim = 12, 10

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.Dropout(0.2))
        self.words = nn.Embedding(30, 10)
        self.head = nn.Conv2d(12, 1, 1)
        self.seen: list[torch.Tensor] = []

    def encode(self, image, tokens, text_mask):
        self.encoded_in = self.training, torch.is_grad_enabled()
        return AlignmentInputs(self.backbone(image), self.words(tokens), text_mask)

    def forward(self, image, tokens, text_mask, return_alignment=False):
        self.seen.append(image)
        visual = self.backbone(image)
        logits = self.head(visual).squeeze(1)
        return (logits, AlignmentInputs(visual, self.words(tokens), text_mask)) if return_alignment else logits


def batch(size: int = 64, samples: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(samples, size, size, dtype=torch.uint8)
    for sample in range(samples):
        target[sample, 10 + sample : 20 + 5 * sample, 20:41] = 1
    return {
        "image": torch.randn(samples, 3, size, size, generator=generator),
        "tokens": torch.randint(30, (samples, 5), generator=generator),
        "text_mask": torch.ones(samples, 5, dtype=torch.bool),
        "target": target,
    }


def build(strategy: str, **options) -> tuple[Plain, AlignmentLoss]:
    torch.manual_seed(0)
    sizes = {"visual_dim": 12, "text_dim": 10, "dim": 8, "block_size": 8, "warmup_steps": 0}
    return Plain(), AlignmentLoss(strategy=strategy, **{**sizes, **options})


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """image [3, 3, 64, 60] and map [3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 64, 60, generator=generator), torch.randn(3, 8, 8, generator=generator)


# ------------------------------------------------------------------------------------------------------- blocks


def test_without_a_cap_it_is_the_operator():
    image, similarity = maps()
    limit = sample_quantile(similarity, 0.25)
    filtered, dropped = UNCAPPED.weak(image, similarity, limit, seed=5)
    expected = filter_regions(image, similarity, quantile=0.25, drop_ratio=0.5, block_size=8, seed=5)
    assert torch.equal(filtered, expected[0]) and torch.equal(dropped, expected[1]) and dropped.any()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_the_cap_keeps_those_that_were_drawn_first(share):
    image, similarity = maps()
    limit = sample_quantile(similarity, 0.5)
    _, free = UNCAPPED.weak(image, similarity, limit, seed=5)
    filtered, dropped = replace(UNCAPPED, max_dropped=share).weak(image, similarity, limit, seed=5)
    most = int(share * 64)
    assert (free.sum((1, 2)) > most).all() and (dropped.sum((1, 2)) == most).all()
    assert (dropped & ~free).sum() == 0
    # The operator itself drops the same ones when a smaller ratio asks for as many.
    weak = replace(UNCAPPED, drop_ratio=1.0).weak(image, similarity, limit, seed=5)[1].sum((1, 2))
    for sample in range(3):
        fewer = replace(UNCAPPED, drop_ratio=most / weak[sample].item())
        assert torch.equal(fewer.weak(image, similarity, limit, seed=5)[1][sample], dropped[sample])
    gone = pixels_of_blocks(dropped, 8, image.shape[2:])[:, None].expand_as(image)
    assert (filtered[gone] == 0).all() and torch.equal(filtered[~gone], image[~gone])


def test_cells_of_padding_are_not_weak():
    image, similarity = maps()
    map_valid = torch.ones(3, 8, 8, dtype=torch.bool)
    map_valid[:, 5:] = False
    similarity = similarity.masked_fill(~map_valid, -9.0)
    limit = sample_quantile(similarity, 0.25, valid=map_valid)
    every = replace(UNCAPPED, drop_ratio=1.0)
    _, dropped = every.weak(image, similarity, limit, seed=5, map_valid=map_valid)
    assert dropped.any() and not dropped[:, 5:].any()
    assert every.weak(image, similarity, limit, seed=5)[1][:, 5:].all()


def test_random_blocks_are_spread_over_all_that_are_allowed():
    image = torch.ones(1, 3, 64, 60)
    valid, protect = torch.ones(1, 64, 60, dtype=torch.bool), torch.zeros(1, 64, 60, dtype=torch.bool)
    valid[:, :8] = False
    protect[:, 8] = True  # one row of pixels protects a row of blocks
    blocks, often = replace(UNCAPPED, fill=7.0), torch.zeros(8, 8)
    for seed in range(300):
        filtered, dropped = blocks.random(image, torch.tensor([6]), seed, protect, valid)
        assert dropped.sum() == 6
        assert ((filtered == 7).all(1) == pixels_of_blocks(dropped, 8, image.shape[2:])).all()
        often += dropped[0]
    # 300 draws of 6 from 48: 37.5 each, standard deviation 5.7.
    assert not often[:2].any() and (often[2:] > 14).all() and (often[2:] < 61).all()
    _, every = blocks.random(image, torch.tensor([64]), 0, protect, valid)
    assert every[:, 2:].all() and every.sum() == 48


# ---------------------------------------------------------------------------------------------- training steps


@pytest.mark.parametrize("strategy", ["image", "random_blocks"])
def test_the_model_is_trained_on_the_filtered_image(strategy):
    model, aligner = build(strategy, drop_ratio=0.6, quantile=0.5)
    model.backbone[2].eval()
    given = batch()
    loss, record = aligner.training_step(model, given, 3)
    assert model.encoded_in == (False, False)  # stage 1: as in evaluation, without gradient
    assert model.training and model.backbone[1].training and not model.backbone[2].training  # and back again
    assert model.backbone[1].num_batches_tracked == 1  # only the pass that trains counts
    (image,) = model.seen
    gone = (image == 0).all(1)
    assert record["kept"] == pytest.approx(1 - gone.float().mean().item()) and 0.5 < record["kept"] < 0.95
    blocks = gone.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    assert (blocks.all(3) == blocks.any(3)).all()
    assert not (gone & (given["target"] > 0)).any() and record["target_left_out"] == 0
    assert torch.equal(image[~gone[:, None].expand_as(image)], given["image"][~gone[:, None].expand_as(image)])
    loss.backward()
    assert all(parameter.grad is not None for parameter in aligner.parameters())
    assert model.backbone[0].weight.grad.abs().sum() > 0
    assert {"aux", "bce", "dice", "iou", "threshold", "loss"} <= record.keys()


def test_random_blocks_are_as_many_as_weak_ones_and_elsewhere():
    records, gone = {}, {}
    for strategy in ("image", "random_blocks"):
        model, aligner = build(strategy, drop_ratio=0.6, quantile=0.5)
        records[strategy] = aligner.training_step(model.eval(), batch(), 3)[1]
        gone[strategy] = (model.seen[0] == 0).all(1)
    assert torch.equal(*(each.sum((1, 2)) for each in gone.values())) and not torch.equal(*gone.values())
    for name in ("kept", "threshold", "target_left_out"):
        assert torch.equal(records["image"][name], records["random_blocks"][name])


def test_an_unprotected_target_is_dropped_and_counted():
    model, aligner = build("image", drop_ratio=1.0, max_dropped=1.0, quantile=0.9, protect_target=False)
    given = batch()
    record = aligner.training_step(model, given, 0)[1]
    gone = (model.seen[0] == 0).all(1) & (given["target"] > 0)
    assert record["target_left_out"] == pytest.approx((gone.sum() / (given["target"] > 0).sum()).item())
    assert record["target_left_out"] > 0.3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_depend_on_seed_and_step_only_and_begin_after_the_warm_up(strategy):
    def images(seed: int, step: int) -> list[torch.Tensor]:
        model, aligner = build(strategy, seed=seed, quantile=0.5, warmup_steps=2, projection="gaussian")
        aligner.patchmax.load_state_dict(build(strategy, projection="gaussian")[1].patchmax.state_dict())
        torch.rand(step)  # the global generator plays no part
        aligner.training_step(model.eval(), batch(), step)
        return model.seen

    whole = batch()["image"]
    assert [torch.equal(image, whole) for image in images(0, 1)] == [True]
    filtered = images(0, 2)[-1]
    if strategy in ("image", "random_blocks", "released"):
        assert torch.equal(filtered, images(0, 2)[-1]) and not torch.equal(filtered, whole)
        if strategy != "released":  # of four blocks it drops nearly always all
            assert not torch.equal(filtered, images(0, 3)[-1]) and not torch.equal(filtered, images(1, 2)[-1])
    else:
        assert torch.equal(filtered, whole)


@pytest.mark.parametrize("strategy", ["image", "random_blocks"])
def test_padding_is_neither_dropped_nor_counted(strategy):
    model, aligner = build(strategy, drop_ratio=1.0, quantile=0.5, max_dropped=1.0, protect_target=False)
    given = batch()
    given["valid"] = torch.ones_like(given["target"], dtype=torch.bool)
    given["valid"][:, 48:] = False
    record = aligner.training_step(model, given, 0)[1]
    gone = (model.seen[0] == 0).all(1)
    assert gone.any() and not gone[:, 48:].any()
    assert record["kept"] == pytest.approx(1 - gone[:, :48].float().mean().item())


def test_half_precision_of_stage_one_takes_no_gradient_away():
    """Autocast keeps the weights that it has rounded: those of the pass without gradient must not be used again."""
    model, aligner = build("image")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = aligner.training_step(model, batch(), 0)
    loss.backward()
    assert model.backbone[0].weight.grad is not None and model.backbone[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_a_model_that_was_not_written_for_it(strategy):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn, self.words, self.out = nn.Conv2d(3, 12, 8, 8), nn.Embedding(30, 10), nn.Linear(22, 1)

        def forward(self, image, tokens, text_mask):
            pixels = self.cnn(image).movedim(1, 3)
            sentence = self.words(tokens).mean(1)[:, None, None].expand(*pixels.shape[:3], -1)
            return self.out(torch.cat([pixels, sentence], 3))[..., 0]

    net = Foreign()
    aligner = build(strategy, quantile=0.5)[1]
    loss, record = aligner.training_step(FeatureTap(net, visual="cnn", text="words"), batch(), 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in (*net.parameters(), *aligner.parameters()))
    assert (record["kept"] < 1) == (strategy != "none")


def test_released_is_the_mean_of_a_clean_and_a_filtered_pass():
    options = {"class_weight": (0.9, 1.1), "dice_weight": 0.0, "projection": "linear", "words": "all"}
    model, aligner = build("released", **options, normalize=False, softmax=True, threshold=0.4)
    model.eval()
    given = batch()
    loss, record = aligner.training_step(model, given, 0)
    clean, filtered = model.seen
    assert torch.equal(clean, given["image"]) and (filtered == 0).any()
    losses = []
    for image in (clean, filtered):
        scores = nn.functional.interpolate(
            model.head(model.backbone(image)), given["target"].shape[1:], mode="bilinear", align_corners=True
        )
        both = torch.cat([torch.zeros_like(scores), scores], dim=1)  # z1 - z0 is the logit
        losses.append(nn.functional.cross_entropy(both, given["target"].long(), torch.tensor([0.9, 1.1])))
    torch.testing.assert_close(loss, 0.5 * losses[0] + 0.5 * losses[1])
    torch.testing.assert_close(record["loss_filtered"], losses[1])
    assert record["kept"] == pytest.approx((filtered != 0).all(1).float().mean().item())
    with pytest.raises(ValueError, match="valid.*released.*squashed"):
        aligner.training_step(model, given | {"valid": given["target"] < 2}, 0)
    with pytest.raises(ValueError, match=r"image.*32 x 32.*\[3, 3, 48, 48\]"):
        released_filter(torch.ones(3, 3, 48, 48), torch.ones(3, 2, 2), torch.ones(3), torch.randperm)


# -------------------------------------------------------------------------------------------- released program


def afm_cases() -> list[str]:
    return list(golden.read("afm")[1]["cases"]) if golden.GOLDEN.is_dir() else ["absent"]


@needs_golden
@pytest.mark.parametrize("case", afm_cases())
def test_released_masking_to_the_bit(case):
    tensors, meta = golden.read("afm")
    meta = meta["cases"][case]
    own = {name.removeprefix(f"{case}."): value for name, value in tensors.items() if name.startswith(f"{case}.")}
    samples, side = meta["B"], meta["H"]
    image = torch.from_numpy(golden.recipe().gauss(meta["image_seed"], (samples, 3, side, side), 1.0))
    assert digest(image) == meta["image_sha"]
    # Permutations that are too long to be stored are what torch's generator gives for the recorded seed.
    torch.manual_seed(meta["torch_seed"])
    lengths: list[int] = []

    def permutation(count: int) -> torch.Tensor:
        drawn, stored = torch.randperm(count), own.get(f"perm{len(lengths)}")
        lengths.append(count)
        return drawn if stored is None else stored.long()

    grid = side // 32
    relevance = own["attention"].amax(2).view(samples, grid, grid)
    assert torch.equal(relevance.flatten(1), own["relevance"])
    limit = torch.full((samples,), meta["threshold"])
    filtered, dropped = released_filter(image, relevance, limit, permutation)
    assert lengths == [count for count in own["num_low_pixels"].tolist() if count]
    assert torch.equal(dropped.flatten(1).to(torch.uint8), own["masked"])
    assert digest(filtered) == meta["output_sha"]
    if "output" in own:
        assert torch.equal(filtered, own["output"])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@needs_golden
def test_released_step_of_the_tiny_caris(tmp_path, monkeypatch):
    """Similarity, masking, both passes and the gradients of one step, through the strategy as a run uses it."""
    from aml.assembly import build_aligner
    from aml.models.caris_keys import official_name

    tensors, meta = golden.read("tiny_model")
    seed = meta["weight_seed"]
    model = golden.set_weights(golden.tiny_caris(tmp_path), seed).train()
    sizes = meta["config"]["L"], meta["config"]["vocab"], (12, 5)
    image, tokens, text_mask, target = golden.inputs(meta["cases"]["sq"]["seed"], 2, 96, 96, *sizes)
    given = {"image": image, "tokens": tokens, "text_mask": text_mask, "target": target.to(torch.uint8)}
    aligner = build_aligner(load(None, ["alignment.strategy=released"]), model)
    draw = golden.recipe().weight
    for name in ("weight", "bias"):
        buffer = getattr(aligner.patchmax.projection, name)
        buffer.copy_(torch.from_numpy(draw(f"aug.text_proj.{name}", tuple(buffer.shape), seed)))
    monkeypatch.setattr(aligner, "_permutation", lambda count, generator: torch.randperm(count))
    masked = []

    def watched(*arguments):
        torch.manual_seed(meta["afm_seed"])
        filtered, dropped = released_filter(*arguments)
        masked.append(dropped)
        return filtered, dropped

    monkeypatch.setattr("aml.strategies.released_filter", watched)
    loss, record = aligner.training_step(model, given, 0)
    assert torch.equal(masked[0].flatten(1).to(torch.uint8), tensors["train.pass2_masked"])
    assert record["loss_clean"].item() == pytest.approx(tensors["train.pass1_loss"].item(), abs=3e-6)
    assert record["loss_filtered"].item() == pytest.approx(tensors["train.pass2_loss"].item(), abs=3e-6)
    loss.backward()
    found = {official_name(name): parameter.grad for name, parameter in model.named_parameters()}
    stored = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    assert len(stored) == 19
    for name, expected in stored.items():
        assert golden.largest_difference(found[name], expected) <= 4e-5 * expected.abs().max(), name


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "words",
    [
        ["alignment.strategy=image", "alignment.block_size=16", "alignment.warmup=0.5", "train.precision=bf16"],
        ["alignment.strategy=random_blocks", "alignment.block_size=16", "alignment.projection=shared"],
        ["alignment.preset=paper", "alignment.words=attended", "train.compile=true"],
        ["alignment.strategy=released"],
    ],
    ids=lambda words: words[0].partition("=")[2],
)
def test_a_run_of_every_kind_logs_the_gauges(place, words, request, monkeypatch):
    # What is asked is whether the run can be traced; generating code for it takes minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    out = place / request.node.callspec.id
    train(load(None, tiny.settings(place / "data", place / "encoder", out, "train.steps=4", "train.keep=1", *words)))
    lines = read_log(out / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    for name in ("loss", "kept", "target_left_out", "iou", "bce", "dice"):
        assert all(math.isfinite(line[name]) for line in steps), name
    assert math.isfinite(steps[-1]["threshold"]) and (steps[0]["kept"] == 1) == ("alignment.warmup=0.5" in words)
    evaluated = lines[-1]
    assert evaluated["kind"] == "eval" and 0 <= evaluated["auc"] <= 1 and 0 <= evaluated["auc_wrong_sentence"] <= 1
    assert evaluated["area_ratio"] >= 0 and 0 <= evaluated["target_left_out"] <= 1
