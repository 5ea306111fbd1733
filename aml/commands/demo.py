"""`aml demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "Train and compare the strategies on rendered scenes; writes report.html."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="default: runs/demo")


def run(options: argparse.Namespace) -> int:
    from aml.demo import run_demo

    run_demo(Path(options.out))
    return 0
