"""From one record per sentence to metrics: pure, so the same for one process, for many, and for a stored file.

Every metric is a sum over sentences divided by another one (`terms`). Nothing is a mean of means.

mIoU, P@X    sentences with a target: their mean intersection / union; the share of them with IoU >= X
oIoU         all intersections / all unions; what is predicted for a sentence without a target adds to the unions
area_ratio   predicted / true area, in sum
gIoU         as mIoU, over all sentences: one without a target has 1 if nothing is predicted, else 0
N-acc        of the sentences without a target, the share for which nothing is predicted
T-acc        of the sentences with one, the share for which something is predicted

The last three, and leaving sentences without a target out of P@X, are those of gRefCOCO (Liu et al., "GRES", CVPR
2023). They are given where there is such a sentence; elsewhere gIoU is mIoU. A single predicted pixel counts as one.

Nothing predicted and nothing to be found: for a sentence without a target that is right, in gIoU and N-acc. Where a
sentence has a target, which was lost in resizing or is annotated without area, it is an `empty_union`, and counts as
IoU 0 in mIoU, P@X and gIoU, so that it can only lower them. (The released CARIS program divides 0 by 0 there.)
A metric that no sentence counts for is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED = ("gIoU", "N-acc", "T-acc")
MAP_SCORES = ("auc", "auc_wrong_sentence", "target_left_out")

Record = Mapping[str, Any]


def metrics(records: Sequence[Record], expected_ids: Collection[str]) -> dict[str, float | int]:
    """Metrics of a complete set of records (see `aml.evaluation.evaluate`), as shares in [0, 1].

    Those at the top of this file, at the model's square input, at which most papers score; with the prefix `full_` at
    the photographs' own sizes. `sentences`, `empty_unions`: how many there are; `no_target`: of them without a target.
    `auc`, `auc_wrong_sentence`, `target_left_out`: means over the sentences for which they are defined.
    The order of the records plays no part.

    Raises ValueError where `records` and `expected_ids` are not the same set, naming the first few missing, repeated or
    unknown ids.
    """
    _check_ids([record["sample_id"] for record in records], expected_ids)
    result: dict[str, float | int] = {"sentences": len(records)}
    without_target = sum(bool(record.get("no_target")) for record in records)
    if without_target:
        result["no_target"] = without_target
    for prefix in ("", "full_"):
        every = [terms(record, prefix) for record in records]
        for name in every[0]:
            if without_target or name not in GENERALIZED:
                above, below = (math.fsum(each[name][place] for each in every) for place in range(2))
                result[f"{prefix}{name}"] = above / below if below else 0.0
        empty = [r for r in records if not r[f"{prefix}union"] and not r.get("no_target")]
        result[f"{prefix}empty_unions"] = len(empty)
    for name in MAP_SCORES:
        if name in records[0]:
            defined = [record[name] for record in records if record[name] is not None and not math.isnan(record[name])]
            result[name] = math.fsum(defined) / len(defined) if defined else math.nan
    return result


def terms(record: Record, prefix: str = "") -> dict[str, tuple[float, float]]:
    """What one sentence adds to the numerator and to the denominator of each metric."""
    intersection, union, target = (record[f"{prefix}{name}"] for name in ("intersection", "union", "target"))
    predicted = union + intersection - target
    overlap = intersection / union if union else 0.0
    has_target = not record.get("no_target")
    found = {
        "mIoU": (overlap * has_target, has_target),
        "oIoU": (intersection, union),
        **{f"P@{limit}": ((overlap >= limit) * has_target, has_target) for limit in PRECISION_AT},
        "area_ratio": (predicted, target),
        "gIoU": (overlap if has_target else predicted == 0, 1),
        "N-acc": (not has_target and predicted == 0, not has_target),
        "T-acc": (has_target and predicted > 0, has_target),
    }
    return {name: (float(above), float(below)) for name, (above, below) in found.items()}


def iou(record: Record, prefix: str = "") -> float:
    """Of one sentence; 0 for an empty union."""
    union = record[f"{prefix}union"]
    return record[f"{prefix}intersection"] / union if union else 0.0


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
