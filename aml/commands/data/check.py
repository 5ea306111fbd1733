"""`aml data check`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aml.commands.options import add_data_root

ABOUT = "Count, compare with the published counts, and look at every file."
EPILOG = "Exit code: 0 all data sets looked at can be used, 1 one cannot, 2 there is nothing to look at."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_data_root(parser)
    parser.add_argument("--dataset", metavar="NAME", help="only this one, as refcocog; default: all under ROOT")
    parser.add_argument("--split-by", metavar="WHO", help="only this partition: unc, umd, google")
    parser.add_argument("--images", metavar="DIR", help="folder of the images, where it is another")
    parser.add_argument("--skip", metavar="FILE", help="leave out the images of this list, as data.skip does")
    parser.add_argument("--bad", metavar="FILE", help="write the names of images that cannot be used, for data.skip")
    parser.add_argument("--quick", action="store_true", help="do not decode the images: truncated ones go unnoticed")


def run(options: argparse.Namespace) -> int:
    from aml.data import check
    from aml.data.union import read_skip_list
    from aml.files import require_writable, write_whole

    bad_list = Path(options.bad) if options.bad else None
    if bad_list:
        if bad_list.is_dir():
            raise IsADirectoryError(f"--bad {bad_list}: expected a file to write, it is a folder")
        require_writable(bad_list.parent)
    skip = read_skip_list(options.skip) if options.skip else []
    reports, bad = [], dict[str, str]()
    for report in check.check(
        options.root,
        options.dataset,
        options.split_by,
        images=options.images,
        skip=skip,
        decode=not options.quick,
        progress=_bar,
    ):
        print(_shown(report), end="\n\n", flush=True)
        reports.append(report)
        bad |= report.bad
    for line in check.leaks(reports):
        print(line)
    if bad_list:
        lines = [f"{name}\t{' '.join(reason.split())}\n" for name, reason in sorted(bad.items())]
        write_whole(bad_list, "".join(lines))
        print(f"wrote {bad_list}: {len(lines)} images; leave them out with data.skip={bad_list}")
    unusable = [f"{report.dataset}({report.split_by})" for report in reports if not report.usable]
    print(f"{len(reports)} data sets: " + (f"NOT usable: {', '.join(unusable)}" if unusable else "usable"))
    return 1 if unusable else 0


def _shown(report: Any) -> str:
    """A report as text: counts beside the published ones, then findings with remedies."""
    from aml.data.published import PUBLISHED

    published = PUBLISHED.get((report.dataset, report.split_by), {})
    lines = [f"{report.dataset}({report.split_by})"]
    if report.counts:
        lines.append(f"  {'split':<8}{'refs':>8}{'sentences':>11}{'images':>8}")
    for split, counts in report.counts.items():
        line = f"  {split:<8}{counts.refs:>8}{counts.sentences:>11}{counts.images:>8}"
        if split in published:
            same = published[split].agrees(counts)
            line += "   as published" if same else f"   published: {published[split]}"
        lines.append(line)
    for finding in report.findings:
        lines.append(f"  {finding.level:<5} {finding.text}")
        if finding.remedy:
            lines.append(f"        -> {finding.remedy}")
    lines.append(f"  {'usable' if report.usable else 'NOT usable'}")
    return "\n".join(lines)


def _bar(items: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    from aml.console import on_terminal

    return tqdm(items, total=total, desc="images", unit="file", leave=False, disable=not on_terminal())
