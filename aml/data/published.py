"""How many refs, sentences and images the published data sets have, to tell a copy that differs.

Sources: tables of the papers and of the TensorFlow Datasets catalogue; sentences of RefCOCO+ and RefCOCOg from the
literature, checked by their sums (141 564 and 95 010). gRefCOCO: its repository distributes 259 859 of the paper's
278 232 expressions (issue 6 there). RRSIS-D: Liu et al., CVPR 2024.
"""

from typing import NamedTuple


class Counts(NamedTuple):
    """None: not published."""

    refs: int | None
    sentences: int | None
    images: int | None

    def __str__(self) -> str:
        return " / ".join("-" if count is None else str(count) for count in self)

    def agrees(self, found: "Counts") -> bool:
        return all(mine is None or mine == theirs for mine, theirs in zip(self, found, strict=True))


PUBLISHED: dict[tuple[str, str], dict[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": Counts(42404, 120624, 16994),
        "val": Counts(3811, 10834, 1500),
        "testA": Counts(1975, 5657, 750),
        "testB": Counts(1810, 5095, 750),
    },
    ("refcoco", "google"): {
        "train": Counts(40000, None, 19213),
        "val": Counts(5000, None, 4559),
        "test": Counts(5000, None, 4527),
    },
    ("refcoco+", "unc"): {
        "train": Counts(42278, 120191, 16992),
        "val": Counts(3805, 10758, 1500),
        "testA": Counts(1975, 5726, 750),
        "testB": Counts(1798, 4889, 750),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 80512, 21899),
        "val": Counts(2573, 4896, 1300),
        "test": Counts(5023, 9602, 2600),
    },
    ("refcocog", "google"): {"train": Counts(44822, 85474, 24698), "val": Counts(5000, 9536, 4650)},
}
# Of all splits together, where those of the splits are not known; any of them is right.
TOTALS: dict[tuple[str, str], tuple[Counts, ...]] = {
    ("grefcoco", "unc"): (Counts(None, 259859, None), Counts(None, 278232, None)),
    ("rrsisd", "unc"): (Counts(17402, None, None),),
}
# Partitions of objects and not of images, by design: the same photograph is in several splits.
SHARE_IMAGES = {("refcocog", "google"), ("refcoco", "google")}

COCO = "COCO's train2014.zip, 13 GB, 82783 images: http://images.cocodataset.org/zips/train2014.zip"
_REFER = "github.com/lichengunc/refer, issues 14 and 26 (copies in the Internet Archive; the original host is gone)"
SOURCES = {
    "refcoco": _REFER,
    "refcoco+": _REFER,
    "refcocog": _REFER,
    "grefcoco": "github.com/henghuiding/gRefCOCO",
    "rrsisd": "github.com/Lsan2401/RMSIN",
}


def deviations(dataset: str, split_by: str, found: dict[str, Counts]) -> list[str]:
    """What differs from the published counts, in words; nothing where they agree or none are known."""
    published = PUBLISHED.get((dataset, split_by), {})
    lines = []
    if differing := [split for split in published if split in found and not published[split].agrees(found[split])]:
        lines.append(f"the counts of {', '.join(differing)} differ")
        lines += [_explanation(dataset, split, found[split]) for split in differing]
    if absent := [split for split in published if split not in found]:
        lines.append(f"{', '.join(absent)} not there")
    if published and (others := [split for split in found if split not in published]):
        lines.append(f"{', '.join(others)} not part of it")
    if totals := TOTALS.get((dataset, split_by)):
        refs, sentences = (sum(counts[i] or 0 for counts in found.values()) for i in range(2))
        total = Counts(refs, sentences, None)
        if not any(expected.agrees(total) for expected in totals):
            known = " or ".join(map(str, totals))
            lines.append(f"all splits have {total} refs / sentences / images, published are {known}")
    return [line for line in lines if line]


def _explanation(dataset: str, split: str, found: Counts) -> str:
    """Copies are about that hold the validation sets of two partitions in one."""
    merged = [counts[split].refs or 0 for (name, _), counts in PUBLISHED.items() if name == dataset and split in counts]
    if len(merged) > 1 and found.refs == sum(merged):
        return f"its {split} refs are those of all partitions of {dataset} together, as in some copies on hubs"
    return ""
