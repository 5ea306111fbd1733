"""`aml data stats`."""

from __future__ import annotations

import argparse
from pathlib import Path

from aml.commands.options import add_data_root, picture

ABOUT = "Draw distributions of sentences and targets, and print a table."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_root(parser)
    parser.add_argument(
        "--dataset", metavar="NAME", default="refcoco", help="as in data.dataset, also refcocog(umd) or union"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images, where it is another")
    parser.add_argument(
        "--out", metavar="FILE.png", type=picture, default="data-stats.png", help="default: data-stats.png"
    )


def run(options: argparse.Namespace) -> int:
    from aml.data import stats
    from aml.data.union import open_dataset

    data = open_dataset(options.root, options.dataset, images=options.images)
    found = stats.collect(data)
    print(stats.table(found))
    stats.draw(found, Path(options.out), data.name)
    print(f"wrote {options.out}")
    return 0
