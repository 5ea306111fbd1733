"""`aml data convert`."""

from __future__ import annotations

import argparse

from aml.commands.options import add_data_root

ABOUT = "Write pickled annotations as JSON, once; no pickle is read afterwards."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_root(parser)
    parser.add_argument("--dataset", metavar="NAME", help="only this one; default: all under ROOT")
    parser.add_argument("--out", metavar="DIR", help="write there, with instances.json; default: beside the pickles")


def run(options: argparse.Namespace) -> int:
    from aml.data.convert import convert

    for line in convert(options.root, options.dataset, options.out):
        print(line, flush=True)
    return 0
