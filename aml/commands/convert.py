"""`aml convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "Convert a released CARIS or AMLRIS checkpoint; nothing in the file is run."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml convert CHECKPOINT.pth --out DIR [section.name=value ...]"
    parser.add_argument("file", metavar="CHECKPOINT.pth")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder, for eval and predict --checkpoint")


def run(options: argparse.Namespace) -> int:
    from aml.convert import convert

    print(convert(Path(options.file), Path(options.out), options.settings))
    return 0
