"""`aml robustness`: one evaluation of the photographs as they are, and one per kind and severity of disturbance.

    <out>/clean.json, noise-1.json, ...      evaluations, each with its records, as `aml eval` writes them
    <out>/results.json                       metrics per condition, and per kind over all five severities
    <out>/robustness.md, robustness.png      tables and curves

Each file appears when it is complete; a second call makes what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aml import stored
from aml.evaluation_tables import percent, published, table
from aml.metrics import metrics
from aml.perturbations import KINDS
from aml.stored import Evaluation

SEVERITIES = (1, 2, 3, 4, 5)
CLEAN = "clean"
SHOWN = ("mIoU", "oIoU")


def conditions() -> Iterator[tuple[str, tuple[str, int] | None]]:
    """(name, what is done to the photographs) of all 36."""
    yield CLEAN, None
    for kind in KINDS:
        for severity in SEVERITIES:
            yield f"{kind}-{severity}", (kind, severity)


def already_done(path: Path, identity: dict[str, Any]) -> Evaluation | None:
    """The evaluation of an earlier call, or None. Raises ValueError where it is of another model or data."""
    if not path.exists():
        return None
    found = stored.load(path)
    if changed := stored.differences(found, identity):
        lines = [f"  {line}" for line in changed.values()]
        raise ValueError("\n".join([f"{path} is of another model or data; give another --out", *lines]))
    return found


def summary(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """evaluations: one per condition. Returns what they are of, metrics per condition, and per kind those over the
    sentences of all its severities together."""
    first = evaluations[CLEAN]
    kinds = {}
    for kind in KINDS:
        records = [
            {**record, "sample_id": f"{record['sample_id']} {severity}"}
            for severity in SEVERITIES
            for record in evaluations[f"{kind}-{severity}"]["records"]
        ]
        kinds[kind] = metrics(records, [record["sample_id"] for record in records])
    of = {name: first[name] for name in ("checkpoint", "weights", "dataset", "split", "image_size", "resize")}
    return {**of, "conditions": {name: each["metrics"] for name, each in evaluations.items()}, "kinds": kinds}


def markdown(results: dict[str, Any]) -> str:
    clean = results["conditions"][CLEAN]
    parts = [
        f"# Robustness: {results['dataset']} {results['split']}",
        f"Checkpoint: `{results['checkpoint']}`. {clean['sentences']} sentences per condition, scored at input size "
        f"({results['image_size']} x {results['image_size']}, {results['resize']}); per cent. 1 to 5: severity; "
        "all: the sentences of all severities together, and what they lack to the photographs as they are.",
    ]
    for metric in SHOWN:
        rows = [[CLEAN, *[""] * len(SEVERITIES), percent(clean, metric), ""]]
        for kind in KINDS:
            cells = [percent(results["conditions"][f"{kind}-{severity}"], metric) for severity in SEVERITIES]
            pooled = results["kinds"][kind]
            lost = f"{100 * (pooled[metric] - clean[metric]):+.2f}"
            rows.append([kind, *cells, percent(pooled, metric), lost])
        parts.append(f"## {metric}\n\n{table(['', *map(str, SEVERITIES), 'all', 'lost'], rows)}")
    theirs = [row for kind in KINDS for row in published(results["dataset"], results["split"], kind)]
    if theirs:
        rows = [[row["perturb"], row["method"], row["mIoU"], row["note"], row["source"]] for row in theirs]
        parts.append(f"## Published\n\n{table(['kind', 'method', 'mIoU', 'note', 'source'], rows)}")
    return "\n\n".join(parts) + "\n"


def draw(path: Path, results: dict[str, Any], metrics: Sequence[str] = SHOWN) -> None:
    """A panel per kind: metrics against severity, 0 being the photographs as they are."""
    import matplotlib
    from matplotlib.figure import Figure

    from aml.figures import COLOURS, MARKERS, STYLE, save_png

    looks = list(zip(metrics, (COLOURS["loss"], COLOURS["easiest"]), (MARKERS["none"], MARKERS["random"]), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure((13, 5.6), dpi=100, layout="constrained")
        figure.suptitle(f"{results['dataset']} {results['split']}", fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(2, 4, sharex=True, sharey=True).flatten()
        for axis, kind in zip(axes, KINDS, strict=False):
            names = [CLEAN, *(f"{kind}-{severity}" for severity in SEVERITIES)]
            for metric, colour, marker in looks:
                values = [100 * results["conditions"][name][metric] for name in names]
                axis.plot(range(6), values, color=colour, marker=marker, markersize=5, label=metric)
                axis.axhline(values[0], color=colour, linewidth=0.8, linestyle=":")
            axis.set(title=kind.replace("_", " "), xticks=range(6), ylim=(0, None))
        axes[-1].axis("off")
        axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center left")
        figure.supxlabel("severity", fontsize=10)
        figure.supylabel("%", fontsize=10)
        save_png(figure, path)
