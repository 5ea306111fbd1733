"""COCO segmentations (polygons, run lengths) to masks.

Source of the formats: Lin et al., "Microsoft COCO", ECCV 2014, and its `pycocotools`, which does the
rasterising. pycocotools trusts its input: run lengths that do not add up give a mask of uninitialised
memory, so all input is checked here first.
"""

from itertools import accumulate
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Beyond this a polygon coordinate is damage, and rasterising it would need unbounded memory.
_LARGEST_COORDINATE = 1e5


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Mask of a COCO segmentation, uint8 [height, width] of 0 and 1: the union of its parts.

    Args:
        segmentation: a run-length dict, compressed or not, or a list of polygons `[x0, y0, x1, y1, ...]` and
            run-length dicts. An empty list, and polygons of less than three points, cover nothing.

    Raises:
        ValueError: the segmentation is damaged or belongs to an image of another size.
    """
    merged = _merged(segmentation, height, width)
    return np.zeros((height, width), np.uint8) if merged is None else np.ascontiguousarray(coco_mask.decode(merged))


def segmentation_area(segmentation: Any, height: int, width: int) -> int:
    """Pixels of the mask that `decode_segmentation` would make, in a fraction of its time."""
    merged = _merged(segmentation, height, width)
    return 0 if merged is None else int(coco_mask.area(merged))


def _merged(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """The union of all parts, as trusted run lengths; None where it is empty."""
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        raise ValueError(f"segmentation is {type(parts).__name__}, expected polygons or run lengths (RLE)")
    rles: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, dict):
            rles.append(_checked_rle(part, height, width))
        elif len(polygon := _checked_polygon(part)) >= 6:
            rles += coco_mask.frPyObjects([polygon], height, width)
    return coco_mask.merge(rles) if rles else None


def _checked_polygon(part: Any) -> list[float]:
    try:
        polygon = np.asarray(part, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"polygon is not a list of numbers: {error}") from error
    if polygon.ndim != 1 or polygon.size % 2 or not (np.abs(polygon) < _LARGEST_COORDINATE).all():
        raise ValueError("polygon is not a list x0, y0, x1, y1, ... of finite coordinates")
    return polygon.tolist()


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(
            f"RLE size is {size}, expected [{height}, {width}], the height and width of the image"
        )
    if isinstance(counts, (str, bytes)):
        counts = _run_lengths(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("RLE counts are not a list of run lengths or their compressed text")
    if sum(counts) != height * width:
        raise ValueError(f"RLE counts add up to {sum(counts)} pixels, the image has {height * width}")
    return coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)


def _run_lengths(compressed: bytes) -> list[int]:
    """Undo COCO's compression: 5 bits a character, low bits first; from the fourth run on, the difference to
    the run two places before."""
    numbers, value, shift = [], 0, 0
    for character in compressed:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"RLE counts hold the byte {character}, which is no COCO run-length character")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            numbers.append(value - (1 << shift) if bits & 0x10 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("RLE counts end in the middle of a number")
    # The first run stands alone; runs 1, 3, 5, ... and 2, 4, 6, ... are two running sums.
    lengths = numbers[:]
    lengths[1::2] = accumulate(numbers[1::2])
    lengths[2::2] = accumulate(numbers[2::2])
    return lengths
