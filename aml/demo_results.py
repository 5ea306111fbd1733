"""Comparing the strategies of `aml demo`: intervals, and the results in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aml import bootstrap

STRATEGIES = ("none", "random", "easiest", "loss")
CONDITIONS = ("clean", "noise", "blur", "occlusion")
SHOWN = ("mIoU", "oIoU", "P@0.5")
SEED_NOISE = 0.03  # what a change of seed alone can do to the mIoU of so small a model
CAVEAT = "One seed cannot resolve differences below about 1 to 3 points, whatever the intervals over scenes say."


def paired_difference(
    records: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], image_of: dict[str, int]
) -> dict[str, float]:
    """mIoU of `records` minus that of `base`, and its 95 % bootstrap interval over images; paired by sample id."""
    by_id = {record["sample_id"]: record for record in base}
    if by_id.keys() != {record["sample_id"] for record in records}:
        raise ValueError("records, base: expected the same sample ids in both")
    images = [str(image_of[record["sample_id"]]) for record in records]
    paired = [by_id[record["sample_id"]] for record in records]
    sums = np.stack([bootstrap.photograph_sums(each, images, ["mIoU"])[0] for each in (records, paired)])
    ours, theirs = bootstrap.ratios(sums.sum(-1))
    low, high = bootstrap.interval(-np.diff(bootstrap.resampled(sums), axis=1)[:, 0])
    return {"mIoU": float(ours - theirs), "low": low, "high": high}


def table(results: dict[str, Any]) -> str:
    """The results as text for a terminal, in per cent."""
    conditions = [condition_name(results, condition) for condition in CONDITIONS]
    lines = [
        f"{results['sentences']} sentences on {results['images']} unseen scenes; %",
        f"{'':<9}" + "".join(f"{name:^23}" for name in conditions),
        f"{'':<9}" + f"{'mIoU':>7}{'oIoU':>7}{'P@0.5':>7}  " * len(conditions),
    ]
    for strategy, found in results["strategies"].items():
        cells = ("".join(f"{100 * found[c][name]:>7.1f}" for name in SHOWN) + "  " for c in CONDITIONS)
        lines.append(f"{strategy:<9}" + "".join(cells))
    lines += ["", "mIoU minus that of none, in points [95 % interval over the scenes]"]
    for strategy in STRATEGIES[1:]:
        cells = (difference_text(results["strategies"][strategy]["differences"][c]) for c in CONDITIONS)
        lines.append(f"{strategy:<9}" + "".join(f"{cell:^23}" for cell in cells))
    lines += [
        "",
        f"{'':<9}{'pixels kept':>13}{'target left out':>17}{'the same,':>14}{'AUC of':>9}{'with a wrong':>14}",
        f"{'':<9}{'in the loss':>13}{'of the loss':>17}{'unprotected':>14}{'the map':>9}{'sentence':>14}",
    ]
    for strategy, found in results["strategies"].items():
        clean = found["clean"]
        lines.append(
            f"{strategy:<9}{100 * found['kept']:>13.1f}{100 * found['target_left_out_of_loss']:>17.1f}"
            f"{100 * clean['target_left_out']:>14.1f}{clean['auc']:>9.3f}{clean['auc_wrong_sentence']:>14.3f}"
        )
    return "\n".join([*lines, "", *verdict(results)])


def condition_name(results: dict[str, Any], condition: str) -> str:
    return condition if condition == "clean" else f"{condition}, severity {results['settings']['severity']}"


def difference_text(difference: dict[str, float]) -> str:
    d = difference
    return f"{100 * d['mIoU']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def verdict(results: dict[str, Any]) -> list[str]:
    """What came out, gains or not: a headline, then a line for each comparison, then the caveat."""
    strategies = results["strategies"]
    gains = strategies["loss"]["differences"]
    what = "Leaving out the least aligned pixels (loss)"
    clear = {c: _is_resolved(gains[c]) and abs(gains[c]["mIoU"]) >= SEED_NOISE for c in CONDITIONS}
    better = [c for c in CONDITIONS if clear[c] and gains[c]["mIoU"] > 0]
    worse = [c for c in CONDITIONS if clear[c] and gains[c]["mIoU"] < 0]
    if better or worse:
        parts = [f"{word} on {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
        lines = [f"{what} came out {' and '.join(parts)} than the loss over all pixels (none)."]
    elif moved := [c for c in CONDITIONS if _is_resolved(gains[c])]:
        where = ", ".join(f"{100 * gains[c]['mIoU']:+.1f} on {c}" for c in moved)
        lines = [f"{what} differs from the loss over all pixels (none) by less than another seed may: {where}."]
    else:
        lines = [f"{what} made no difference to the loss over all pixels (none) that this test can resolve."]
    for c in CONDITIONS:
        if not _is_resolved(gains[c]):
            meaning = "not distinguishable from zero"
        elif not clear[c]:
            meaning = "holds for other scenes, but another seed may undo it"
        else:
            meaning = "more than a seed usually changes"
        lines.append(f"  {c}: {difference_text(gains[c])} points of mIoU, {meaning}")
    for control in ("random", "easiest"):
        gap = 100 * (strategies["loss"]["clean"]["mIoU"] - strategies[control]["clean"]["mIoU"])
        lines.append(f"  against {control}, a control that leaves out as many pixels: {gap:+.1f} points, clean")
    return [*lines, CAVEAT]


def _is_resolved(difference: dict[str, float]) -> bool:
    return difference["low"] > 0 or difference["high"] < 0
