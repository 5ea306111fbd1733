"""Several data sets as one, and data sets by name.

    open_dataset(root, "refcoco")                                     one; of several partitions the usual
    open_dataset(root, "refcocog(google)")                            one partition of it
    open_dataset(root, "union")                                       refcoco(unc), refcoco+(unc), refcocog(umd)
    open_dataset(root, "refcoco(unc),refcocog(umd),refcocog(google)") any others

The data sets share photographs, and what one trains on another tests on. A union therefore trains on no image of any
validation or test split of any of its members. What is no member holds out nothing: to evaluate on RefCOCOg (google),
of whose validation images "union" has many, make it one.
"""

import hashlib
import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from aml.data.layout import USUAL_PARTITION
from aml.data.refer import Expression, ReferDataset
from aml.data.refs import in_split
from aml.files import read_text

UNION = ",".join(f"{dataset}({split_by})" for dataset, split_by in USUAL_PARTITION.items())


class Annotations(Protocol):
    """What `ReferDataset` and `UnionDataset` have in common."""

    fingerprint: str
    skipped: int
    unknown_skips: set[str]

    @property
    def name(self) -> str: ...

    def splits(self) -> list[str]: ...

    def expressions(self, split: str) -> list[Expression]: ...

    def images_of(self, split: str) -> set[tuple[Hashable, Hashable]]: ...

    def mask(self, expression: Expression) -> np.ndarray: ...


class UnionDataset:
    """The sentences of all members. Sample ids start with the member's name: "refcoco(unc)/17-54".

    Split "train" is that of all members without the images of their other splits. A sentence of RefCOCOg that both of
    its partitions train on is taken once. Any other split is the members' own, put together.
    """

    def __init__(self, members: Sequence[ReferDataset]) -> None:
        self.members = {member.name: member for member in members}
        if len(self.members) < len(members):
            raise ValueError(f"a union of {', '.join(m.name for m in members)}: each may be given once")
        self.skipped = sum(member.skipped for member in members)
        self.unknown_skips = set.intersection(*(member.unknown_skips for member in members))
        parts = "\n".join(f"{name} {member.fingerprint}" for name, member in self.members.items())
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()

    @property
    def name(self) -> str:
        return ",".join(self.members)

    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for member in self.members.values() for split in member.splits()))

    def expressions(self, split: str) -> list[Expression]:
        """As `ReferDataset.expressions`; members without this split contribute nothing to it."""
        found = {
            name: member.expressions(split)
            for name, member in self.members.items()
            if any(in_split(own, split) for own in member.splits())
        }
        if not found:
            raise ValueError(f"split={split!r}: none of {self.name} has it; their splits: {', '.join(self.splits())}")
        if split == "train":
            found = self._without_held_out(found)
        return [
            replace(expression, sample_id=f"{name}/{expression.sample_id}")
            for name, expressions in found.items()
            for expression in expressions
        ]

    def images_of(self, split: str) -> set[tuple[Hashable, Hashable]]:
        return {self._member(expression).image_keys(expression.image_id) for expression in self.expressions(split)}

    def mask(self, expression: Expression) -> np.ndarray:
        return self._member(expression).mask(expression)

    def _member(self, expression: Expression) -> ReferDataset:
        return self.members[expression.sample_id.rpartition("/")[0]]  # a name may hold a slash

    def _without_held_out(self, found: dict[str, list[Expression]]) -> dict[str, list[Expression]]:
        held_out = set[Hashable]().union(*(member.held_out_images() for member in self.members.values()))
        free: dict[str, list[Expression]] = {}
        taken: set[Hashable] = set()
        for name, expressions in found.items():
            member = self.members[name]
            usable = {i for i in {e.image_id for e in expressions} if held_out.isdisjoint(member.image_keys(i))}
            keys = {e.sample_id: (member.dataset, e.image_id, e.annotation_ids, e.sentence) for e in expressions}
            free[name] = [e for e in expressions if e.image_id in usable and keys[e.sample_id] not in taken]
            taken |= set(keys.values())
        if not any(free.values()):
            raise ValueError(f"split='train': every training image of {self.name} is in a validation or test split too")
        return free


def open_dataset(
    root: str | Path,
    dataset: str = "refcoco",
    split_by: str | None = None,
    images: str | Path | None = None,
    field: str = "sent",
    skip: Collection[str] = (),
) -> ReferDataset | UnionDataset:
    """A data set by its name, or a union of several; see the top of this file and `ReferDataset`."""
    words = (UNION if dataset == "union" else dataset).split(",")
    parts = [_parsed(word.strip(), dataset) for word in words]
    if len(parts) == 1:
        name, own = parts[0]
        if own and split_by and own != split_by:
            raise ValueError(f"dataset={dataset!r} says {own}, split_by says {split_by}")
        return ReferDataset(root, name, own or split_by, images, field, skip)
    if split_by:
        raise ValueError(f"split_by={split_by!r}: for several data sets it is part of the name, as in {UNION}")
    return UnionDataset([ReferDataset(root, name, own, images, field, skip) for name, own in parts])


def shared_images(trained: Annotations, evaluated: Annotations, split: str) -> tuple[int, int]:
    """How many images of `split` of `evaluated` are in the training split of `trained`, and how many it has."""
    known = {key for keys in trained.images_of("train") for key in keys}
    images = evaluated.images_of(split)
    return sum(not known.isdisjoint(keys) for keys in images), len(images)


def read_skip_list(path: str | Path) -> list[str]:
    """Image names from a list that `aml data check --bad` wrote: one a line, what follows a tab is the reason."""
    lines = read_text(path, "list of images (data.skip, --skip)").removeprefix("\ufeff").splitlines()
    return [line.partition("\t")[0].strip() for line in lines if line.strip()]


def _parsed(word: str, dataset: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"([^()\s]+)(?:\(([^()\s]+)\))?", word)
    if not match:
        raise ValueError(f"dataset={dataset!r}: {word!r} is not of the form name or name(split_by), as in {UNION}")
    return match[1], match[2]
