"""`aml eval`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from aml.commands.options import FEWER_AT_ONCE, add_checkpoint, perturbation

ABOUT = "Evaluate a checkpoint: mIoU, oIoU, P@X, at input and original size."
TAKES_SETTINGS = True
MEMORY_REMEDY = FEWER_AT_ONCE
EPILOG = """\
Writes one JSON and one CSV file per split, with a record per sentence, and a table beside published numbers.

  aml eval --checkpoint runs/first --split val,testA
  torchrun --nproc-per-node 4 -m aml eval --checkpoint runs/first --split all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml eval --checkpoint DIR [--data DIR] [--split SPLIT[,SPLIT ...]] [section.name=value ...]"
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument("--data", metavar="DIR", help="folder of the data; default: that of the training")
    parser.add_argument("--split", default="val", help="one, several as val,testA, or all but train; default: val")
    parser.add_argument(
        "--perturb",
        metavar="KIND:SEVERITY",
        type=perturbation,
        help="disturb the photographs first, as noise:3; aml robustness does it in all kinds and severities",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results, or for one split FILE.json; default: evaluations/ in the run or converted folder",
    )


def run(options: argparse.Namespace) -> int:
    from aml import ranks, stored
    from aml.evaluation_tables import markdown
    from aml.files import require_writable, write_whole
    from aml.trained import chosen_splits, open_trained

    with ranks.joined() as team:
        subject = open_trained(options.checkpoint, options.data, options.settings, team.device)
        splits = chosen_splits(options.split, subject.annotations)
        datasets = [subject.dataset(split).disturbed(options.perturb) for split in splits]
        out, name = Path(options.out) if options.out else stored.folder_of(subject.folder), None
        if out.suffix == ".json":
            if len(splits) > 1:
                raise ValueError(f"--out {out}: a file is for one split; for {len(splits)} of them give a folder")
            out, name = out.parent, out.stem
        if team.is_main:
            require_writable(out)
            for dataset in datasets:
                own = name or stored.name_of(subject.annotations.name, dataset.split, options.perturb)
                stored.require_replaceable(out / f"{own}.json", subject.identity(dataset))
        found = []
        for dataset in datasets:
            if team.is_main and (warning := subject.trained_on(dataset.split)):
                print(warning, file=sys.stderr, flush=True)
            evaluation = subject.evaluate(dataset, team)
            if evaluation is not None:
                print(f"{evaluation['dataset']} {dataset.split}\n{_table(evaluation['metrics'])}")
                for path in stored.save(out, evaluation, name):
                    print(f"wrote {path}", flush=True)
                found.append(evaluation)
        if found:
            title = name or stored.name_of(subject.annotations.name, "results", options.perturb)
            write_whole(out / f"{title}.md", markdown(found))
            print(f"wrote {out / title}.md")
    return 0


def _table(metrics: dict[str, Any]) -> str:
    """The metrics at input size and at the photos' own size side by side, then the rest."""
    lines = [f"{'':<20}{'input size':>12}{'own size':>12}"]
    pairs = [name for name in metrics if f"full_{name}" in metrics]
    lines += [
        f"{name:<20}{_number(metrics[name]):>12}{_number(metrics['full_' + name]):>12}" for name in pairs
    ]
    alone = [name for name in metrics if name not in pairs and not name.startswith("full_")]
    return "\n".join(lines + [f"{name:<20}{_number(metrics[name]):>12}" for name in alone])


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
