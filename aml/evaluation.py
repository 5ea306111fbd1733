"""Evaluation by sample id: one record per sentence with integer counts, and one pure function from records to metrics.

Means of batch means, padded shards and means over ranks are wrong in ways that nobody sees; records are not. Ranks
evaluate disjoint `indices`, the records are put together, and `metrics` refuses a set that is not complete.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aml.alignment import AlignmentLoss
from aml.alignment_scores import alignment_scores
from aml.data.dataset import RISDataset
from aml.data.loading import loader
from aml.data.pixels import at_own_size, valid_cells
from aml.models.base import RISModel
from aml.perturbations import perturb as perturb_image

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)


@torch.no_grad()
def evaluate(
    model: RISModel,
    dataset: RISDataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    perturb: tuple[str, int] | None = None,
    aligner: AlignmentLoss | None = None,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Predict every sentence of an evaluation set once, and count.

    dataset: built with `train=False`. indices: the part of it to evaluate, e.g. `range(rank, len(dataset), world)`.
    perturb: (kind, severity) of `aml.perturbations`, drawn per photograph, so the same for all models and sentences.
    aligner: also judge its similarity map.

    Returns one record per sentence: `sample_id`; `intersection`, `union`, `target` in pixels of the model's square
    input; `full_intersection`, `full_union`, `full_target` at the photograph's own size. With `aligner` also `auc` and
    `target_left_out` of the map (see `alignment_scores`) and `auc_wrong_sentence`, the AUC against the same target with
    the words of a sentence about another photograph: what remains then is objectness and not reference.

    The model is left in the mode (train or eval) it was in. No collectives: ranks may evaluate unequal parts.
    """
    if dataset.train:
        raise ValueError("dataset: built with train=True; evaluation needs RISDataset(..., train=False)")
    was_training = model.training
    model.eval()
    chosen = range(len(dataset)) if indices is None else list(indices)
    batches = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    records: list[dict[str, Any]] = []
    read = loader(dataset, batches, workers, device)
    for batch in tqdm(read, desc="evaluate", unit="batch", disable=None if progress else True, leave=False):
        image = batch["image"]
        if perturb is not None:
            expressions = [dataset.expressions[index] for index in batch["index"].tolist()]
            image = _perturbed(image, model, perturb, [expression.image_id for expression in expressions])
        image, tokens, text_mask, target = (
            tensor.to(device, non_blocking=True)
            for tensor in (image, batch["tokens"], batch["text_mask"], batch["target"])
        )
        valid = batch["valid"].to(device) if "valid" in batch else None
        logits, alignment = model(image, tokens, text_mask, return_alignment=True)
        columns: dict[str, list] = {"sample_id": batch["sample_id"]}
        columns |= _counts(logits, target, valid, batch["full_target"], dataset.resize)
        if aligner is not None:
            similarity = aligner.similarity(alignment)
            cells = None if valid is None else valid_cells(valid, (similarity.shape[1], similarity.shape[2]))
            judged = {"valid": valid, "map_valid": cells, **aligner.limit}
            auc, left_out = alignment_scores(similarity, target, **judged)
            wrong = [wrong_sentence(dataset, index) for index in batch["index"].tolist()]
            wrong_tokens, wrong_mask = (tensor.to(device) for tensor in model.tokenize(wrong))
            wrong_map = aligner.similarity(model.encode(image, wrong_tokens, wrong_mask))
            wrong_auc, _ = alignment_scores(wrong_map, target, **judged)
            columns |= {
                "auc": auc.tolist(),
                "auc_wrong_sentence": wrong_auc.tolist(),
                "target_left_out": left_out.tolist(),
            }
        records += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    model.train(was_training)
    return records


def metrics(records: Sequence[dict[str, Any]], expected_ids: Collection[str]) -> dict[str, float | int]:
    """Metrics of a complete set of records, as shares in [0, 1]. Pure: the order of the records plays no part.

    mIoU: mean over sentences of intersection / union. oIoU: sum of intersections / sum of unions. P@X: share of
    sentences with IoU >= X. `area_ratio`: predicted / true area, in sum. The same with the prefix `full_` at the
    photographs' own sizes (masks scored at the model's square input are what most papers report).
    `auc`, `auc_wrong_sentence`, `target_left_out`: means over the sentences for which they are defined.
    `sentences`: how many there are. `empty_unions`, `full_empty_unions`: sentences with neither a target nor a
    predicted pixel. They count as IoU 0 in mIoU and P@X, so they can only lower them: a sentence of these data sets
    always has a referent, which was lost in resizing.

    Raises ValueError where `records` and `expected_ids` are not the same set, naming the first few missing, repeated or
    unknown ids.
    """
    _check_ids([record["sample_id"] for record in records], expected_ids)
    result: dict[str, float | int] = {"sentences": len(records)}
    for prefix in ("", "full_"):
        intersections = [record[f"{prefix}intersection"] for record in records]
        unions = [record[f"{prefix}union"] for record in records]
        targets = [record[f"{prefix}target"] for record in records]
        ious = [i / u if u else 0.0 for i, u in zip(intersections, unions, strict=True)]
        predicted = sum(unions) + sum(intersections) - sum(targets)
        result[f"{prefix}mIoU"] = math.fsum(ious) / len(ious)
        result[f"{prefix}oIoU"] = sum(intersections) / max(sum(unions), 1)
        for limit in PRECISION_AT:
            result[f"{prefix}P@{limit}"] = sum(iou >= limit for iou in ious) / len(ious)
        result[f"{prefix}area_ratio"] = predicted / max(sum(targets), 1)
        result[f"{prefix}empty_unions"] = unions.count(0)
    for name in ("auc", "auc_wrong_sentence", "target_left_out"):
        if name in records[0]:
            defined = [record[name] for record in records if not math.isnan(record[name])]
            result[name] = math.fsum(defined) / len(defined) if defined else math.nan
    return result


def counts(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of intersection, union and target per sample, int64 [B], of two masks [B, H, W]."""
    prediction, target = prediction > 0, target > 0
    pixels = (1, 2)
    return (prediction & target).sum(pixels), (prediction | target).sum(pixels), target.sum(pixels)


def _counts(
    logits: Tensor, target: Tensor, valid: Tensor | None, full_targets: Sequence[Tensor], resize: str
) -> dict[str, list[int]]:
    """At the input's size over what is photograph there, and at the photograph's own size."""
    names = ("intersection", "union", "target")
    square = resized(logits, target.shape[1:])
    square = square if valid is None else square.masked_fill(~valid, -torch.inf)
    columns = {name: c.tolist() for name, c in zip(names, counts(square, target), strict=True)}
    full = []
    for logit, full_target in zip(logits, full_targets, strict=True):
        height, width = full_target.shape
        found = at_own_size(logit, height, width, target.shape[1], resize)
        full.append(torch.cat(counts(found[None], full_target[None].to(logits.device))).tolist())
    return columns | {f"full_{name}": list(c) for name, c in zip(names, zip(*full, strict=True), strict=True)}


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, h, w] at another size, in the convention of RIS (bilinear, corners aligned)."""
    return F.interpolate(logits[:, None].float(), tuple(size), mode="bilinear", align_corners=True)[:, 0]


def _perturbed(image: Tensor, model: RISModel, perturb: tuple[str, int], image_ids: Sequence[int]) -> Tensor:
    mean = torch.tensor(model.image_mean).view(3, 1, 1)
    std = torch.tensor(model.image_std).view(3, 1, 1)
    kind, severity = perturb
    changed = []
    for one, image_id in zip(image, image_ids, strict=True):
        seed = zlib.crc32(str(image_id).encode())
        changed.append((perturb_image((one * std + mean).clamp(0, 1), kind, severity, seed) - mean) / std)
    return torch.stack(changed)


def wrong_sentence(dataset: RISDataset, index: int) -> str:
    """A sentence about another photograph, from half the set away: a pure function of the set and the index."""
    expressions = dataset.expressions
    for step in range(len(expressions)):
        other = expressions[(index + len(expressions) // 2 + step) % len(expressions)]
        if other.image_id != expressions[index].image_id:
            return other.sentence
    return ""  # all sentences are about one photograph: compare with no sentence at all


def _check_ids(ids: Sequence[str], expected_ids: Collection[str]) -> None:
    given, expected = Counter(ids), set(expected_ids)
    problems = {
        "missing": sorted(expected - given.keys()),
        "repeated": sorted(name for name, count in given.items() if count > 1),
        "unknown": sorted(given.keys() - expected),
    }
    if not expected or any(problems.values()):
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"records: expected each of {len(expected)} sample ids exactly once, got {found or 'nothing'}; "
            f"a partly evaluated set has no metrics"
        )
