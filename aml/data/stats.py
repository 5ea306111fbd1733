"""What a data set is like: lengths of sentences, sizes and places of targets, as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from aml.data.union import Annotations

MASKS = 2000  # of each split so many masks are decoded, evenly spaced: enough for a distribution
GRID = 48  # side of the map of where targets are


@dataclass
class SplitStats:
    """Of one split. Everything but `area` and `place` is of all of it."""

    refs: int
    images: int
    words: np.ndarray  # of each sentence
    sentences: np.ndarray  # of each ref
    targets: np.ndarray  # of each ref
    refs_per_image: np.ndarray
    categories: Counter[str]
    area: np.ndarray = field(default_factory=lambda: np.zeros(0))  # share of the photograph, of refs with a target
    place: np.ndarray = field(default_factory=lambda: np.zeros((GRID, GRID)))  # how often a target covers this cell


def collect(data: Annotations, masks: int = MASKS) -> dict[str, SplitStats]:
    """The statistics of every split."""
    return {split: _split_stats(data, split, masks) for split in data.splits()}


def _split_stats(data: Annotations, split: str, masks: int) -> SplitStats:
    groups = [list(group) for _, group in groupby(data.expressions(split), key=lambda e: e.ref_key)]
    first = [group[0] for group in groups]
    stats = SplitStats(
        refs=len(groups),
        images=len({e.image_path for e in first}),
        words=np.array([len(e.sentence.split()) for group in groups for e in group]),
        sentences=np.array([len(group) for group in groups]),
        targets=np.array([len(e.annotation_ids) for e in first]),
        refs_per_image=np.array(list(Counter(e.image_path for e in first).values())),
        categories=Counter(e.category or "(no target)" for e in first),
    )
    with_target = [e for e in first if e.annotation_ids]
    every = max(1, len(with_target) / masks)
    chosen = [with_target[int(i * every)] for i in range(min(masks, len(with_target)))]
    areas = []
    for expression in chosen:
        mask = data.mask(expression)
        areas.append(mask.mean())
        rows, columns = ((np.arange(GRID) * 2 + 1) * side // (2 * GRID) for side in mask.shape)
        stats.place += mask[np.ix_(rows, columns)] / len(chosen)
    stats.area = np.array(areas)
    return stats


def table(stats: dict[str, SplitStats]) -> str:
    """One row a split."""
    heads = "split refs sentences images words:median,p95,max per_ref area%:median,p5,p95 several none".split()
    rows = [[head.replace("_", " ") for head in heads]]
    for split, s in stats.items():
        rows.append(
            [
                split,
                str(s.refs),
                str(len(s.words)),
                str(s.images),
                f"{np.median(s.words):.0f}, {np.percentile(s.words, 95):.0f}, {s.words.max()}",
                f"{s.sentences.mean():.2f}",
                ", ".join(f"{100 * np.percentile(s.area, q):.1f}" for q in (50, 5, 95)) if len(s.area) else "-",
                str((s.targets > 1).sum()),
                str((s.targets == 0).sum()),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum((s.categories for s in stats.values()), Counter[str]())
    common = ", ".join(f"{name} {100 * count / total.total():.0f} %" for name, count in total.most_common(8))
    return "\n".join([*lines, f"most frequent targets: {common}"])


def draw(stats: dict[str, SplitStats], path: Path, title: str) -> None:
    """Write the distributions as one PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    from aml.figures import STYLE, save_png

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure((13, 7.5), dpi=100, layout="constrained")
        figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(2, 3)
        _histogram(axes[0, 0], {k: s.words for k, s in stats.items()}, "Words per sentence", at_most=30)
        _histogram(axes[0, 1], {k: s.sentences for k, s in stats.items()}, "Sentences per object", at_most=8)
        _histogram(axes[1, 0], {k: s.refs_per_image for k, s in stats.items()}, "Objects per photograph", at_most=10)
        _areas(axes[0, 2], stats)
        _categories(axes[1, 1], stats)
        _places(axes[1, 2], stats)
        save_png(figure, path)


def _histogram(axis: Any, values: dict[str, np.ndarray], title: str, at_most: int) -> None:
    """Shares of whole numbers; what is above `at_most` counts there."""
    largest = min(at_most, max(int(v.max()) for v in values.values()))
    edges = np.arange(-0.5, largest + 1)
    for split, numbers in values.items():
        weights = np.full(len(numbers), 1 / len(numbers))
        axis.hist(numbers.clip(0, largest), edges, weights=weights, histtype="step", linewidth=1.6, label=split)
    axis.set(title=title, ylabel="share", xlim=(edges[0], edges[-1]))
    if any(v.max() > largest for v in values.values()):
        axis.set_xlabel(f"the last bar holds {largest} and more")
    axis.legend()


def _areas(axis: Any, stats: dict[str, SplitStats]) -> None:
    edges = np.geomspace(1e-4, 1, 31)
    for split, s in stats.items():
        if len(s.area):
            share = np.full(len(s.area), 1 / len(s.area))
            axis.hist(s.area.clip(1e-4, 1), edges, weights=share, histtype="step", linewidth=1.6, label=split)
    axis.set(title="Target's share of the photograph", xscale="log", xlabel="share of the pixels", ylabel="share")


def _categories(axis: Any, stats: dict[str, SplitStats]) -> None:
    total = sum((s.categories for s in stats.values()), Counter[str]())
    names = [name for name, _ in total.most_common(12)][::-1]
    axis.barh(names, [100 * total[name] / total.total() for name in names], color="#009e73")
    axis.set(title="What is referred to", xlabel="% of all objects")
    axis.grid(axis="y", visible=False)


def _places(axis: Any, stats: dict[str, SplitStats]) -> None:
    sampled = sum(len(s.area) for s in stats.values())
    place = sum((s.place * len(s.area) for s in stats.values()), np.zeros((GRID, GRID))) / max(sampled, 1)
    shown = axis.imshow(100 * place, cmap="viridis", vmin=0)
    axis.set(title="Where targets are", xticks=[], yticks=[], xlabel=f"% of {sampled} targets that cover the place")
    axis.figure.colorbar(shown, ax=axis, shrink=0.8)
