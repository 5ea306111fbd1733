"""Small data sets in the REFER layout, written by tests."""

import json
import pickle
from pathlib import Path

from PIL import Image

SQUARE = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]


def write_refer(
    root: Path,
    refs=None,
    annotations=None,
    split_by="unc",
    dataset="refcoco",
    images="images/train2014",
    files=((3, "a.png"),),
) -> Path:
    """A data set of one 8 x 10 image with two objects, unless told otherwise. refs as bytes: those of the pickle."""
    folder, images = root / dataset, root / images
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    for _, name in files:
        Image.new("RGB", (10, 8), "navy").save(images / name)
    if annotations is None:
        annotations = [annotation(7), annotation(8)]
    instances = {
        "images": [{"id": number, "file_name": name, "height": 8, "width": 10} for number, name in files],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    refs = [ref(0, "train"), ref(1, "val")] if refs is None else refs
    (folder / f"refs({split_by}).p").write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs))
    return root


def annotation(annotation_id, segmentation=SQUARE, image_id=3):
    return {"id": annotation_id, "image_id": image_id, "category_id": 1, "iscrowd": 0, "segmentation": segmentation}


def ref(ref_id, split, **changes):
    sentences = [{"sent_id": 10 * ref_id + i, "sent": f"box {i}", "raw": f"Box {i}!"} for i in range(2)]
    entry = {"ref_id": ref_id, "ann_id": 7, "image_id": 3, "split": split, "sentences": sentences}
    return entry | {"file_name": "nowhere_7.jpg"} | changes
