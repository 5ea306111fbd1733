"""Where a data set's parts lie under its root.

    <root>/[refer/]<dataset>/refs(<split_by>).p       RefCOCO, RefCOCO+, RefCOCOg, RRSIS-D; or refs(<split_by>).json,
                                                      which `aml data convert` writes and which is read before it
                            /grefs(<split_by>).json   gRefCOCO
                            /instances.json           images, annotations and categories, as COCO has them
    <root>/[images/]train2014/                        COCO's images, for every split; REFER itself has them in
                                                      images/mscoco/images/train2014/
    <root>/[images/]rrsisd/JPEGImages/                RRSIS-D's images
"""

import re
from pathlib import Path
from typing import Any

COCO_IMAGES = ("images/train2014", "train2014", "images/mscoco/images/train2014")
# Read where several partitions lie side by side and none is named: what published results are mostly on.
USUAL_PARTITION = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
IMAGES = {"rrsisd": ("images/rrsisd/JPEGImages", "rrsisd/JPEGImages")}
_REFS_NAME = re.compile(r"g?refs\((?P<split_by>[^()]+)\)\.(?P<kind>json|p)")


def find_data_sets(root: Path) -> list[tuple[str, str]]:
    """(dataset, split_by) of all data sets under `root`, in the order of their names. `root` must be a folder."""
    if not root.is_dir():
        remedy = "name the folder that holds annotations and images, see docs/data.md"
        if root.exists():
            raise NotADirectoryError(f"{root} is a file: {remedy}")
        raise FileNotFoundError(f"no folder {root}: {remedy}")
    folders = [folder for parent in (root, root / "refer") if parent.is_dir() for folder in parent.iterdir()]
    found = {(folder.name, split_by) for folder in folders if folder.is_dir() for split_by in refs_files(folder)}
    return sorted(found)


def annotation_folder(root: Path, dataset: str) -> Path:
    candidates = [root / dataset, root / "refer" / dataset]
    for folder in candidates:
        if folder.is_dir():
            return folder
    there = dict.fromkeys(name for name, _ in find_data_sets(root))
    raise FileNotFoundError(
        f"dataset={dataset!r}: no folder {' or '.join(map(str, candidates))};"
        f" data sets under {root}: {', '.join(there) or 'none'}"
    )


def refs_files(folder: Path) -> dict[str, Path]:
    """Files of refs in a folder by their split_by, each the JSON one where there are both."""
    matches = {path: _REFS_NAME.fullmatch(path.name) for path in sorted(folder.iterdir())}
    found: dict[str, Path] = {}
    for path, match in matches.items():  # "refs(x).json" comes before "refs(x).p"
        if match and path.is_file():
            found.setdefault(match["split_by"], path)
    return found


def refs_file(folder: Path, split_by: str | None) -> tuple[str, Path]:
    """(split_by, path) of the refs to read; `split_by` None: the only ones there, or else the usual ones."""
    there = refs_files(folder)
    if not there:
        raise FileNotFoundError(f"no file refs(<split_by>).p, or .json, in {folder}")
    wanted = split_by
    if wanted is None:
        wanted = next(iter(there)) if len(there) == 1 else USUAL_PARTITION.get(folder.name)
    if wanted is None or wanted not in there:
        given = "not given, and there are several" if split_by is None else repr(split_by)
        names = " or ".join(f"'{folder.name}({name})'" for name in there)
        raise FileNotFoundError(f"split_by: {given}; {folder} has {', '.join(there)}: name the data set as {names}")
    return wanted, there[wanted]


def image_folder(root: Path, dataset: str, images: str | Path | None) -> Path:
    candidates = [Path(images)] if images is not None else [root / name for name in IMAGES.get(dataset, COCO_IMAGES)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no image folder {' or '.join(map(str, candidates))}; name it: data.images=DIR, for aml data --images DIR"
    )


def some(names: Any, limit: int = 3) -> str:
    """The first few of many, for messages."""
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")
