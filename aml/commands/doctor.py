"""`aml doctor`."""

from __future__ import annotations

import argparse

ABOUT = "Try out what a training needs: operators, model, weights, disk, data, two processes."
TAKES_SETTINGS = True
EPILOG = "Takes the settings of aml train. Exit code: 0 nothing failed, 1 something did."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml doctor [--config FILE] [--data DIR] [--out DIR] [section.name=value ...]"
    parser.epilog = EPILOG
    parser.add_argument("--config", metavar="FILE", help="settings in YAML; without it, the defaults")
    parser.add_argument("--data", metavar="DIR", help="folder of the data: short for data.root=DIR")
    parser.add_argument("--out", metavar="DIR", help="run directory: short for train.out=DIR")


def run(options: argparse.Namespace) -> int:
    from aml import config
    from aml.commands.train import short_forms

    settings = config.load(options.config, short_forms(options) + options.settings)
    from aml import doctor

    levels = []
    for level, what, text, remedy in doctor.examine(settings):
        print(f"{level:<5} {what}: {text}")
        if remedy:
            print(f"      -> {remedy}", flush=True)
        levels.append(level)
    failed, warned = levels.count(doctor.FAIL), levels.count(doctor.WARN)
    print(f"{failed} failed, {warned} to know about" if failed or warned else "all is well")
    return 1 if failed else 0
