"""Evaluation by sample id: one record per sentence with integer counts; `aml.metrics` makes metrics of them.

Means of batch means, padded shards and means over ranks are wrong in ways that nobody sees; records are not. Ranks
evaluate disjoint `indices`, the records are put together, and `metrics` refuses a set that is not complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aml.alignment import AlignmentLoss
from aml.alignment_scores import alignment_scores
from aml.data.dataset import RISDataset, full_targets
from aml.data.loading import read_batches
from aml.data.pixels import at_own_size, cells_of_picture
from aml.metrics import metrics
from aml.models.base import RISModel

__all__ = ["counts", "evaluate", "metrics", "part_of_rank", "resized", "wrong_sentence"]


@torch.no_grad()
def evaluate(
    model: RISModel,
    dataset: RISDataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    aligner: AlignmentLoss | None = None,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Predict every sentence of an evaluation set once, and count.

    dataset: built with `train=False`. indices: the part of it to evaluate, as `part_of_rank` gives it; default: all.
    aligner: also judge its similarity map.

    Returns one record per sentence: `sample_id`; `image`, the name of the photograph's file; `sentence`; `no_target`,
    whether it refers to nothing (gRefCOCO); `intersection`, `union`, `target` in pixels of the model's square input;
    `full_intersection`, `full_union`, `full_target` at the photograph's own size. With `aligner` also `auc` and
    `target_left_out` of the map (see `alignment_scores`) and `auc_wrong_sentence`, the AUC against the same target with
    the words of a sentence about another photograph: what remains then is objectness and not reference. These three
    are None where they are not defined, as for an empty target.

    The model is left in the mode (train or eval) it was in. No collectives: ranks may evaluate unequal parts.
    """
    if dataset.train:
        raise ValueError("dataset: built with train=True; evaluation needs RISDataset(..., train=False)")
    was_training = model.training
    model.eval()
    chosen = range(len(dataset)) if indices is None else list(indices)
    batches = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    records: list[dict[str, Any]] = []
    read = read_batches(dataset, batches, workers, device)
    hidden = None if progress else True
    with closing(read), tqdm(read, "evaluate", len(batches), unit="batch", disable=hidden, leave=False) as bar:
        for batch in bar:
            columns = _judged(batch, model, dataset, device, aligner)
            records += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    model.train(was_training)
    return records


def part_of_rank(length: int, batch_size: int, rank: int, world: int) -> list[int]:
    """The indices of a set of `length` that this rank evaluates: whole batches, as one process would make them.

    So every sample is in the batch that it is in with one process, and its numbers are the same to the bit; and the
    sentences of one object, which follow each other, stay together: its photograph is read once.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"batch_size={batch_size}, rank={rank}, world={world}: expected 1 or more, 0 <= rank < world")
    batches = [range(first, min(first + batch_size, length)) for first in range(0, length, batch_size)]
    return [index for batch in batches[rank::world] for index in batch]


def counts(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of intersection, union and target per sample, int64 [B], of two masks [B, H, W]."""
    prediction, target = prediction > 0, target > 0
    pixels = (1, 2)
    return (prediction & target).sum(pixels), (prediction | target).sum(pixels), target.sum(pixels)


def _judged(
    batch: dict[str, Any],
    model: RISModel,
    dataset: RISDataset,
    device: torch.device | str,
    aligner: AlignmentLoss | None,
) -> dict[str, list]:
    """The records of a batch by columns; see `evaluate`."""
    image, tokens, text_mask, target = (
        batch[name].to(device, non_blocking=True) for name in ("image", "tokens", "text_mask", "target")
    )
    expressions = [dataset.expressions[index] for index in batch["index"].tolist()]
    valid = batch["valid"].to(device) if "valid" in batch else None
    logits, alignment = model(image, tokens, text_mask, return_alignment=True)
    columns: dict[str, list] = {
        "sample_id": batch["sample_id"],
        "image": [expression.image_path.name for expression in expressions],
        "sentence": [expression.sentence for expression in expressions],
        "no_target": [not expression.annotation_ids for expression in expressions],
    }
    columns |= _counts(logits, target, valid, full_targets(batch), dataset.resize)
    if aligner is not None:
        similarity = aligner.similarity(alignment)
        judged = {"valid": valid, "map_valid": cells_of_picture(similarity, valid), **aligner.limit}
        auc, left_out = alignment_scores(similarity, target, **judged)
        wrong = [wrong_sentence(dataset, index) for index in batch["index"].tolist()]
        wrong_tokens, wrong_mask = (tensor.to(device) for tensor in model.tokenize(wrong))
        wrong_map = aligner.similarity(model.encode(image, wrong_tokens, wrong_mask))
        wrong_auc, _ = alignment_scores(wrong_map, target, **judged)
        scores = {"auc": auc, "auc_wrong_sentence": wrong_auc, "target_left_out": left_out}
        columns |= {
            name: [None if math.isnan(value) else value for value in each.tolist()] for name, each in scores.items()
        }
    return columns


def _counts(
    logits: Tensor, target: Tensor, valid: Tensor | None, full: Sequence[Tensor], resize: str
) -> dict[str, list[int]]:
    """At the input's size over what is photograph there, and at the photograph's own size."""
    names = ("intersection", "union", "target")
    square = resized(logits, target.shape[1:])
    square = square if valid is None else square.masked_fill(~valid, -torch.inf)
    columns = {name: c.tolist() for name, c in zip(names, counts(square, target), strict=True)}
    rows = []
    for logit, full_target in zip(logits, full, strict=True):
        height, width = full_target.shape
        found = at_own_size(logit, height, width, target.shape[1], resize)
        rows.append(torch.cat(counts(found[None], full_target[None].to(logits.device))).tolist())
    return columns | {f"full_{name}": list(c) for name, c in zip(names, zip(*rows, strict=True), strict=True)}


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, h, w] at another size, in the convention of RIS (bilinear, corners aligned)."""
    return F.interpolate(logits[:, None].float(), tuple(size), mode="bilinear", align_corners=True)[:, 0]


def wrong_sentence(dataset: RISDataset, index: int) -> str:
    """A sentence about another photograph, from half the set away: a pure function of the set and the index."""
    expressions = dataset.expressions
    for step in range(len(expressions)):
        other = expressions[(index + len(expressions) // 2 + step) % len(expressions)]
        if other.image_id != expressions[index].image_id:
            return other.sentence
    return ""  # all sentences are about one photograph: compare with no sentence at all
