"""Evaluations as tables in Markdown, beside published numbers. Needs no torch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aml.data.published import PUBLISHED as PUBLISHED_COUNTS
from aml.metrics import GENERALIZED, PRECISION_AT
from aml.stored import Evaluation

PUBLISHED = Path(__file__).with_name("published_results.csv")
COLUMNS = ("mIoU", "oIoU", *(f"P@{limit}" for limit in PRECISION_AT), *GENERALIZED)
NOTE = (
    "Published numbers are of the model's square input (448 x 448, squashed) and of single-data-set training, unless "
    "said otherwise. Two runs of one method differ by about 0.5 points on RefCOCO (as the authors of LAVT say)."
)


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The splits of one data set: all metrics at both resolutions, then each split beside what is published of it."""
    first = evaluations[0]
    size = first["image_size"]
    disturbed = f"\n\nDisturbed: {':'.join(map(str, first['perturb']))}" if first["perturb"] else ""
    parts = [f"# {first['dataset']}\n\nCheckpoint: `{first['checkpoint']}`. All numbers in per cent.{disturbed}"]
    for prefix, where in (("", f"At input size ({size} x {size}, {first['resize']})"), ("full_", "At own size")):
        names = [name for name in COLUMNS if f"{prefix}{name}" in first["metrics"]]
        rows = [
            [each["split"], str(each["metrics"]["sentences"]), *(percent(each["metrics"], prefix + n) for n in names)]
            for each in evaluations
        ]
        parts.append(f"## {where}\n\n{table(['split', 'sentences', *names], rows)}")
    beside = [_beside(each) for each in evaluations]
    if any(beside):
        parts.append(f"## Beside published numbers\n\n{NOTE}")
    return "\n\n".join([*parts, *filter(None, beside)]) + "\n"


def _beside(evaluation: Evaluation) -> str:
    rows = published(evaluation["dataset"], evaluation["split"])
    if not rows or evaluation["perturb"]:
        return ""
    names = ("mIoU", "oIoU", "P@0.5")
    metrics, size = evaluation["metrics"], evaluation["image_size"]
    own = [
        [f"this checkpoint, {size} x {size}", *(percent(metrics, name) for name in names), "", ""],
        ["this checkpoint, at own size", *(percent(metrics, f"full_{name}") for name in names), "", ""],
    ]
    theirs = [[row["method"], *(row[name] for name in names), row["note"], row["source"]] for row in rows]
    here = metrics["sentences"]
    there = PUBLISHED_COUNTS[rows[0]["dataset"], rows[0]["split_by"]][evaluation["split"]].sentences
    warning = "" if here == there else f"**Not comparable**: {here} sentences here, {there} there.\n\n"
    return f"### {evaluation['split']}\n\n{warning}{table(['', *names, 'note', 'source'], [*own, *theirs])}"


def published(dataset: str, split: str, perturb: str = "") -> list[dict[str, str]]:
    """Rows of published_results.csv of a data set, as "refcoco(unc)", and split. perturb: a kind, or "" for none."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = (dataset, split, perturb)
    return [row for row in rows if (f"{row['dataset']}({row['split_by']})", row["split"], row["perturb"]) == wanted]


def percent(metrics: dict[str, Any], name: str) -> str:
    value = metrics.get(name)
    return "" if value is None else f"{100 * value:.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right."""
    numbers = [all(_is_number(row[i]) for row in rows) for i in range(len(heads))]
    rule = ["---" if i == 0 or not numbers[i] else "--:" for i in range(len(heads))]
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [heads, rule, *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def _is_number(text: str) -> bool:
    return text == "" or text[:1] in "+-0123456789"
