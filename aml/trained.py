"""A trained model beside the data that it is evaluated on: what the commands that measure one share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aml import assembly, checkpoint, evaluation, predict, stored
from aml.alignment import AlignmentLoss
from aml.config import Config, ConfigError, load
from aml.console import on_terminal
from aml.data.dataset import RISDataset
from aml.data.union import Annotations, open_dataset, shared_images
from aml.models import RISModel
from aml.ranks import Ranks

_FIXED = ("model", "alignment", "optim")  # sections that a checkpoint has settled


@dataclass
class Trained:
    """settings: of the evaluation. training: those that the checkpoint was trained with."""

    folder: Path
    settings: Config
    training: Config
    model: RISModel
    aligner: AlignmentLoss
    annotations: Annotations

    def dataset(self, split: str) -> RISDataset:
        return assembly.build_dataset(self.settings, self.annotations, self.model, split, train=False)

    def trained_on(self, split: str) -> str | None:
        """A warning if images of the split were trained on: the data sets share photographs. None if not."""
        known = self._training_annotations
        if known is None or split == "train":
            return None
        try:
            shared, images = shared_images(known, self.annotations, split)
        except (OSError, ValueError):  # of a union: images are missing, or none is left to train on
            return None
        if not shared:
            return None
        return (
            f"warning: {shared} of the {images} images of {self.annotations.name} {split} are in the training split of "
            f"{known.name}, on which this checkpoint was trained: the figures are too high. A union that has "
            "both as members trains on none of them"
        )

    @functools.cached_property
    def _training_annotations(self) -> Annotations | None:
        """The data set that was trained on, as it lies beside the evaluated data; None where it does not."""
        trained, here = self.training.data, self.settings.data
        if not trained.root:
            return None
        if (trained.dataset, trained.split_by) == (here.dataset, here.split_by):
            return self.annotations
        try:
            return open_dataset(here.root, trained.dataset, trained.split_by, here.images, trained.field)
        except (OSError, ValueError):
            return None

    def evaluate(self, dataset: RISDataset, ranks: Ranks, judge_map: bool = True) -> dict[str, Any] | None:
        """An evaluation as `aml.stored` keeps it, on rank 0; None on the others. Collective.

        judge_map: score the similarity map too, for which images are encoded once more.
        """
        batch_size = self.settings.train.batch_size
        own = evaluation.evaluate(
            self.model,
            dataset,
            device=ranks.device,
            batch_size=batch_size,
            aligner=self.aligner if judge_map else None,
            indices=evaluation.part_of_rank(len(dataset), batch_size, ranks.rank, ranks.world),
            workers=self.settings.train.workers,
            progress=ranks.is_main and on_terminal(),
        )
        records = ranks.gather(own)
        if records is None:
            return None
        metrics = evaluation.metrics(records, dataset.sample_ids)
        place = {sample_id: i for i, sample_id in enumerate(dataset.sample_ids)}
        records.sort(key=lambda record: place[record["sample_id"]])
        return {**self.identity(dataset), "config": asdict(self.training), "metrics": metrics, "records": records}

    def identity(self, dataset: RISDataset) -> dict[str, Any]:
        """What the numbers of an evaluation are of."""
        return {
            "checkpoint": str(self.folder),
            "weights": stored.weights_of(self.folder),
            "data": self.settings.data.root,
            "dataset": self.annotations.name,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "field": self.settings.data.field,
            "image_size": dataset.image_size,
            "resize": dataset.resize,
            "perturb": list(dataset.perturb) if dataset.perturb else None,
        }


def open_trained(path: str, data: str | None, words: Sequence[str], device: torch.device) -> Trained:
    """The checkpoint at `path` and its data. data: another folder of data. words: further settings.

    Raises ConfigError for settings that the checkpoint has settled, and CheckpointError, OSError or ValueError for a
    checkpoint or data that cannot be read.
    """
    folder = checkpoint.resolve(path)
    settings = settings_beside(folder, [*([f"data.root={data}"] if data else []), *words])
    annotations = assembly.open_data(settings)
    model = predict.load_model(folder, device)
    aligner = predict.load_aligner(folder, model)
    return Trained(folder, settings, load(folder / "config.yaml"), model, aligner, annotations)


def settings_beside(folder: Path, words: Sequence[str]) -> Config:
    """Those of a complete checkpoint with further ones; ConfigError for what the checkpoint has settled."""
    settled = [word for word in words if word.partition(".")[0] in _FIXED]
    if settled:
        raise ConfigError([f"{word}: the checkpoint's own is used; leave the word out" for word in settled])
    return load(folder / "config.yaml", words)


def chosen_splits(text: str, annotations: Annotations) -> list[str]:
    """The splits that "val", "val,testA" or "all" stand for; "all": every split but train."""
    if text != "all":
        return list(dict.fromkeys(text.split(",")))
    found: list[str] = []
    for name in annotations.splits():
        letters = name.removeprefix("test")
        # REFER marks what belongs to several test splits by their letters: "testAB".
        several = name.startswith("test") and set(letters) <= set("ABC") and len(letters) > 1
        found += [f"test{letter}" for letter in letters] if several else [name]
    return [name for name in dict.fromkeys(found) if name != "train"]
