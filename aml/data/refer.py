"""Read referring expressions in the REFER layout: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, RRSIS-D and data like them.

Sources: Kazemzadeh et al., "ReferItGame", EMNLP 2014; Yu et al., "Modeling Context in Referring Expressions", ECCV
2016; Mao et al., CVPR 2016 (RefCOCOg); Liu et al., "GRES", CVPR 2023 (gRefCOCO); Liu et al., "Rotated Multi-Scale
Interaction Network", CVPR 2024 (RRSIS-D).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aml.data import layout, refs
from aml.data.layout import some
from aml.data.mask_cache import MaskCache
from aml.data.segmentation import decode_segmentation, segmentation_area

_IMAGE_FIELDS = {"file_name": str, "height": int, "width": int}
_ANNOTATION_FIELDS = {"image_id": int, "category_id": int}
MASK_CACHE_BYTES = 64 * 2**20  # per process; holds the masks of 40 000 photographs


@dataclass(frozen=True, slots=True)
class Expression:
    """One sentence that refers to one object, or (gRefCOCO) to several or none."""

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

    @property
    def ref_key(self) -> str:
        """What the sentences of one ref have in common; unlike `ref_id` also unique in a union of data sets."""
        return self.sample_id.rpartition("-")[0]


class ReferDataset:
    """The annotations of one data set, read once.

    Args:
        root: folder that holds `<dataset>/` or `refer/<dataset>/`, and the images: see `aml.data.layout`.
        dataset: folder name, for example "refcoco", "refcoco+", "refcocog", "grefcoco", "rrsisd".
        split_by: which refs to read, "unc", "umd" or "google"; None: the only ones there, or of several those that
            `aml.data.layout.USUAL_PARTITION` names.
        images: folder of the images; default: where `aml.data.layout` expects them.
        field: "sent" (cleaned sentence) or "raw" (as typed). Published results use one or the other.
        skip: file names of images that are left out, with all refs on them; `skipped` counts these refs.
            `unknown_skips` are the names that no image of a ref has.

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
        skip: Collection[str] = (),
    ) -> None:
        if field not in refs.FIELDS:
            raise ValueError(f"field={field!r}: expected one of {', '.join(refs.FIELDS)}")
        root = Path(root)
        folder = layout.annotation_folder(root, dataset)
        self.dataset, self.field = dataset, field
        self.split_by, self.refs_path = layout.refs_file(folder, split_by)
        self.image_folder = layout.image_folder(root, dataset, images)
        self.masks = MaskCache(MASK_CACHE_BYTES)

        instances_path = folder / "instances.json"
        if not instances_path.is_file():
            raise FileNotFoundError(f"{instances_path} is missing: it belongs beside {self.refs_path.name}")
        instances = instances_path.read_bytes()
        self._refs = refs.read_refs(self.refs_path)
        self._read_instances(instances, instances_path)
        self.unknown_skips = set(skip) - {image["file_name"] for image in self._images.values()}
        self.skipped = self._skip(frozenset(skip))
        self.fingerprint = hashlib.sha256(refs.digest(self._refs) + hashlib.sha256(instances).digest()).hexdigest()

    @property
    def name(self) -> str:
        """As `aml.data.union.open_dataset` takes it: "refcoco(unc)"."""
        return f"{self.dataset}({self.split_by})"

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
        chosen = [ref for ref in self._refs if refs.in_split(ref["split"], split)]
        if not chosen:
            raise ValueError(
                f"split={split!r}: no refs in {self.refs_path}; its splits are {', '.join(self.splits())}"
                " ('test' selects all test splits together)"
            )
        self._require_images(chosen, split)
        return [expression for ref in chosen for expression in self._expressions_of(ref)]

    def all_expressions(self) -> list[Expression]:
        """The sentences of all splits, in file order, whether or not their images are there."""
        return [expression for ref in self._refs for expression in self._expressions_of(ref)]

    def image_keys(self, image_id: int) -> tuple[Hashable, Hashable]:
        """By which an image is recognised in another data set: its file, or its COCO number in the same folder."""
        return (self.image_folder, self._images[image_id]["file_name"]), (self.image_folder, image_id)

    def images_of(self, split: str) -> set[tuple[Hashable, Hashable]]:
        """`image_keys` of the images of a split, as in `expressions`, whether or not they are there."""
        return {self.image_keys(ref["image_id"]) for ref in self._refs if refs.in_split(ref["split"], split)}

    def training_images(self) -> set[int]:
        """Ids of the images of split "train"."""
        return {ref["image_id"] for ref in self._refs if ref["split"] == "train"}

    def held_out_images(self) -> set[Hashable]:
        """Keys of the images of all splits but "train"."""
        images = {ref["image_id"] for ref in self._refs if ref["split"] != "train"}
        return {key for image_id in images for key in self.image_keys(image_id)}

    def mask(self, expression: Expression) -> np.ndarray:
        """The target of `expression`: uint8 [height, width] of 0 and 1, the union of its annotations.

        Polygons, compressed and uncompressed RLE, and lists of them are accepted. A sentence without a target and an
        annotation without area give an empty mask.

        Raises:
            KeyError: the expression belongs to another data set.
            ValueError: the stored segmentation is damaged.
        """
        return self.masks.get((expression.image_id, expression.annotation_ids), lambda: self.decode_mask(expression))

    def decode_mask(self, expression: Expression) -> np.ndarray:
        """As `mask`, but always made from the annotations."""
        union = np.zeros((expression.height, expression.width), np.uint8)
        for decoded in self._decoded(expression, decode_segmentation):
            union |= decoded
        return union

    def area(self, expression: Expression) -> int:
        """Pixels of the target, in a fraction of the time of `mask`; what annotations share counts twice."""
        return sum(self._decoded(expression, segmentation_area))

    def _decoded(self, expression: Expression, decode: Callable[[Any, int, int], Any]) -> Iterator[Any]:
        for annotation_id in expression.annotation_ids:
            where = f"annotation {annotation_id} of sample {expression.sample_id}"
            if annotation_id not in self._annotations:
                raise KeyError(f"{where} is not in this data set")
            try:
                yield decode(self._annotations[annotation_id].get("segmentation"), expression.height, expression.width)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    def _read_instances(self, content: bytes, path: Path) -> None:
        try:
            instances = json.loads(content)
            images = _by_id(instances["images"], _IMAGE_FIELDS)
            annotations = _by_id(instances["annotations"], (*_ANNOTATION_FIELDS, "segmentation"))
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
            if image_id not in self._images:
                image = _known(images, image_id, f"{where}: image_id", path)
                refs.require_fields(image, _IMAGE_FIELDS, f"{path}: image {image_id}")
                self._images[image_id] = image
            for annotation_id in ref["annotation_ids"]:
                annotation = _known(annotations, annotation_id, f"{where}: ann_id", path)
                refs.require_fields(annotation, _ANNOTATION_FIELDS, f"{path}: annotation {annotation_id}")
                if annotation["image_id"] != image_id:
                    raise ValueError(
                        f"{where} is on image {image_id}, but annotation {annotation_id} in {path} is on"
                        f" image {annotation['image_id']}: do refs and instances belong together?"
                    )
                self._annotations[annotation_id] = annotation

    def _skip(self, names: frozenset[str]) -> int:
        """Drop the refs on these images; returns how many there were."""
        kept = [ref for ref in self._refs if self._images[ref["image_id"]]["file_name"] not in names]
        if not kept:
            raise ValueError(f"{self.refs_path}: skip names all of its images; was the right list given?")
        dropped = len(self._refs) - len(kept)
        self._refs = kept
        return dropped

    def _require_images(self, chosen: list[dict[str, Any]], split: str) -> None:
        present = {entry.name for entry in self.image_folder.iterdir()}
        names = sorted({self._images[ref["image_id"]]["file_name"] for ref in chosen})
        missing = [name for name in names if name not in present and not (self.image_folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} images of split {split!r} are missing in {self.image_folder}"
                f" ({some(missing)}); the folder holds {len(present)} files ({some(sorted(present))})."
                " Complete it, or give the right folder as images=;  aml data check  names them all"
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


def _by_id(entries: list[dict[str, Any]], used: Iterable[str]) -> dict[int, dict[str, Any] | None]:
    """Entries by their ids; None where several with one id differ in a field that is used."""
    found: dict[int, dict[str, Any] | None] = {}
    for entry in entries:
        first = found.setdefault(entry["id"], entry)
        if first is not None and first is not entry and any(first.get(key) != entry.get(key) for key in used):
            found[entry["id"]] = None
    return found


def _known(table: Mapping[int, dict[str, Any] | None], key: int, what: str, path: Path) -> dict[str, Any]:
    if key not in table:
        raise ValueError(f"{what} {key} is not in {path}, which has {len(table)} ({some(table)})")
    entry = table[key]
    if entry is None:
        raise ValueError(f"{what} {key} is given to entries of {path} that differ: give each an id of its own")
    return entry
