"""Read referring expressions in the REFER layout: RefCOCO, RefCOCO+, RefCOCOg and data written like them.

Source of the layout: Kazemzadeh et al., "ReferItGame", EMNLP 2014; Yu et al., "Modeling Context in Referring
Expressions", ECCV 2016. A data set is a pickle of refs, `refs(<split_by>).p`, beside an `instances.json` as
COCO has it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aml.data.plain_pickle import load_plain_pickle
from aml.data.segmentation import decode_segmentation

FIELDS = ("sent", "raw")


@dataclass(frozen=True)
class Expression:
    """One sentence that refers to one object (or, in data with several targets, to several or none)."""

    sample_id: str  # "<ref_id>-<sent_id>", unique in the data set
    ref_id: int
    sent_id: int
    annotation_ids: tuple[int, ...]
    image_id: int
    image_path: Path
    height: int
    width: int
    sentence: str
    split: str
    category: str  # of the first annotation, "" where there is none


class ReferDataset:
    """The annotations of one data set, read once.

    Args:
        root: folder that holds `<dataset>/` or `refer/<dataset>/`, and the images.
        dataset: folder name, for example "refcoco", "refcoco+", "refcocog".
        split_by: which `refs(<split_by>).p` to read; may be left out where there is only one.
        images: folder of the images; default `<root>/images/train2014` or `<root>/train2014`.
        field: "sent" (cleaned sentence) or "raw" (as typed). Published results use one or the other.

    An image is found by its id in `instances.json`; a ref's own `file_name` names a crop and is ignored.

    Raises:
        FileNotFoundError: a folder or file is missing; the message lists what was looked for and what is
            there.
        pickle.UnpicklingError: the refs hold anything but plain containers, text and numbers.
        ValueError: annotations contradict each other or lack a field.
    """

    def __init__(
        self,
        root: str | Path,
        dataset: str = "refcoco",
        split_by: str | None = None,
        images: str | Path | None = None,
        field: str = "sent",
    ) -> None:
        if field not in FIELDS:
            raise ValueError(f"field={field!r}: expected one of {', '.join(FIELDS)}")
        root = Path(root)
        folder = _annotation_folder(root, dataset)
        self.refs_path = _refs_file(folder, split_by)
        self.image_folder = _image_folder(root, images)
        self.field = field

        refs_bytes = self.refs_path.read_bytes()
        instances_path = folder / "instances.json"
        if not instances_path.is_file():
            raise FileNotFoundError(f"{instances_path} is missing: it belongs beside {self.refs_path.name}")
        instances_bytes = instances_path.read_bytes()
        self.fingerprint = hashlib.sha256(
            hashlib.sha256(refs_bytes).digest() + hashlib.sha256(instances_bytes).digest()
        ).hexdigest()

        self._refs = _checked_refs(load_plain_pickle(refs_bytes, str(self.refs_path)), self.refs_path)
        self._read_instances(instances_bytes, instances_path)
        self._require_unique_samples()

    def splits(self) -> list[str]:
        """Names of the splits that occur, in order of first appearance."""
        return list(dict.fromkeys(ref["split"] for ref in self._refs))

    def expressions(self, split: str) -> list[Expression]:
        """All sentences of a split: refs in file order, each with all its sentences.

        "testA", "testB" and "testC" also take refs marked for several of them ("testAB"); "test" takes every
        test split; anything else must match exactly. All as in the original REFER tool.

        Raises:
            ValueError: no ref belongs to `split`.
            FileNotFoundError: an image of the split is missing.
        """
        refs = [ref for ref in self._refs if _in_split(ref["split"], split)]
        if not refs:
            raise ValueError(
                f"split={split!r}: no refs in {self.refs_path}; its splits are {', '.join(self.splits())}"
                " ('test' selects all test splits together)"
            )
        self._require_images(refs, split)
        return [expression for ref in refs for expression in self._expressions_of(ref)]

    def mask(self, expression: Expression) -> np.ndarray:
        """The target of `expression`: uint8 [height, width] of 0 and 1, the union of its annotations.

        Polygons, compressed and uncompressed RLE, and lists of them are accepted. An annotation without area
        gives an empty mask.

        Raises:
            KeyError: the expression belongs to another data set.
            ValueError: the stored segmentation is damaged.
        """
        union = np.zeros((expression.height, expression.width), np.uint8)
        for annotation_id in expression.annotation_ids:
            if annotation_id not in self._annotations:
                raise KeyError(
                    f"annotation {annotation_id} of sample {expression.sample_id} is not in this data set"
                )
            segmentation = self._annotations[annotation_id]["segmentation"]
            try:
                union |= decode_segmentation(segmentation, expression.height, expression.width)
            except ValueError as error:
                raise ValueError(
                    f"annotation {annotation_id} of sample {expression.sample_id}: {error}"
                ) from error
        return union

    def _read_instances(self, content: bytes, path: Path) -> None:
        try:
            instances = json.loads(content)
            images = {image["id"]: image for image in instances["images"]}
            annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
            self.categories = {category["id"]: category["name"] for category in instances["categories"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a COCO instances file: {type(error).__name__}: {error}"
            ) from error
        # Only what the refs use is kept: COCO has many more objects, and worker processes copy this.
        self._images: dict[int, dict[str, Any]] = {}
        self._annotations: dict[int, dict[str, Any]] = {}
        for ref in self._refs:
            where = f"ref {ref['ref_id']} of {self.refs_path.name}"
            image_id = ref["image_id"]
            self._images[image_id] = _known(images, image_id, f"{where}: image_id", path)
            for annotation_id in ref["annotation_ids"]:
                annotation = _known(annotations, annotation_id, f"{where}: ann_id", path)
                if annotation["image_id"] != image_id:
                    raise ValueError(
                        f"{where} is on image {image_id}, but annotation {annotation_id} in {path} is on"
                        f" image {annotation['image_id']}: do refs and instances belong together?"
                    )
                self._annotations[annotation_id] = annotation

    def _require_unique_samples(self) -> None:
        seen: set[tuple[int, int]] = set()
        for ref in self._refs:
            for sentence in ref["sentences"]:
                key = (ref["ref_id"], sentence["sent_id"])
                if key in seen:
                    raise ValueError(f"{self.refs_path}: sentence {key[1]} of ref {key[0]} occurs twice")
                seen.add(key)

    def _require_images(self, refs: list[dict[str, Any]], split: str) -> None:
        present = {entry.name for entry in self.image_folder.iterdir()}
        names = sorted({self._images[ref["image_id"]]["file_name"] for ref in refs})
        missing = [name for name in names if name not in present and not (self.image_folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} images of split {split!r} are missing in {self.image_folder}"
                f" ({_some(missing)}); the folder holds {len(present)} files ({_some(sorted(present))})."
                " Complete it, or give the right folder as images="
            )

    def _expressions_of(self, ref: dict[str, Any]) -> Iterator[Expression]:
        image = self._images[ref["image_id"]]
        image_path = self.image_folder / image["file_name"]
        annotation_ids = ref["annotation_ids"]
        category = self._annotations[annotation_ids[0]]["category_id"] if annotation_ids else None
        for sentence in ref["sentences"]:
            if self.field not in sentence:
                raise ValueError(f"ref {ref['ref_id']}: sentence {sentence['sent_id']} has no {self.field!r}")
            yield Expression(
                sample_id=f"{ref['ref_id']}-{sentence['sent_id']}",
                ref_id=ref["ref_id"],
                sent_id=sentence["sent_id"],
                annotation_ids=annotation_ids,
                image_id=ref["image_id"],
                image_path=image_path,
                height=image["height"],
                width=image["width"],
                sentence=sentence[self.field],
                split=ref["split"],
                category=self.categories.get(category, ""),
            )


def _checked_refs(refs: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(refs, list) or not refs:
        raise ValueError(f"{path} holds {type(refs).__name__}, expected a list of refs that is not empty")
    return [_checked_ref(ref, f"{path}: entry {position}") for position, ref in enumerate(refs)]


def _checked_ref(ref: Any, where: str) -> dict[str, Any]:
    """The fields of a ref that are used, with known types; `ann_id` becomes a tuple `annotation_ids`."""
    if not isinstance(ref, dict):
        raise ValueError(f"{where} is {type(ref).__name__}, expected a dict")
    required = {
        "ref_id": int,
        "image_id": int,
        "ann_id": (int, list, tuple),
        "split": str,
        "sentences": (list, tuple),
    }
    _require_fields(ref, required, where)
    if not ref["sentences"]:
        raise ValueError(f"{where}: ref {ref['ref_id']} has no sentences")
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict):
            raise ValueError(f"{where}: a sentence is {type(sentence).__name__}, expected a dict")
        _require_fields(sentence, {"sent_id": int}, f"{where}: a sentence")
        _require_fields(sentence, {key: str for key in FIELDS if key in sentence}, f"{where}: a sentence")
    ids = [ref["ann_id"]] if isinstance(ref["ann_id"], int) else ref["ann_id"]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{where}: ann_id is {ids!r}, expected integers")
    annotation_ids = tuple(i for i in ids if i != -1)  # -1: a sentence without a target
    return {key: ref[key] for key in ("ref_id", "image_id", "split", "sentences")} | {
        "annotation_ids": annotation_ids
    }


def _require_fields(entry: dict[str, Any], required: dict[str, Any], where: str) -> None:
    for key, kind in required.items():
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(str, entry))}")
        if not isinstance(entry[key], kind):
            raise ValueError(f"{where}: {key} is of type {type(entry[key]).__name__}")


def _known(table: dict[int, Any], key: int, what: str, path: Path) -> Any:
    if key not in table:
        raise ValueError(f"{what} {key} is not in {path}, which has {len(table)} ({_some(table)})")
    return table[key]


def _in_split(ref_split: str, split: str) -> bool:
    if split == "test":
        return ref_split.startswith("test")
    if split in ("testA", "testB", "testC"):
        return ref_split.startswith("test") and split[-1] in ref_split
    return ref_split == split


def _annotation_folder(root: Path, dataset: str) -> Path:
    candidates = [root / dataset, root / "refer" / dataset]
    for folder in candidates:
        if folder.is_dir():
            return folder
    there = sorted(
        path.parent.name for pattern in ("*/refs(*).p", "refer/*/refs(*).p") for path in root.glob(pattern)
    )
    raise FileNotFoundError(
        f"dataset={dataset!r}: no folder {' or '.join(map(str, candidates))};"
        f" data sets under {root}: {', '.join(there) or 'none'}"
    )


def _refs_file(folder: Path, split_by: str | None) -> Path:
    there = {path.name[len("refs(") : -len(").p")]: path for path in sorted(folder.glob("refs(*).p"))}
    if not there:
        raise FileNotFoundError(f"no file refs(<split_by>).p in {folder}")
    if split_by is None and len(there) == 1:
        return next(iter(there.values()))
    if split_by not in there:
        given = "not given, and there are several" if split_by is None else repr(split_by)
        raise FileNotFoundError(f"split_by: {given}; {folder} has {', '.join(there)}")
    return there[split_by]


def _image_folder(root: Path, images: str | Path | None) -> Path:
    candidates = [Path(images)] if images is not None else [root / "images" / "train2014", root / "train2014"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no image folder {' or '.join(map(str, candidates))}; name it with images=")


def _some(names: Any, limit: int = 3) -> str:
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")
