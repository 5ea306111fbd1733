"""Read the refs of a data set, from a pickle or from JSON, and check every field that is used.

A ref is one thing that is referred to, with its sentences. In gRefCOCO it is several objects, or none: such a
ref has `no_target`, or an `ann_id` that is -1, [-1], empty or null.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aml.data.plain_pickle import load_plain_pickle

FIELDS = ("sent", "raw")
CONVERTED = "aml_refs"  # key of the format's number in a file that `aml data convert` wrote
FORMAT = 1


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs of a file, checked: ref_id, image_id, split, sentences (`encodable`) and, as a tuple, annotation_ids.

    Raises:
        pickle.UnpicklingError: a pickle holds anything but plain containers, text and numbers.
        ValueError: a field is missing or of a wrong type; or the JSON file was converted from another pickle than the
            one that lies beside it.
    """
    entries = load_entries(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds {type(entries).__name__}, expected a list of refs that is not empty")
    refs = [_checked(entry, f"{path}: entry {position}") for position, entry in enumerate(entries)]
    _require_unique_samples(refs, path)
    _require_one_object_each(refs, path)
    return refs


def load_entries(path: Path) -> Any:
    """What a file of refs holds, not yet looked at."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return load_plain_pickle(content, str(path))
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; get it again, or make it by  aml data convert") from error
    if not isinstance(value, dict) or CONVERTED not in value:
        return value
    if value[CONVERTED] != FORMAT:
        raise ValueError(f"{path} is of format {value[CONVERTED]}, this version reads {FORMAT}: convert it again")
    pickled = path.with_suffix(".p")
    if pickled.is_file() and value["sha256"] != hashlib.sha256(pickled.read_bytes()).hexdigest():
        raise ValueError(
            f"{path} was converted from another {pickled.name} than the one beside it: run  aml data convert  again, or"
            " remove the one that is out of date"
        )
    return value["refs"]


def is_converted(path: Path) -> bool:
    """Whether a file is one that `aml data convert` wrote, of any format and for any pickle."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and CONVERTED in value


def digest(refs: list[dict[str, Any]]) -> bytes:
    """Of all that is used of the refs, so the same for a pickle and the JSON that was made from it."""
    used = [
        [ref["ref_id"], ref["image_id"], ref["split"], ref["annotation_ids"]]
        + [[sentence["sent_id"], *(sentence.get(field) for field in FIELDS)] for sentence in ref["sentences"]]
        for ref in refs
    ]
    return hashlib.sha256(json.dumps(used).encode()).digest()


def in_split(ref_split: str, split: str) -> bool:
    """Whether a ref marked `ref_split` belongs to `split`, by the rules of the original REFER tool."""
    if split == "test":
        return ref_split.startswith("test")
    if split in ("testA", "testB", "testC"):
        return ref_split.startswith("test") and split[-1] in ref_split
    return ref_split == split


def _checked(ref: Any, where: str) -> dict[str, Any]:
    if not isinstance(ref, dict):
        raise ValueError(f"{where} is {type(ref).__name__}, expected a dict")
    required = {
        "ref_id": int,
        "image_id": int,
        "ann_id": (int, list, tuple, type(None)),
        "split": str,
        "sentences": (list, tuple),
    }
    require_fields(ref, required, where)
    if not ref["sentences"]:
        raise ValueError(f"{where}: ref {ref['ref_id']} has no sentences")
    sentences = []
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict):
            raise ValueError(f"{where}: a sentence is {type(sentence).__name__}, expected a dict")
        texts = {key: str for key in FIELDS if key in sentence}
        require_fields(sentence, {"sent_id": int} | texts, f"{where}: a sentence")
        sentences.append({"sent_id": sentence["sent_id"]} | {key: encodable(sentence[key]) for key in texts})
    return {key: ref[key] for key in ("ref_id", "image_id", "split")} | {
        "annotation_ids": _annotation_ids(ref, where),
        "sentences": sentences,
    }


def encodable(text: str) -> str:
    """With U+FFFD in the place of each half of a surrogate pair: neither tokenizers nor files in UTF-8 take one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _annotation_ids(ref: dict[str, Any], where: str) -> tuple[int, ...]:
    given = ref["ann_id"]
    ids = [] if given is None else [given] if isinstance(given, int) else given
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{where}: ann_id is {given!r}, expected integers")
    targets = tuple(dict.fromkeys(i for i in ids if i != -1))  # -1: no target
    if ref.get("no_target") and targets:
        raise ValueError(f"{where}: ref {ref['ref_id']} is marked no_target, but has ann_id {given!r}")
    return targets


def require_fields(entry: dict[str, Any], required: Mapping[str, Any], where: str) -> None:
    """Each key must be there, with a value of its type."""
    for key, kind in required.items():
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(str, entry))}")
        if not isinstance(entry[key], kind):
            raise ValueError(f"{where}: {key} is of type {type(entry[key]).__name__}")


def _require_unique_samples(refs: list[dict[str, Any]], path: Path) -> None:
    seen: set[tuple[int, int]] = set()
    for ref in refs:
        for sentence in ref["sentences"]:
            key = (ref["ref_id"], sentence["sent_id"])
            if key in seen:
                raise ValueError(f"{path}: sentence {key[1]} of ref {key[0]} occurs twice")
            seen.add(key)


def _require_one_object_each(refs: list[dict[str, Any]], path: Path) -> None:
    """Sentences of one ref share their photograph and mask."""
    known: dict[int, tuple[int, tuple[int, ...]]] = {}
    for ref in refs:
        own = ref["image_id"], ref["annotation_ids"]
        first = known.setdefault(ref["ref_id"], own)
        if own != first:
            shown = " and ".join(f"image {image} with ann_id {list(ids)}" for image, ids in (first, own))
            raise ValueError(f"{path}: ref_id {ref['ref_id']} is given to {shown}; give each ref an id of its own")
