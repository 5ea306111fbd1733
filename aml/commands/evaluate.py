"""`aml eval`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from aml.commands.options import add_checkpoint, perturbation

ABOUT = "Evaluate a checkpoint: mIoU, oIoU, P@X, at input and original size."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml eval --checkpoint DIR [--data DIR] [--split SPLIT] [section.name=value ...]"
    add_checkpoint(parser)
    parser.add_argument("--data", metavar="DIR", help="folder of the data; default: that of the training")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument(
        "--perturb",
        metavar="KIND:SEVERITY",
        type=perturbation,
        help="disturb the images first: noise, blur or occlusion, severity 1 to 5, as noise:3",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="JSON file for metrics and one record per sentence; "
        "default: eval-SPLIT.json beside the checkpoint",
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from aml import assembly, checkpoint, config, evaluation, predict

    folder = checkpoint.resolve(options.checkpoint)
    words = [f"data.root={options.data}"] if options.data else []
    settings = config.load(folder / "config.yaml", words + options.settings)
    refer = assembly.open_data(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = predict.load_model(folder, device)
    aligner = assembly.build_aligner(settings, model)
    checkpoint.load_weights(folder, aligner=aligner)
    dataset = assembly.build_dataset(settings, refer, model, options.split, train=False)
    records = evaluation.evaluate(
        model,
        dataset,
        device=device,
        batch_size=settings.train.batch_size,
        perturb=options.perturb,
        aligner=aligner.to(device),
        workers=settings.train.workers,
    )
    metrics = evaluation.metrics(records, dataset.sample_ids)
    print(_table(metrics))
    out = Path(options.out) if options.out else folder / f"eval-{options.split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "checkpoint": str(folder),
        "data": settings.data.root,
        "split": options.split,
        "perturb": options.perturb,
        "metrics": metrics,
        "records": records,
    }
    out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"wrote {out}")
    return 0


def _table(metrics: dict[str, float | int]) -> str:
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
