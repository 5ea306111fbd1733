"""Is a folder of data complete and sane? Every refs file, image and mask is looked at once.

What keeps a data set from being trained on is a failure; what makes results not comparable, or may surprise, a warning.
"""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from PIL import Image

from aml.data import layout, published, refs
from aml.data.layout import some
from aml.data.photographs import require_eight_bits
from aml.data.published import Counts
from aml.data.refer import Expression, ReferDataset

FAIL, WARN, NOTE = "FAIL", "WARN", "note"
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class Finding:
    level: str
    text: str
    remedy: str = ""


@dataclass
class Report:
    """What was found of one data set. bad: file names of images that cannot be used, with the reason."""

    dataset: str
    split_by: str
    counts: dict[str, Counts] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    data: ReferDataset | None = None

    @property
    def usable(self) -> bool:
        return not any(finding.level == FAIL for finding in self.findings)

    def add(self, level: str, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(level, text, remedy))


class Images:
    """What became of reading each image file; several data sets share them."""

    def __init__(self, decode: bool, progress: Progress) -> None:
        self.decode, self.progress = decode, progress
        self._seen: dict[Path, tuple[int, int] | str | None] = {}

    def look(self, paths: list[Path]) -> dict[Path, tuple[int, int] | str | None]:
        """Of each file its (width, height), or why it cannot be read, or None where there is none."""
        new = [path for path in dict.fromkeys(paths) if path not in self._seen]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoders let other threads run
            self._seen |= zip(new, self.progress(pool.map(self._read, new), len(new)), strict=True)
        return {path: self._seen[path] for path in paths}

    def _read(self, path: Path) -> tuple[int, int] | str | None:
        if not path.is_file():
            return None
        try:
            with Image.open(path) as file:
                size = file.size
                require_eight_bits(file)
                if self.decode:
                    file.draft("RGB", (1, 1))  # of a JPEG everything is read, and as little as possible computed
                    file.load()
            return size
        except Exception as error:  # decoders raise many types for damaged files
            return str(error) or type(error).__name__


def check(
    root: str | Path,
    dataset: str | None = None,
    split_by: str | None = None,
    *,
    images: str | Path | None = None,
    field: str = "sent",
    skip: Iterable[str] = (),
    decode: bool = True,
    progress: Progress = lambda items, _: items,
) -> Iterator[Report]:
    """Look at one data set, or at all under `root`; a report of each.

    decode: also decode every image, or a truncated one is not noticed. skip: as `ReferDataset`.

    Raises FileNotFoundError where there is no data set at all.
    """
    root = Path(root)
    names = [name for name in layout.find_data_sets(root) if dataset in (None, name[0]) and split_by in (None, name[1])]
    if not names:
        wanted = (dataset or "refcoco") + (f"({split_by})" if split_by else "")
        there = ", ".join(f"{name}({by})" for name, by in layout.find_data_sets(root)) or "none"
        raise FileNotFoundError(
            f"no data set {wanted} under {root} ({there}); expected for example"
            f" {root / (dataset or 'refcoco')}/refs({split_by or 'unc'}).p beside an instances.json,"
            f" and {root / layout.IMAGES.get(dataset or '', layout.COCO_IMAGES)[0]}/"
        )
    files = Images(decode, progress)
    for name, by in names:
        report = Report(name, by)
        try:
            _check_counts(report, root)
            report.data = ReferDataset(root, name, by, images, field, list(skip))
            _check_content(report, report.data, files)
        except (OSError, ValueError, UnpicklingError) as error:
            report.add(FAIL, str(error), f"annotations: {_source_of(report)}; images: {_image_source(report.dataset)}")
        yield report


def leaks(reports: Iterable[Report]) -> list[str]:
    """Photographs that one data set trains on and others hold out; a union leaves them out of training."""
    found = [report.data for report in reports if report.data is not None]
    held_out = {data.name: data.held_out_images() for data in found}
    lines = []
    for one in found:
        trained = one.images_of("train")
        shared = {name: sum(not keys.isdisjoint(own) for own in trained) for name, keys in held_out.items()}
        del shared[one.name]
        if any(shared.values()):
            others = ", ".join(f"{name} {count}" for name, count in shared.items() if count)
            lines.append(f"of {len(trained)} images that {one.name} trains on, others hold out: {others}")
    return lines


def _check_counts(report: Report, root: Path) -> None:
    """From the refs alone, so that it is done even where everything else is missing."""
    path = layout.refs_files(layout.annotation_folder(root, report.dataset))[report.split_by]
    found: dict[str, list[dict[str, Any]]] = {}
    for ref in refs.read_refs(path):
        found.setdefault(ref["split"], []).append(ref)
    for split, members in found.items():
        sentences = sum(len(ref["sentences"]) for ref in members)
        report.counts[split] = Counts(len(members), sentences, len({ref["image_id"] for ref in members}))
    if different := published.deviations(report.dataset, report.split_by, report.counts):
        report.add(
            WARN,
            f"this is not {report.dataset} as published: {'; '.join(different)}",
            f"fine for data of your own; to compare results, get the original: {_source_of(report)}",
        )
    if absent := [split for split in ("train", "val") if split not in found]:
        report.add(
            WARN,
            f"no split {' or '.join(absent)}; there is {', '.join(found)}",
            "aml train needs train and val; to evaluate a split that is there: aml eval --split NAME",
        )
    if path.suffix == ".p":
        command = f"aml data convert {shlex.quote(str(root))} --dataset {report.dataset}"
        report.add(NOTE, f"{path.name} is a pickle; as JSON it cannot hold code", command)


def _check_content(report: Report, data: ReferDataset, files: Images) -> None:
    expressions = data.all_expressions()
    if data.skipped:
        report.add(NOTE, f"{data.skipped} refs are left out with the images of the skip list")
    _check_images(report, data, expressions, files)
    _check_masks(report, data, expressions)
    if blank := [e.sample_id for e in expressions if not e.sentence.strip()]:
        report.add(WARN, f"{_many(blank, 'empty sentence')} ({some(blank)})")
    if damaged := [e.sample_id for e in expressions if "\ufffd" in e.sentence]:
        report.add(WARN, f"{_many(damaged, 'sentence')} with damaged characters, read as U+FFFD ({some(damaged)})")
    several = sum(len(e.annotation_ids) > 1 for e in expressions)
    none = sum(not e.annotation_ids for e in expressions)
    if several or none:
        report.add(NOTE, f"{several} sentences have several targets, {none} have none")
    if shared := data.training_images() & {e.image_id for e in expressions if e.split != "train"}:
        by_design = (data.dataset, data.split_by) in published.SHARE_IMAGES
        why = "this partition is by object, not by image" if by_design else "results on the latter will be too good"
        report.add(NOTE if by_design else WARN, f"{_many(shared, 'training image')} also in other splits: {why}")


def _check_images(report: Report, data: ReferDataset, expressions: list[Expression], files: Images) -> None:
    by_path = {e.image_path: e for e in expressions}
    missing, damaged, resized = [], [], []
    for path, found in files.look(list(by_path)).items():
        name = str(path.relative_to(data.image_folder))
        expected = by_path[path].width, by_path[path].height
        if found is None:
            missing.append(name)
            report.bad[name] = "missing"
        elif isinstance(found, str):
            damaged.append(f"{name}: {found}")
            report.bad[name] = found
        elif found != expected:
            resized.append(name)
            report.bad[name] = f"is {found[0]} x {found[1]}, the annotations say {expected[0]} x {expected[1]}"
    again = f"get them again: {_image_source(data.dataset)}"
    if missing:
        report.add(
            FAIL,
            f"{len(missing)} of {len(by_path)} images are missing in {data.image_folder} ({some(missing, 5)})",
            _other_names(data.image_folder, missing)
            or f"get {_image_source(data.dataset)}; or name the right folder with --images",
        )
    if damaged:
        report.add(FAIL, f"{_many(damaged, 'image')} cannot be read ({some(damaged, 5)})", again)
    if resized:
        report.add(
            FAIL,
            f"{_many(resized, 'image')} of another size than the annotations say ({some(resized, 5)})",
            "use the images that the annotations were made on, not resized ones",
        )


def _check_masks(report: Report, data: ReferDataset, expressions: list[Expression]) -> None:
    damaged, empty = [], []
    for _, group in groupby(expressions, key=lambda e: e.ref_key):
        expression = next(group)
        try:
            if data.area(expression) == 0 and expression.annotation_ids:
                empty.append(expression.sample_id)
        except ValueError as error:
            damaged.append(str(error))
            report.bad.setdefault(str(expression.image_path.relative_to(data.image_folder)), str(error))
    if damaged:
        report.add(FAIL, f"{_many(damaged, 'damaged mask')} ({some(damaged)})", _source_of(report))
    if empty:
        report.add(WARN, f"{_many(empty, 'ref')} with an annotation that covers no pixel ({some(empty)})")


def _many(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _other_names(folder: Path, missing: list[str]) -> str:
    """COCO 2017 has the same photographs under shorter names."""
    there = sum((folder / name.removeprefix("COCO_train2014_")).is_file() for name in missing)
    if not there or not missing[0].startswith("COCO_train2014_"):
        return ""
    return f"{there} of them are there under their names of COCO 2017: rename or link them to COCO_train2014_*"


def _image_source(dataset: str) -> str:
    coco = dataset in published.SOURCES and dataset not in layout.IMAGES
    return published.COCO if coco else published.SOURCES.get(dataset, "where you have them from")


def _source_of(report: Report) -> str:
    return published.SOURCES.get(report.dataset, "where you have them from")
