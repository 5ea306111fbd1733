"""`aml train`."""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "Train a model on data in the REFER layout."
TAKES_SETTINGS = True
MEMORY_REMEDY = (
    "give a lower train.batch_size (train.accumulate makes up for it), train.precision=bf16, or for CARIS "
    "model.gradient_checkpointing=true"
)
EXAMPLES = """\
Settings are given in a YAML file and, after it, as section.name=value words:
  aml train --config run.yaml --data DATA --out runs/first optim.lr=1e-4 train.epochs=5
  aml train --resume --out runs/first        # after an interruption: goes on as if there had been none
  torchrun --nproc-per-node 4 -m aml train --config run.yaml

Settings:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES + _settings_table()
    parser.usage = "aml train [--config FILE] [--data DIR] [--out DIR] [--resume] [section.name=value ...]"
    parser.add_argument("--config", metavar="FILE", help="settings in YAML; without it, the defaults")
    parser.add_argument("--data", metavar="DIR", help="folder of the data: short for data.root=DIR")
    parser.add_argument("--out", metavar="DIR", help="run directory: short for train.out=DIR")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its settings unless --config is given",
    )
    parser.add_argument(
        "--allow-change",
        metavar="WHAT",
        action="append",
        default=[],
        choices=("data", "batch", "seed", "world"),
        help="resume although this has changed: data, batch, seed or world; may be repeated",
    )


def _settings_table() -> str:
    from aml.config import describe

    lines, section = [], ""
    for name, kind, default, doc in describe():
        if not name.startswith(section + ".") or not section:
            section = name.partition(".")[0]
            lines.append(f"  {section}")
        lines.append(f"    {name}: {kind}; default {default or 'empty'}\n        {doc}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    from aml import config

    words = short_forms(options) + options.settings
    settings = config.load(options.config, words)
    if options.resume and not options.config:
        from aml import checkpoint

        found, _ = checkpoint.newest(Path(settings.train.out))
        if found:  # otherwise `train` says what is wrong
            settings = config.load(found / "config.yaml", [*words, f"train.out={settings.train.out}"])
    from aml.training import train

    train(settings, resume=options.resume, allow_change=options.allow_change)
    return 0


def short_forms(options: argparse.Namespace) -> list[str]:
    """--data and --out as the settings that they are short for."""
    pairs = (("data.root", options.data), ("train.out", options.out))
    return [f"{name}={value}" for name, value in pairs if value is not None]
