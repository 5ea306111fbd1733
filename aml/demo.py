"""`aml demo`: does leaving pixels out of the loss help? Four strategies, equal in all else, on rendered scenes.

    <out>/settings.json        what was asked for; a second call with other settings is refused
    <out>/scenes/              the data
    <out>/runs/<strategy>/     ordinary runs of `aml train`, so `aml eval` and `aml predict` take them
    <out>/evaluations/*.json   one record per unseen sentence, for each strategy and disturbance
    <out>/results.json, report.html, *.png

Whatever is finished is not done again: an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aml.demo_results import CONDITIONS, STRATEGIES, paired_difference, table
from aml.files import require_no_file, write_json, write_whole
from aml.metrics import iou


@dataclass(frozen=True)
class DemoSettings:
    """What is compared. The defaults take about six minutes on two CPU cores.

    severity: of noise, blur and occlusion, 1 to 5. train: further settings of `aml train`, as section.name=value.
    """

    train_scenes: int = 200
    val_scenes: int = 12
    test_scenes: int = 60
    scene_size: int = 192
    severity: int = 2
    seed: int = 0
    train: tuple[str, ...] = (
        "model.image_size=192",
        "data.augment=false",  # so that the frozen backbone sees each of the few scenes once
        "train.steps=252",
        "train.batch_size=8",
        "train.workers=0",
        "train.log_every=10",
        "train.keep=1",
    )


def run_demo(out: Path, settings: DemoSettings | None = None) -> Path:
    """Render, train, evaluate, and write what came out; returns the path of report.html.

    Raises ValueError where `out` holds a demo with other settings.
    """
    from aml import demo_examples, demo_report, figures
    from aml.data.scenes import render_scenes

    settings = settings or DemoSettings()
    out = Path(out)
    require_no_file(out)
    configs = {strategy: _config(out, settings, strategy) for strategy in STRATEGIES}
    _check_settings(out, settings, configs)
    print(f"demo: four strategies, {configs['none'].train.steps} steps each; writing to {out}", flush=True)
    with _timed(out, "render"):
        splits = {"train": settings.train_scenes, "val": settings.val_scenes, "test": settings.test_scenes}
        render_scenes(out / "scenes", **splits, image_size=settings.scene_size, seed=settings.seed)
    for strategy, config in configs.items():
        if not _finished(config):
            with _timed(out, f"train {strategy}"):
                _train(out, config)
    for strategy, config in configs.items():
        if not all(_records_path(out, strategy, condition).exists() for condition in CONDITIONS):
            with _timed(out, f"evaluate {strategy}"):
                _evaluate(out, settings, strategy, config)
    results = summarize(out, settings, configs)
    with _timed(out, "figures"):
        runs = {strategy: load_run(configs[strategy]) for strategy in demo_examples.PREDICTED}
        figures.draw_all(out, results, demo_examples.make_examples(results["examples"], runs))
    results["seconds"] = _seconds(out)
    write_json(out / "results.json", results)
    report = out / "report.html"
    write_whole(report, demo_report.report(out, results))
    print(f"\n{table(results)}\n\nwrote {report} ({sum(results['seconds'].values()) / 60:.1f} minutes of work)")
    return report


# ----------------------------------------------------------------------------------------- training, evaluation


def _config(out: Path, settings: DemoSettings, strategy: str) -> Any:
    from aml.config import load

    own = [
        f"data.root={out / 'scenes'}",
        f"train.out={out / 'runs' / strategy}",
        f"train.seed={settings.seed}",
        f"alignment.strategy={strategy}",
    ]
    return load(None, [*settings.train, *own])


def _check_settings(out: Path, settings: DemoSettings, configs: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that are there; the runs' own too, as defaults may change."""
    from aml.config import differences, load

    path = out / "settings.json"
    asked = json.loads(json.dumps(asdict(settings)))
    changed = []
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        names = [*asked, *(name for name in there if name not in asked)]
        changed = [f"{n}: {there.get(n)} -> {asked.get(n)}" for n in names if there.get(n) != asked.get(n)]
    for strategy, config in configs.items():
        saved = out / "runs" / strategy / "config.yaml"
        if saved.exists():
            there = load(saved)  # the folder may have been moved, or be named from elsewhere
            there = replace(
                there,
                data=replace(there.data, root=config.data.root),
                train=replace(there.train, out=config.train.out),
            )
            changed += [f"run {strategy}: {line}" for line in differences(there, config)]
    if changed:
        raise ValueError(
            f"{out} holds a demo with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Give another --out, or remove that folder"
        )
    write_json(path, asked)


def _finished(config: Any) -> bool:
    from aml import checkpoint

    newest, _ = checkpoint.newest(Path(config.train.out))
    return newest is not None and checkpoint.read(newest).state["progress"]["step"] >= config.train.steps


def _train(out: Path, config: Any) -> None:
    from aml import checkpoint
    from aml.errors import Stopped
    from aml.training import train

    print(f"\n--- strategy {config.alignment.strategy}", flush=True)
    newest, _ = checkpoint.newest(Path(config.train.out))
    try:
        train(config, resume=newest is not None)
    except Stopped as stop:
        raise Stopped(stop.signum, f"stopped and saved; go on with\n  {_command(out)}") from None


def load_run(config: Any) -> Any:
    """A finished run, as `aml.trained.Trained`; its best checkpoint by the validation scenes."""
    import torch

    from aml.trained import open_trained

    return open_trained(config.train.out, config.data.root, (), torch.device("cpu"))


def _evaluate(out: Path, settings: DemoSettings, strategy: str, config: Any) -> None:
    from aml.evaluation import evaluate

    run = load_run(config)
    dataset = run.dataset("test")
    for condition in CONDITIONS:
        path = _records_path(out, strategy, condition)
        if path.exists():
            continue
        clean = condition == "clean"
        records = evaluate(
            run.model,
            dataset.disturbed(None if clean else (condition, settings.severity)),
            batch_size=config.train.batch_size,
            aligner=run.aligner if clean else None,
        )
        write_json(path, records)
        score = sum(map(iou, records)) / len(records)
        print(f"{strategy:<9}{condition:<10} mIoU {score:.4f} on {len(records)} unseen sentences", flush=True)


# ------------------------------------------------------------------------------------------------ what came out


def summarize(out: Path, settings: DemoSettings, configs: dict[str, Any]) -> dict[str, Any]:
    """Everything in the report, as plain numbers (shares in [0, 1]), from the files of the runs and evaluations."""
    from aml.assembly import open_data
    from aml.config import to_yaml
    from aml.demo_examples import choose_examples
    from aml.evaluation import metrics
    from aml.runlog import read_log

    image_of = {e.sample_id: e.image_id for e in open_data(configs["none"]).expressions("test")}
    records = {
        s: {c: json.loads(_records_path(out, s, c).read_text(encoding="utf-8")) for c in CONDITIONS} for s in STRATEGIES
    }
    strategies: dict[str, Any] = {}
    for strategy, config in configs.items():
        log = read_log(Path(config.train.out) / "metrics.jsonl")
        warmup = round(config.alignment.warmup * config.train.steps)
        lines = [line for line in log if line["kind"] == "train" and line["step"] - config.train.log_every >= warmup]
        strategies[strategy] = {
            "kept": _mean([line["kept"] for line in lines]),
            "target_left_out_of_loss": _mean([line["target_left_out"] for line in lines]),
            **{c: metrics(records[strategy][c], image_of) for c in CONDITIONS},
            "differences": {
                c: paired_difference(records[strategy][c], records["none"][c], image_of) for c in CONDITIONS
            },
            "curves": {
                "loss": [(line["step"], line["loss"]) for line in log if line["kind"] == "train"],
                "mIoU": [(line["epoch"], line["mIoU"]) for line in log if line["kind"] == "eval"],
            },
        }
    shared = replace(configs["loss"], data=replace(configs["loss"].data, root="scenes"))
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "steps": configs["none"].train.steps,
        "quantile": configs["loss"].alignment.quantile,
        "protect_target": configs["loss"].alignment.protect_target,
        "sentences": len(image_of),
        "images": len(set(image_of.values())),
        "strategies": strategies,
        "examples": choose_examples(records["loss"]["clean"], image_of),
        "machine": _machine(),
        "command": _command(out),
        "config": to_yaml(shared),
    }


# ----------------------------------------------------------------------------------------------------- small parts


def _machine() -> dict[str, str]:
    from importlib import metadata

    import torch

    from aml import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    found = {"CPU": cpu, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    found |= {"system": platform.platform(), "Python": platform.python_version()}
    for package in ("torch", "timm", "transformers", "accelerate"):
        found[package] = metadata.version(package)
    return found | {"aml": __version__}


@contextmanager
def _timed(out: Path, stage: str) -> Iterator[None]:
    """Remember how long a stage took; one that finds its work done keeps the time of the call that did it."""
    start = time.perf_counter()
    yield
    seconds = _seconds(out)
    seconds[stage] = max(time.perf_counter() - start, seconds.get(stage, 0.0))
    write_json(out / "seconds.json", seconds)


def _command(out: Path) -> str:
    return f"aml demo --out {shlex.quote(str(out))}"


def _seconds(out: Path) -> dict[str, float]:
    path = out / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _records_path(out: Path, strategy: str, condition: str) -> Path:
    return out / "evaluations" / f"{strategy}-{condition}.json"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
