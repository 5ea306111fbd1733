"""`aml alignment-report`: which similarity maps point at the target, and what filtering by them leaves out of it.

    <out>/report.md        tables, and how to make them again
    <out>/scores.png       AUC of each map, and share of the target lost per quantile
    <out>/maps.png         maps over images
    <out>/results.json     all numbers, one record per sentence
    <out>/scenes/          the data, where none were given: rendered scenes

Any model and data set: encoder features are all that is read. Neither the model nor its decoder is trained.
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from aml.alignment_tables import markdown
from aml.commands.options import FEWER_AT_ONCE, count

ABOUT = "Measure which similarity maps point at the target."
TAKES_SETTINGS = True
MEMORY_REMEDY = FEWER_AT_ONCE
TRAIN_SCENES, VAL_SCENES, SCENE_SIZE = 200, 60, 192
EPILOG = """\
examples:
  aml alignment-report --out runs/alignment                               # rendered scenes, the default model
  aml alignment-report --data DIR --out runs/alignment model.name=caris   # as its pretrained encoders are
  aml alignment-report --checkpoint runs/first --out runs/alignment       # a trained model, and its own map
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml alignment-report --out DIR [--data DIR | --checkpoint DIR] [options] [section.name=value ...]"
    parser.epilog = EPILOG
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the report")
    parser.add_argument("--data", metavar="DIR", help="folder of the data; default: the run's, or rendered scenes")
    parser.add_argument("--checkpoint", metavar="DIR", help="a run directory or checkpoint: its model and its own map")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--train-split", default="train", help="what the trained pair learns from; default: train")
    parser.add_argument("--steps", type=count, default=100, help="of training the pair; 0: none; default: 100")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the pair; falls to 0; default: 3e-3")
    parser.add_argument("--seeds", type=count, default=3, help="of the untrained projections; default: 3")
    parser.add_argument("--sentences", type=count, default=400, help="at most, spread over the split; default: 400")
    parser.add_argument("--pictures", type=count, default=4, help="sentences in maps.png; default: 4")


def run(options: argparse.Namespace) -> int:
    """Measure, write the folder, print the main table."""
    import torch

    from aml import alignment_figures, alignment_maps, assembly, checkpoint, config, predict
    from aml.files import require_no_file, require_writable, write_json, write_whole
    from aml.models import build_model
    from aml.trained import settings_beside

    out = Path(options.out)
    require_no_file(out)
    folder = checkpoint.resolve(options.checkpoint) if options.checkpoint else None
    load = partial(settings_beside, folder) if folder else partial(config.load, None)
    settings = load([*([f"data.root={options.data}"] if options.data else []), *options.settings])
    rendered = not settings.data.root
    if rendered:
        settings = load([f"data.root={_render(out / 'scenes')}", *options.settings])
    refer = assembly.open_data(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.train.seed)
    model = predict.load_model(folder) if folder else build_model(**settings.model.options())
    model = model.to(device).eval()
    dataset = assembly.build_dataset(settings, refer, model, options.split, train=False)
    batch_size = settings.train.batch_size
    require_writable(out)

    maps: dict[str, list[Any]] = {}
    if folder:
        maps["of this run"] = [predict.load_aligner(folder, model).patchmax]
    if options.steps:
        lessons = assembly.build_dataset(settings, refer, model, options.train_split, train=False)
        training = {"steps": options.steps, "batch_size": 2 * batch_size, "lr": options.lr, "device": device}
        maps |= alignment_maps.trained_maps(model, lessons, dim=settings.alignment.dim, **training)
    maps |= alignment_maps.untrained_maps(model, max(options.seeds, 1), device)

    sentences = min(options.sentences or len(dataset), len(dataset))
    indices = [i * len(dataset) // sentences for i in range(sentences)]
    measuring: dict[str, Any] = {"batch_size": batch_size, "device": device}
    records = alignment_maps.measure(model, dataset, maps, indices=indices, **measuring)
    results = {
        "command": _command(options),
        "model": settings.model.name,
        "image_size": model.image_size,
        "data": "rendered scenes" if rendered else refer.name,
        "split": options.split,
        "sentences": len(records),
        "images": len({record["image_id"] for record in records}),
        "steps": options.steps,
        "quantiles": list(alignment_maps.QUANTILES),
        "maps": {
            name: [alignment_maps.summary(records, name, seed) for seed in range(len(seeds))]
            for name, seeds in maps.items()
        },
        "literal": alignment_maps.literal_summary(records),
        "released": alignment_maps.released_shares(),
        "records": records,
    }
    write_json(out / "results.json", results)
    text = markdown(results)
    write_whole(out / "report.md", text)
    alignment_figures.draw_scores(out / "scores.png", results)
    if options.pictures:
        step = max(sentences // options.pictures, 1)
        shown = [indices[i] for i in range(step // 2, sentences, step)][: options.pictures]
        alignment_figures.draw_maps(out / "maps.png", model, dataset, maps, shown, device)
    print(text.split("\n## ")[0].strip())
    print(f"\nwrote {out / 'report.md'}")
    return 0


def _render(folder: Path) -> Path:
    from aml.data.scenes import render_scenes

    return render_scenes(folder, train=TRAIN_SCENES, val=VAL_SCENES, image_size=SCENE_SIZE, seed=0)


def _command(options: argparse.Namespace) -> str:
    """The call, with the options that differ from their defaults; folders by their last part."""
    words = ["aml", "alignment-report"]
    defaults = {"split": "val", "train_split": "train", "steps": 100, "lr": 3e-3, "seeds": 3, "sentences": 400}
    for name, default in (defaults | {"pictures": 4}).items():
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("data", "checkpoint", "out"):
        if getattr(options, name):
            words += [f"--{name}", Path(getattr(options, name)).name or "."]
    return shlex.join([*words, *options.settings])
