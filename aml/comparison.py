"""`aml compare`: evaluations of several runs, grouped by setting, with intervals. Needs no torch.

Runs with one configuration but for the seed are one setting. The first setting given is the one that the others are
compared with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aml import bootstrap, stored
from aml.data.layout import some
from aml.evaluation_tables import table

METRICS = ("mIoU", "oIoU", "P@0.5")
# Settings of which no result depends.
_NEUTRAL = {
    "train.seed", "train.out", "data.root", "data.images", "train.workers", "train.log_every", "train.save_every",
    "train.keep", "train.tensorboard",
}  # fmt: skip
ONE_RUN = (
    "One run on either side: the interval is about other photographs, and says nothing about another seed. Runs that "
    "differ in nothing but the seed differ by about 0.5 points on RefCOCO (as the authors of LAVT say), by more on "
    "small data: a gain of 0.5 is within the noise of one run."
)


@dataclass
class Run:
    name: str
    evaluation: stored.Evaluation
    settings: dict[str, Any]
    seed: int


@dataclass
class Setting:
    """Runs that differ in their seed alone. values: per metric, one number per run."""

    label: str
    runs: list[Run]
    values: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Difference:
    """Of a metric's mean over runs, to that of the first setting. low, high: 95 % interval over photographs; with
    `seeds` also over seeds."""

    metric: str
    setting: str
    value: float
    low: float
    high: float
    seeds: tuple[float, float] | None

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval that counts: over photographs and seeds where there are several, else over photographs."""
        return self.seeds or (self.low, self.high)

    @property
    def holds_zero(self) -> bool:
        return self.bounds[0] <= 0 <= self.bounds[1]


@dataclass
class Comparison:
    settings: list[Setting]
    differences: list[Difference]
    prefixes: list[str]
    notes: list[str]


def read_run(path: str, split: str) -> Run:
    """An evaluation by its file, or by the run directory or checkpoint that it is of."""
    evaluation = stored.read(Path(path), split)
    flat = {f"{part}.{name}": value for part, each in evaluation["config"].items() for name, value in each.items()}
    settings = {name: value for name, value in flat.items() if name not in _NEUTRAL}
    return Run(path, evaluation, settings, flat["train.seed"])


def compare(runs: Sequence[Run]) -> Comparison:
    """Raises ValueError for fewer than two runs, for the same run twice, and for runs that were evaluated on different
    sentences or masks, naming them."""
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run: expected two or more to compare")
    for run in runs[1:]:
        _require_same_sentences(runs[0], run)
    settings = _grouped(runs)
    ids = sorted(record["sample_id"] for record in runs[0].evaluation["records"])
    photographs = {record["sample_id"]: record["image"] for record in runs[0].evaluation["records"]}
    notes = [
        f"{len(ids)} sentences about {len(set(photographs.values()))} photographs, the same for all runs. "
        "±: standard deviation over seeds. Intervals: 95 %, paired by sentence; whole photographs are drawn, as the "
        "sentences of one are not independent."
    ]
    sizes = sorted({f"{r.evaluation['image_size']} ({r.evaluation['resize']})" for r in runs})
    prefixes = ["", "full_"] if len(sizes) == 1 else ["full_"]
    if len(sizes) > 1:
        notes.append(f"The runs' inputs differ ({', '.join(sizes)}): scored at the photographs' own sizes only.")
    generalized = any(record["no_target"] for record in runs[0].evaluation["records"])
    metrics = [*METRICS, "gIoU"] if generalized else list(METRICS)
    differences: list[Difference] = []
    for prefix in prefixes:
        sums = np.stack([_sums(run, ids, photographs, metrics, prefix) for s in settings for run in s.runs])
        values, draws = bootstrap.ratios(sums.sum(-1)), bootstrap.resampled(sums)
        places = _places(settings)
        for i, metric in enumerate(metrics):
            for setting, place in zip(settings, places, strict=True):
                setting.values[prefix + metric] = values[place, i].tolist()
            differences += [
                _difference(prefix + metric, settings[0], setting, draws[:, places[0], i], draws[:, place, i])
                for setting, place in zip(settings[1:], places[1:], strict=True)
            ]
    return Comparison(settings, differences, prefixes, notes)


def _require_same_sentences(first: Run, other: Run) -> None:
    ours, theirs = ({record["sample_id"]: record for record in run.evaluation["records"]} for run in (first, other))
    both = sorted(ours.keys() & theirs.keys())
    problems = {
        f"only in {first.name}": sorted(ours.keys() - theirs.keys()),
        f"only in {other.name}": sorted(theirs.keys() - ours.keys()),
        "with another text": [name for name in both if ours[name]["sentence"] != theirs[name]["sentence"]],
        # As copies of a data set have that were made from other years' annotations.
        "with a mask of another size": [n for n in both if ours[n]["full_target"] != theirs[n]["full_target"]],
    }
    lines = [f"  {len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
    disturbed = [run.evaluation["perturb"] for run in (first, other)]
    if disturbed[0] != disturbed[1]:
        lines.append(f"  disturbed: {disturbed[0]} and {disturbed[1]}")
    if lines:
        what = [f"{run.name} ({run.evaluation['dataset']} {run.evaluation['split']})" for run in (first, other)]
        raise ValueError("\n".join([f"{what[0]} and {what[1]} were evaluated on different sentences:", *lines]))


def _grouped(runs: Sequence[Run]) -> list[Setting]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = groups.setdefault(json.dumps(run.settings, sort_keys=True), [])
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin:
            raise ValueError(f"{twin.name} and {run.name} have the same settings and seed {run.seed}: give one of them")
        same.append(run)
    found = [Setting("", sorted(each, key=lambda run: run.seed)) for each in groups.values()]
    names = [
        name
        for name in sorted(set[str]().union(*(each.runs[0].settings for each in found)))
        if len({json.dumps(each.runs[0].settings.get(name)) for each in found}) > 1
    ]
    for each in found:
        own = each.runs[0].settings
        each.label = ", ".join(f"{name}={own.get(name)}" for name in names) or "all"
    return found


def _places(settings: Sequence[Setting]) -> list[slice]:
    ends = np.cumsum([0, *(len(setting.runs) for setting in settings)]).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def _sums(run: Run, ids: list[str], photographs: dict[str, str], metrics: Sequence[str], prefix: str) -> np.ndarray:
    by_id = {record["sample_id"]: record for record in run.evaluation["records"]}
    records = [by_id[name] for name in ids]
    return bootstrap.photograph_sums(records, [photographs[name] for name in ids], metrics, prefix)


def _difference(name: str, base: Setting, setting: Setting, base_draws: np.ndarray, draws: np.ndarray) -> Difference:
    """base_draws, draws: [RESAMPLES, runs] of the two settings, for the same draws of photographs."""
    ours, theirs = setting.values[name], base.values[name]
    gains = draws.mean(1) - base_draws.mean(1)
    paired = [run.seed for run in setting.runs] == [run.seed for run in base.runs]
    error = bootstrap.seed_error(ours, theirs, paired)
    seeds = None if error is None else bootstrap.interval(bootstrap.with_seeds(gains, *error))
    value = math.fsum(ours) / len(ours) - math.fsum(theirs) / len(theirs)
    return Difference(name, setting.label, value, *bootstrap.interval(gains), seeds)


# ------------------------------------------------------------------------------------------------------ in words


def markdown(comparison: Comparison) -> str:
    """Values per setting, differences to the first one, and what they mean."""
    settings = comparison.settings
    first = settings[0].runs[0].evaluation
    disturbed = f", {':'.join(map(str, first['perturb']))}" if first["perturb"] else ""
    parts = [f"# {first['dataset']} {first['split']}{disturbed}", *comparison.notes]
    for prefix in comparison.prefixes:
        names = [name for name in settings[0].values if name.startswith("full_") == bool(prefix)]
        heads = ["setting", "seeds", *(name.removeprefix("full_") for name in names)]
        rows = [
            [each.label, ", ".join(str(run.seed) for run in each.runs), *(_mean_and_std(each.values[n]) for n in names)]
            for each in settings
        ]
        parts.append(f"## {'At own size' if prefix else 'At input size'}\n\n{table(heads, rows)}")
        own = [each for each in comparison.differences if each.metric in names]
        if own:
            heads = ["minus " + settings[0].label, "metric", "points", "other photographs", "and other seeds", ""]
            parts.append(table(heads, [_row(each) for each in own]))
    if len(settings) == 1:
        parts.append("All runs have one setting: there is nothing to compare it with.")
    elif any(each.seeds is None for each in comparison.differences):
        parts.append(ONE_RUN)
    return "\n\n".join(parts) + "\n"


def _mean_and_std(values: Sequence[float]) -> str:
    mean = f"{100 * math.fsum(values) / len(values):.2f}"
    return f"{mean} ± {100 * float(np.std(values, ddof=1)):.2f}" if len(values) > 1 else mean


def _row(each: Difference) -> list[str]:
    bounds = f"[{100 * each.low:+.2f}, {100 * each.high:+.2f}]"
    seeds = "" if each.seeds is None else f"[{100 * each.seeds[0]:+.2f}, {100 * each.seeds[1]:+.2f}]"
    return [
        each.setting, each.metric.removeprefix("full_"), f"{100 * each.value:+.2f}", bounds, seeds, meaning(each),
    ]  # fmt: skip


def meaning(each: Difference) -> str:
    if each.holds_zero:
        return "the interval holds zero: no difference shown"
    direction = "higher" if each.value > 0 else "lower"
    return direction if each.seeds else f"{direction} on other photographs too; another seed was not tried"


def draw(comparison: Comparison, path: Path) -> None:
    """The differences with their intervals as one PNG; the thin line is over photographs and seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    from aml.figures import COLOURS, STYLE, save_png

    own_size = bool(comparison.prefixes[0])
    differences = [each for each in comparison.differences if each.metric.startswith("full_") == own_size]
    if not differences:
        raise ValueError("all runs have one setting: there is no difference to draw; leave --plot out")
    names = list(dict.fromkeys(each.metric for each in differences))
    labels = [setting.label for setting in comparison.settings[1:]][::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure((4 * len(names) + 1, 0.5 * len(labels) + 1.4), dpi=100, layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axis, name in zip(axes, names, strict=True):
            axis.axvline(0, color=COLOURS["none"], linewidth=1.2)
            for each in (each for each in differences if each.metric == name):
                place = labels.index(each.setting)
                axis.plot([100 * bound for bound in each.bounds], [place] * 2, color=COLOURS["loss"], linewidth=1.2)
                axis.plot([100 * each.low, 100 * each.high], [place] * 2, color=COLOURS["loss"], linewidth=4)
                axis.plot(100 * each.value, place, "o", color=COLOURS["loss"], markersize=8)
            axis.set(title=name.removeprefix("full_"), ylim=(-0.6, len(labels) - 0.4))
            axis.set_yticks(range(len(labels)), labels)
            axis.grid(axis="y", visible=False)
        figure.supxlabel(f"points minus {comparison.settings[0].label}; 95 % intervals", fontsize=10)
        save_png(figure, path)
