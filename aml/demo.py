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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aml.demo_results import CONDITIONS, STRATEGIES, choose_examples, paired_difference, table
from aml.files import write_json
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
    from aml import demo_report, figures
    from aml.data.scenes import render_scenes

    settings = settings or DemoSettings()
    out = Path(out)
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
        examples = make_examples(results["examples"], configs)
        figures.draw_all(out, results, examples)
    results["seconds"] = _seconds(out)
    write_json(out / "results.json", results)
    report = out / "report.html"
    report.write_text(demo_report.report(out, results), encoding="utf-8")
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


def load_run(config: Any) -> tuple[Any, Any, Any]:
    """(model, aligner, the unseen sentences) of a finished run; its best checkpoint by the validation scenes."""
    from aml import assembly, checkpoint, predict

    folder = checkpoint.resolve(config.train.out)
    model = predict.load_model(folder)
    aligner = assembly.build_aligner(config, model)
    checkpoint.load_weights(folder, aligner=aligner)
    return model, aligner, assembly.build_dataset(config, assembly.open_data(config), model, "test", train=False)


def _evaluate(out: Path, settings: DemoSettings, strategy: str, config: Any) -> None:
    from aml.evaluation import evaluate

    model, aligner, dataset = load_run(config)
    for condition in CONDITIONS:
        path = _records_path(out, strategy, condition)
        if path.exists():
            continue
        clean = condition == "clean"
        records = evaluate(
            model,
            dataset.disturbed(None if clean else (condition, settings.severity)),
            batch_size=config.train.batch_size,
            aligner=aligner if clean else None,
        )
        write_json(path, records)
        score = sum(map(iou, records)) / len(records)
        print(f"{strategy:<9}{condition:<10} mIoU {score:.4f} on {len(records)} unseen sentences", flush=True)


# ------------------------------------------------------------------------------------------------ what came out


def summarize(out: Path, settings: DemoSettings, configs: dict[str, Any]) -> dict[str, Any]:
    """Everything in the report, as plain numbers (shares in [0, 1]), from the files of the runs and evaluations."""
    from aml.assembly import open_data
    from aml.config import to_yaml
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


def make_examples(names: Sequence[str], configs: dict[str, Any]) -> list[dict[str, Any]]:
    """For each sample id: sentence, image [S, S, 3] in [0, 1], target, similarity map of "loss", the pixels it
    leaves out, and the predictions of "none" and "loss" with their IoU. Masks are bool [S, S]."""
    import torch

    from aml.data.dataset import collate
    from aml.evaluation import resized

    examples: list[dict[str, Any]] = [{} for _ in names]
    for strategy in ("none", "loss"):
        model, aligner, dataset = load_run(configs[strategy])
        positions = [dataset.sample_ids.index(name) for name in names]
        batch = collate([dataset[position] for position in positions])
        with torch.no_grad():
            logits, alignment = model(batch["image"], batch["tokens"], batch["text_mask"], return_alignment=True)
            similarity = aligner.similarity(alignment)
        target = batch["target"] > 0
        predicted = resized(logits, target.shape[1:]) > 0
        left_out, upsampled = left_out_pixels(similarity, target, aligner.quantile, aligner.protect_target)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image_mean, model.image_std))
        for i, example in enumerate(examples):
            union = (predicted[i] | target[i]).sum().item()
            example[strategy] = predicted[i].numpy()
            example[f"{strategy}_iou"] = (predicted[i] & target[i]).sum().item() / max(union, 1)
            if strategy == "loss":
                example["sentence"] = dataset.expressions[positions[i]].sentence
                example["image"] = (batch["image"][i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
                example["target"] = target[i].numpy()
                example["similarity"], example["left_out"] = upsampled[i].numpy(), left_out[i].numpy()
    return examples


def left_out_pixels(similarity: Any, target: Any, quantile: float, protect_target: bool) -> tuple[Any, Any]:
    """What `masked_loss` leaves out, bool [B, H, W], and the map at the target's size [B, H, W]."""
    import torch.nn.functional as F

    from aml_kernels import sample_quantile

    threshold = sample_quantile(similarity, quantile).view(-1, 1, 1)
    size = target.shape[1:]
    upsampled = F.interpolate(similarity[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    left_out = upsampled < threshold
    return (left_out & ~target if protect_target else left_out), upsampled


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
