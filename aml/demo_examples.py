"""The examples in the report of `aml demo`: which sentences, and what is drawn of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aml.alignment_scores import resized_map
from aml.data.dataset import collate
from aml.evaluation import resized
from aml.metrics import iou
from aml.trained import Trained
from aml_kernels import sample_quantile

PREDICTED = ("none", "loss")  # strategies whose predictions are shown
RANKS = (0.95, 0.85, 0.75, 0.6, 0.45, 0.3)  # of the IoU of "loss" among the unseen sentences


def choose_examples(records: Sequence[dict[str, Any]], image_of: dict[str, int]) -> list[str]:
    """Sample ids at fixed ranks of IoU, so neither the best nor picked by hand; each from another image."""
    ranked = sorted(records, key=lambda record: (iou(record), record["sample_id"]))
    chosen: list[str] = []
    used: set[int] = set()
    for rank in RANKS:
        place = rank * (len(ranked) - 1)
        near = sorted(range(len(ranked)), key=lambda i: abs(i - place))
        names = [ranked[i]["sample_id"] for i in near if image_of[ranked[i]["sample_id"]] not in used]
        chosen += names[:1]
        used |= {image_of[name] for name in names[:1]}
    return chosen


@torch.no_grad()
def make_examples(names: Sequence[str], runs: dict[str, Trained]) -> list[dict[str, Any]]:
    """For each sample id: sentence, image [S, S, 3] in [0, 1], target, similarity map of "loss", the pixels it
    leaves out, and the predictions of "none" and "loss" with their IoU. Masks are bool [S, S]."""
    examples: list[dict[str, Any]] = [{} for _ in names]
    for strategy in PREDICTED:
        run = runs[strategy]
        model, dataset = run.model, run.dataset("test")
        positions = [dataset.sample_ids.index(name) for name in names]
        batch = collate([dataset[position] for position in positions])
        logits, alignment = model(batch["image"], batch["tokens"], batch["text_mask"], return_alignment=True)
        target = batch["target"] > 0
        predicted = resized(logits, target.shape[1:]) > 0
        for i, example in enumerate(examples):
            union = (predicted[i] | target[i]).sum().item()
            example[strategy] = predicted[i].numpy()
            example[f"{strategy}_iou"] = (predicted[i] & target[i]).sum().item() / max(union, 1)
        if strategy == "loss":
            similarity = run.aligner.similarity(alignment)
            assert run.aligner.quantile is not None  # the demo gives no threshold
            left_out, upsampled = left_out_pixels(similarity, target, run.aligner.quantile, run.aligner.protect_target)
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image_mean, model.image_std))
            for i, example in enumerate(examples):
                example["sentence"] = dataset.expressions[positions[i]].sentence
                example["image"] = (batch["image"][i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
                example["target"] = target[i].numpy()
                example["similarity"], example["left_out"] = upsampled[i].numpy(), left_out[i].numpy()
    return examples


def left_out_pixels(
    similarity: Tensor, target: Tensor, quantile: float, protect_target: bool
) -> tuple[Tensor, Tensor]:
    """What `masked_loss` leaves out, bool [B, H, W], and the map at the target's size [B, H, W]."""
    threshold = sample_quantile(similarity, quantile).view(-1, 1, 1)
    upsampled = resized_map(similarity, target.shape[1:])
    left_out = upsampled < threshold
    return (left_out & ~target if protect_target else left_out), upsampled
