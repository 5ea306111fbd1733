"""Does leaving pixels out help? Many small runs that differ in one setting and in the seed, and a report of them.

    python benchmarks/experiments.py photographs --data DIR     # the strategies on data in the REFER layout
    python benchmarks/experiments.py scenes                     # the strategies on rendered scenes
    python benchmarks/experiments.py settings                   # on the same scenes, the settings one at a time

    runs/experiments/<data>/<variant>-<seed>/       ordinary runs of `aml train`, with their evaluations
    docs/experiments/<name>/report.md, *.png        what came out

Whatever is finished is not done again: a call that was interrupted is simply repeated. All runs of an experiment have
as many steps; what is evaluated is their end, so no split is used to choose anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from aml import comparison
from aml.data.scenes import render_scenes
from aml.evaluation_tables import table
from aml.files import write_whole
from aml.perturbations import KINDS
from aml.runlog import read_log

ROOT = Path(__file__).resolve().parent.parent

SCENES = {"train": 400, "val": 4, "test": 100, "image_size": 192}
STRATEGIES = {
    "none": ["alignment.strategy=none"],
    "random": ["alignment.strategy=random"],
    "easiest": ["alignment.strategy=easiest"],
    "loss": ["alignment.strategy=loss"],
    "loss-gaussian": ["alignment.strategy=loss", "alignment.projection=gaussian"],
    "random-blocks": ["alignment.strategy=random_blocks"],
    "image": ["alignment.strategy=image"],
    "image-gaussian": ["alignment.strategy=image", "alignment.projection=gaussian"],
}
SETTINGS = {
    **{name: STRATEGIES[name] for name in ("none", "loss", "random")},
    "quantile-0.1": ["alignment.quantile=0.1"],
    "quantile-0.5": ["alignment.quantile=0.5"],
    "quantile-0.75": ["alignment.quantile=0.75"],
    "random-0.5": ["alignment.strategy=random", "alignment.quantile=0.5"],
    "no-warmup": ["alignment.warmup=0"],
    "warmup-0.5": ["alignment.warmup=0.5"],
    "unprotected": ["alignment.protect_target=false"],
    "linear": ["alignment.projection=linear"],
    "unprotected-gaussian": ["alignment.protect_target=false", "alignment.projection=gaussian"],
}


@dataclass(frozen=True)
class Experiment:
    """variants: settings by name; the first is what the others are compared with. data: the folder of its runs, which
    experiments on the same data share. disturbed: evaluated on disturbed photographs too, with the first seed."""

    about: str
    data: str
    variants: dict[str, list[str]]
    common: tuple[str, ...]
    split: str
    seeds: tuple[int, ...] = (0, 1, 2)
    disturbed: tuple[str, ...] = ()


SMALL = (
    "data.augment=false",  # so that the frozen encoders see each image once
    "train.batch_size=8", "train.workers=0", "train.keep=1", "eval.every=1000",
)  # fmt: skip
SCENES_COMMON = (*SMALL, "model.image_size=192", "train.steps=500")
EXPERIMENTS = {
    "photographs": Experiment(
        "The strategies on photographs. The set is far too small for a claim about the method: it shows that the "
        "machinery works on real data, and how large the noise is.",
        "photographs", STRATEGIES, (*SMALL, "model.image_size=224", "train.epochs=12"), "val",
        disturbed=("none", "random", "easiest", "loss", "image"),
    ),
    "scenes": Experiment(
        "The strategies on rendered scenes.", "scenes", STRATEGIES, SCENES_COMMON, "test",
        disturbed=("none", "random", "easiest", "loss", "image"),
    ),
    "settings": Experiment(
        "Settings of `loss` on rendered scenes, one at a time, and a control of the higher quantile.",
        "scenes", SETTINGS, SCENES_COMMON, "test",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training of an experiment, in its own folder."""

    variant: str
    seed: int
    out: Path
    words: tuple[str, ...]
    split: str

    @property
    def finished(self) -> bool:
        return bool(list(self.out.glob(f"evaluations/*/*-{self.split}.json")))

    def make(self) -> None:
        """Train, or go on with it, and evaluate."""
        if (self.out / "checkpoints").is_dir():
            aml("train", "--resume", "--out", str(self.out))
        else:
            shutil.rmtree(self.out, ignore_errors=True)  # stopped before its first checkpoint
            aml("train", "--out", str(self.out), f"train.seed={self.seed}", *self.words)
        aml("eval", "--checkpoint", str(self.out), "--split", self.split)

    def disturb(self) -> None:
        aml("robustness", "--checkpoint", str(self.out), "--split", self.split)


def aml(*words: str) -> None:
    """`aml` in a process with one thread, so that several side by side do not disturb each other."""
    done = subprocess.run(
        [sys.executable, "-m", "aml", *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"aml {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    print(f"done: aml {' '.join(words[:4])}", flush=True)


def side_by_side(jobs: int, calls: Iterable[Any]) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def runs_of(name: str, data: Path, folder: Path) -> list[Run]:
    plan = EXPERIMENTS[name]
    return [
        Run(variant, seed, folder / f"{variant}-{seed}", (f"data.root={data}", *plan.common, *words), plan.split)
        for seed in plan.seeds
        for variant, words in plan.variants.items()
    ]


# --------------------------------------------------------------------------------------------------- the report


def report(name: str, runs: Sequence[Run], folder: Path) -> None:
    """report.md and differences.png in `folder`, from what the runs have stored."""
    plan = EXPERIMENTS[name]
    ordered = sorted(runs, key=lambda run: list(plan.variants).index(run.variant))
    found = comparison.compare([comparison.read_run(str(run.out), run.split) for run in ordered])
    labels = {each.label: Path(each.runs[0].name).name.rpartition("-")[0] for each in found.settings}
    for setting in found.settings:
        setting.label = labels[setting.label]
    for difference in found.differences:
        difference.setting = labels[difference.setting]
    folder.mkdir(parents=True, exist_ok=True)
    comparison.draw(found, folder / "differences.png")
    command = f"python benchmarks/experiments.py {name}{' --data DIR' * (name == 'photographs')}"
    parts = [f"# Experiment: {name}", plan.about, f"Made by `{command}`."]
    parts += [comparison.markdown(found).replace("# ", "Evaluated on ", 1).rstrip(), "![Differences](differences.png)"]
    parts += ["## Gauges", gauges(ordered)]
    if plan.disturbed:
        parts += ["## Disturbed photographs, mIoU over five severities, seed 0", robustness(ordered, plan)]
    variants = [[f"`{variant}`", f"`{' '.join(words)}`"] for variant, words in plan.variants.items()]
    parts += ["## Settings", f"Common to all: `{' '.join(plan.common)}`.", table(["name", "settings"], variants)]
    write_whole(folder / "report.md", "\n\n".join(parts) + "\n")
    print(f"wrote {folder / 'report.md'}")


def gauges(runs: Sequence[Run]) -> str:
    """What the method's own statistics say, means over the seeds."""
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        logs = [read_log(run.out / "metrics.jsonl") for run in runs if run.variant == variant]
        trained = [[line for line in log if line["kind"] == "train"] for log in logs]
        ends = [next(line for line in reversed(log) if line["kind"] == "eval") for log in logs]
        late = [line for lines in trained for line in lines[len(lines) // 2 :]]
        rows.append([
            variant,
            *(f"{100 * fmean(line[name] for line in late):.1f}" for name in ("kept", "target_left_out", "iou")),
            *(f"{fmean(line[name] for line in ends):.3f}" for name in ("auc", "auc_wrong_sentence", "area_ratio")),
        ])  # fmt: skip
    heads = ["", "kept, %", "target left out, %", "training IoU, %", "AUC", "with a wrong sentence", "area ratio"]
    over = "Over the second half of the steps; AUC and area at the end of training, on its split `val`."
    return f"{over}\n\n{table(heads, rows)}"


def robustness(runs: Sequence[Run], plan: Experiment) -> str:
    rows = []
    for run in runs:
        if run.variant in plan.disturbed and run.seed == plan.seeds[0]:
            results = json.loads(next(run.out.glob("evaluations/*/robustness-*/results.json")).read_text())
            values = [results["kinds"][kind]["mIoU"] for kind in KINDS]
            clean = results["conditions"]["clean"]["mIoU"]
            rows.append([run.variant, *(f"{100 * value:.1f}" for value in (clean, *values, fmean(values)))])
    return table(["", "clean", *(kind.replace("_", " ") for kind in KINDS), "mean of the disturbed"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="folder of the data; the rendered scenes need none")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/experiments", help="default: runs/experiments")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/experiments", help="default: docs/experiments")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side; default: one per core")
    options = parser.parse_args(arguments)
    plan = EXPERIMENTS[options.name]
    folder = options.out.resolve() / plan.data
    if options.name == "photographs" and options.data is None:
        parser.error("photographs: give --data, a folder with annotations in the REFER layout")
    data = options.data.resolve() if options.data else folder.parent / "data"
    if options.data is None:
        render_scenes(data, **SCENES)
    runs = runs_of(options.name, data, folder)
    side_by_side(options.jobs, [run.make for run in runs if not run.finished])
    side_by_side(options.jobs, [r.disturb for r in runs if r.variant in plan.disturbed and r.seed == plan.seeds[0]])
    report(options.name, runs, options.report / options.name)


if __name__ == "__main__":
    main()
