"""Evaluations on the disk: metrics, one record per sentence, and what they are of.

    <run>/evaluations/step-00000123/refcoco-unc-val.json         of a checkpoint of a run
    <converted checkpoint>/evaluations/refcoco-unc-val.json      of any other
                                      /refcoco-unc-val.csv       the records, for a spreadsheet

Needs no torch, so `aml compare` starts at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from aml.files import finite, write_whole
from aml.metrics import iou

FORMAT = 1
# By which an evaluation of an earlier call is known to be of the same model and data.
_SAME = ("weights", "fingerprint", "field", "image_size", "resize", "perturb")
Evaluation = dict[str, Any]


def folder_of(checkpoint: Path) -> Path:
    """Where the evaluations of a checkpoint lie; not in its own folder, which goes when newer ones come."""
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "evaluations" / checkpoint.name
    return checkpoint / "evaluations"


def name_of(dataset: str, split: str, perturb: Any = None) -> str:
    """File name without suffix: "refcoco-unc-val", "refcoco-unc-val-noise-3"."""
    parts = [re.sub(r"[^\w+]+", "-", dataset).strip("-"), split, *(perturb or ())]
    return "-".join(str(part) for part in parts)


def save(folder: Path, evaluation: Evaluation, name: str | None = None) -> tuple[Path, Path]:
    """Write an evaluation as JSON, a record per line, and its records as CSV; returns both paths."""
    name = name or name_of(evaluation["dataset"], evaluation["split"], evaluation["perturb"])
    head = {"aml_evaluation": FORMAT} | {key: value for key, value in evaluation.items() if key != "records"}
    records = ",\n".join(json.dumps(finite(record)) for record in evaluation["records"])
    text = json.dumps(finite(head), indent=1).removesuffix("\n}") + f',\n "records": [\n{records}\n]}}\n'
    paths = folder / f"{name}.json", folder / f"{name}.csv"
    write_whole(paths[1], _csv(evaluation["records"]))
    write_whole(paths[0], text)
    return paths


def _csv(records: list[dict[str, Any]]) -> str:
    rows = [{**record, "IoU": iou(record), "full_IoU": iou(record, "full_")} for record in records]
    first = ["sample_id", "image", "sentence", "no_target", "IoU", "full_IoU"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *(name for name in rows[0] if name not in first)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def load(path: Path) -> Evaluation:
    """Raises ValueError, naming the file, where it is no evaluation of this format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("aml_evaluation") != FORMAT:
        raise ValueError(f"{path} is no evaluation of format {FORMAT}: make it anew by  aml eval")
    return value


def differences(found: Evaluation, identity: dict[str, Any]) -> dict[str, str]:
    """By name, in what an evaluation is of another model or data than `identity` (of `Trained`)."""
    changed = [name for name in _SAME if found[name] != identity[name]]
    return {name: f"{name}: {found[name]} instead of {identity[name]}" for name in changed}


def require_replaceable(path: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError where a file holds an evaluation of the same weights on other data or with other settings."""
    try:
        changed = differences(load(path), identity)
    except (OSError, ValueError, KeyError):  # there is none, or none that this version reads
        return
    if changed and "weights" not in changed:
        lines = [f"  {line}" for line in changed.values()]
        raise ValueError("\n".join([f"{path} is of other data or settings; give another --out", *lines]))


def weights_of(checkpoint: Path) -> str | None:
    """SHA-256 over the weights of a complete checkpoint; None where there is none (any more)."""
    try:
        files = json.loads((checkpoint / "COMPLETE").read_text(encoding="utf-8"))["files"]
        digests = [f"{name} {each['sha256']}" for name, each in sorted(files.items()) if name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read(path: Path, split: str) -> Evaluation:
    """What `find` finds. Raises ValueError, too, where the checkpoint has other weights by now."""
    file = find(path, split)
    evaluation = load(file)
    if not path.is_file():
        checkpoint = _checkpoint_of(path)
        if weights_of(checkpoint) not in (None, evaluation.get("weights")):
            raise ValueError(
                f"{file} is of other weights than {checkpoint}; make it anew: "
                f"aml eval --checkpoint {path} --split {split}"
            )
    return evaluation


def find(path: Path, split: str) -> Path:
    """The stored evaluation of a run directory, of one of its checkpoints, or of a converted checkpoint.

    Of a run, that of its best checkpoint. An evaluation's own file is returned as it is.

    Raises FileNotFoundError where there is none of this split, and ValueError where there are several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run directory or file")
    folder = folder_of(_checkpoint_of(path))
    files = sorted(folder.glob("*.json"))
    found = [file for file in files if file.stem.endswith(f"-{split}")]
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.stem for file in found or files) or "nothing"
    if found:
        raise ValueError(f"{folder} holds several evaluations of split {split!r} ({names}): give the files themselves")
    raise FileNotFoundError(
        f"no evaluation of split {split!r} in {folder}, which holds {names}; make it by\n"
        f"  aml eval --checkpoint {path} --split {split}"
    )


def _checkpoint_of(path: Path) -> Path:
    """Of a run directory its best checkpoint, or the last; else the folder itself."""
    pointers = [path / "checkpoints" / name for name in ("best", "last")]
    there = [pointer for pointer in pointers if pointer.is_file()]
    return path / "checkpoints" / there[0].read_text(encoding="utf-8").strip() if there else path
