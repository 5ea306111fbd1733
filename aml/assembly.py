"""From a configuration to its data and its loss (the model itself: `aml.models.build_model`)."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

import torch

from aml.alignment import AlignmentLoss
from aml.config import Config, ConfigError
from aml.data.dataset import RISDataset
from aml.data.layout import some
from aml.data.union import Annotations, open_dataset, read_skip_list
from aml.models import RISModel
from aml.strategies import RELEASED_BLOCK


def training_problems(config: Config) -> list[str]:
    """Settings that this machine, or the strategy, cannot be trained with: a line for each."""
    problems = []
    if config.train.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("train.precision=fp16: takes a GPU; give bf16 or no")
    if config.alignment.strategy == "released":
        # Its first filtered step, which may come late, would find out.
        name, size, resize = "alignment.strategy=released", config.model.image_size, config.data.resize
        if resize != "squash":
            problems.append(f"data.resize={resize}: {name} knows no padding; give data.resize=squash")
        if size is not None and size % RELEASED_BLOCK:
            problems.append(f"model.image_size={size}: {name} fills squares of {RELEASED_BLOCK}; give a multiple of it")
    return problems


def open_data(config: Config) -> Annotations:
    """The annotations that the configuration names; says how much of them `data.skip` leaves out."""
    data = config.data
    if not data.root:
        raise ConfigError(["data.root: no data given; use --data FOLDER or data.root=FOLDER"])
    skip = read_skip_list(data.skip) if data.skip else []
    found = open_dataset(data.root, data.dataset, data.split_by, data.images, data.field, skip)
    if data.skip and os.environ.get("RANK", "0") == "0":
        print(f"data.skip={data.skip}: {found.skipped} objects left out of all splits", file=sys.stderr)
        if unknown := sorted(found.unknown_skips):
            print(
                f"data.skip={data.skip}: {len(unknown)} of {len(skip)} names are of no image of {found.name}"
                f" ({some(unknown)}); the names are those in instances.json",
                file=sys.stderr,
            )
    return found


def build_dataset(
    config: Config, refer: Annotations, model: RISModel, split: str, train: bool
) -> RISDataset:
    """A split as the model takes it."""
    return RISDataset(
        refer,
        split,
        image_size=model.image_size,
        tokenize=model.tokenize,
        mean=model.image_mean,
        std=model.image_std,
        train=train,
        seed=config.train.seed,
        augment=config.data.augment,
        resize=config.data.resize,
    )


def build_aligner(config: Config, model: RISModel, warmup_steps: int = 0) -> AlignmentLoss:
    """The loss that the configuration names, for the features of the model."""
    options = asdict(config.alignment) | {"warmup_steps": warmup_steps, "seed": config.train.seed}
    options["class_weight"] = options.pop("background_weight"), options.pop("target_weight")
    for name in ("preset", "warmup"):
        del options[name]
    if options["projection"] == "model" and not model.shares_space:
        raise ConfigError(
            [f"alignment.projection=model: {config.model.name} has no space that pixels and words share; CLIPSeg has"]
        )
    return AlignmentLoss(**options, visual_dim=model.visual_dim, text_dim=model.text_dim)
