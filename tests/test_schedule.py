"""The learning rate: its shape, and the released program's numbers. The recipes in configs/."""

from pathlib import Path

import golden
import pytest

from aml.config import load
from aml.schedule import learning_rate_factor

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_the_rate_rises_linearly_and_falls_as_a_power():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1e-3) and max(factors) == factors[10] == 1.0
    assert factors[5] == pytest.approx((1 + 1e-3) / 2)
    assert factors[11] == pytest.approx(0.89**0.9) and factors[-1] == pytest.approx(0.01**0.9)
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert learning_rate_factor(0, 5, 0) == 1.0
    quirk = [learning_rate_factor(step, 100, 10, full_rate_first=True) for step in range(100)]
    assert quirk == [1.0, *factors[1:]]


@pytest.mark.skipif(not golden.GOLDEN.is_dir(), reason=f"{golden.GOLDEN} is absent")
@pytest.mark.parametrize("case", ["train_script_small", "no_warmup", "past_end", "defaults_argparse"])
def test_the_released_schedule_is_reproduced(case):
    tensors, description = golden.read("schedule_metrics")
    arguments = description["scheduler"][case]
    total, warmup = arguments["total_iters"], arguments["warmup_iters"] * arguments["warmup"]
    assert arguments["min_lr"] == 0 and arguments["power"] == 0.9
    rates = tensors[f"lr.{case}"][: total + 1]
    for step, rate in enumerate(rates.tolist()):
        factor = learning_rate_factor(step, total, warmup, full_rate_first=True, start=arguments["warmup_ratio"])
        assert rate == pytest.approx([base * factor for base in arguments["base_lrs"]], rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_the_published_one(path):
    config = load(path)
    assert (config.model.name, config.model.backbone) == ("caris", "swin_base_patch4_window7_224.ms_in22k")
    assert (config.model.text_encoder, config.model.image_size, config.model.max_tokens) == (
        "bert-base-uncased", 448, 20
    )
    assert (config.data.resize, config.data.augment, config.data.field) == ("squash", False, "sent")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (1e-4, 0.01, 1.0)
    assert (config.optim.warmup_steps, config.optim.full_rate_first) == (1500, False)
    assert (config.train.epochs, config.train.batch_size * config.train.accumulate) == (50, 16)
    alignment = config.alignment
    assert (alignment.strategy, alignment.bce_weight, alignment.dice_weight) == ("none", 1.0, 0.0)
    assert (alignment.background_weight, alignment.target_weight) == (0.9, 1.1)
    aml = load(path, ["alignment.strategy=loss"]).alignment
    assert (aml.projection, aml.quantile, aml.protect_target, aml.dice_weight) == ("trained", 0.25, True, 0.0)
    released = load(path, ["alignment.strategy=released"]).alignment
    assert (released.preset, released.projection, released.threshold) == ("released", "linear", 0.4)


def test_there_is_a_recipe_for_each_data_set():
    found = {(config.data.dataset, config.data.split_by) for config in map(load, CONFIGS.glob("*.yaml"))}
    assert found == {
        ("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google"), ("union", None),
        ("grefcoco", "unc"), ("rrsisd", "unc"),
    }
