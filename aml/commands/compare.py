"""`aml compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from aml.commands.options import picture

ABOUT = "Compare evaluated runs: mean and spread over seeds, paired intervals over photographs."
EPILOG = """\
Reads what aml eval stored. Runs with equal settings but for the seed are put together; all others are compared with the
setting of the first run given.

  aml compare runs/none-0 runs/none-1 runs/none-2 runs/loss-0 runs/loss-1 runs/loss-2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, checkpoint, or evaluation's JSON file")
    parser.add_argument("--split", default="val", help="which of a run's evaluations; default: val")
    parser.add_argument("--out", metavar="FILE", help="write the tables there too, in Markdown")
    parser.add_argument("--plot", metavar="FILE.png", type=picture, help="draw the differences as PNG")


def run(options: argparse.Namespace) -> int:
    from aml import comparison
    from aml.files import write_whole

    found = comparison.compare([comparison.read_run(path, options.split) for path in options.runs])
    text = comparison.markdown(found)
    print(text, end="")
    if options.out:
        write_whole(Path(options.out), text)
        print(f"\nwrote {options.out}")
    if options.plot:
        comparison.draw(found, Path(options.plot))
        print(f"wrote {options.plot}")
    return 0
