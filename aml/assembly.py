"""From a configuration to its data and its loss (the model itself: `aml.models.build_model`)."""

from __future__ import annotations

from dataclasses import asdict

from aml.alignment import AlignmentLoss
from aml.config import Config, ConfigError
from aml.data.dataset import RISDataset
from aml.data.refer import ReferDataset
from aml.models import RISModel


def open_data(config: Config) -> ReferDataset:
    """The annotations that the configuration names."""
    data = config.data
    if not data.root:
        raise ConfigError(["data.root: no data given; use --data FOLDER or data.root=FOLDER"])
    return ReferDataset(data.root, data.dataset, data.split_by, data.images, data.field)


def build_dataset(
    config: Config, refer: ReferDataset, model: RISModel, split: str, train: bool
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
