"""`aml data check`, `aml data convert`, `aml data stats`. Imports of numpy and its kin stand inside the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = "folder of the data: annotations in <dataset>/, images in images/train2014/ or train2014/"
EXIT_CODES = "Exit code: 0 all data sets looked at can be used, 1 one cannot, 2 there is nothing to look at."


def add_data_commands(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Add the command `data` to those of `aml`."""
    about = "Check, convert and describe data sets: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, RRSIS-D."
    data = commands.add_parser("data", help=about, description=about, allow_abbrev=False)
    below = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
        added = below.add_parser(
            name, help=about, description=about, epilog=epilog, allow_abbrev=False, formatter_class=formatter
        )
        added.set_defaults(run=run, takes_settings=False, options=added._option_string_actions)
        added.add_argument("root", metavar="ROOT", help=ROOT)
        return added

    check = command("check", _check, "Count, compare with the published counts, and look at every file.", EXIT_CODES)
    check.add_argument("--dataset", metavar="NAME", help="only this one, as refcocog; default: all under ROOT")
    check.add_argument("--split-by", metavar="WHO", help="only this partition: unc, umd, google")
    check.add_argument("--images", metavar="DIR", help="folder of the images, where it is another")
    check.add_argument("--skip", metavar="FILE", help="leave out the images of this list, as data.skip does")
    check.add_argument("--bad", metavar="FILE", help="write the names of images that cannot be used, for data.skip")
    check.add_argument("--quick", action="store_true", help="do not decode the images: truncated ones go unnoticed")

    convert = command("convert", _convert, "Write pickled annotations as JSON, once; no pickle is read afterwards.")
    convert.add_argument("--dataset", metavar="NAME", help="only this one; default: all under ROOT")
    convert.add_argument("--out", metavar="DIR", help="write there, with instances.json; default: beside the pickles")

    stats = command("stats", _stats, "Draw distributions of sentences and targets, and print a table.")
    stats.add_argument(
        "--dataset", metavar="NAME", default="refcoco", help="as in data.dataset, also refcocog(umd) or union"
    )
    stats.add_argument("--images", metavar="DIR", help="folder of the images, where it is another")
    stats.add_argument("--out", metavar="FILE", default="data-stats.png", help="default: data-stats.png")


def _check(options: argparse.Namespace) -> int:
    from aml.data import check
    from aml.data.union import read_skip_list

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
    if options.bad:
        lines = [f"{name}\t{' '.join(reason.split())}\n" for name, reason in sorted(bad.items())]
        Path(options.bad).write_text("".join(lines), encoding="utf-8")
        print(f"wrote {options.bad}: {len(lines)} images; leave them out with data.skip={options.bad}")
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


def _convert(options: argparse.Namespace) -> int:
    from aml.data.convert import convert

    for line in convert(options.root, options.dataset, options.out):
        print(line, flush=True)
    return 0


def _stats(options: argparse.Namespace) -> int:
    from aml.data import stats
    from aml.data.union import open_dataset

    data = open_dataset(options.root, options.dataset, images=options.images)
    found = stats.collect(data)
    print(stats.table(found))
    stats.draw(found, Path(options.out), data.name)
    print(f"wrote {options.out}")
    return 0
