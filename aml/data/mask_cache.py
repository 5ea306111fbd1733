"""Masks that were decoded once, kept small: the box around the target, a bit per pixel, compressed.

A mask of a photograph so takes about a kilobyte instead of 300, and comes back several times faster than it is made of
polygons. The cache is per process: each worker of a data loader has its own, which starts empty.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

_OVERHEAD = 600  # bytes of an entry's Python objects, about


class MaskCache:
    """The masks used last, at most `limit` bytes of them; 0 keeps nothing."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit={limit}: expected bytes, 0 or more")
        self.limit, self.size = limit, 0
        self._packed: OrderedDict[Hashable, tuple[Any, ...]] = OrderedDict()

    def get(self, key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask of `key`, uint8 of 0 and 1, made by `decode` where it is not at hand. The caller may change it."""
        if (packed := self._packed.get(key)) is not None:
            self._packed.move_to_end(key)
            return _unpacked(*packed)
        mask = decode()
        packed = _packed(mask)
        self._packed[key] = packed
        self.size += _size(packed)
        while self.size > self.limit:
            self.size -= _size(self._packed.popitem(last=False)[1])
        return mask

    def __len__(self) -> int:
        return len(self._packed)

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process starts empty."""
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]


def _packed(mask: np.ndarray) -> tuple[Any, ...]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask.shape, (0, 0, 0, 0), b""
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    bits = np.packbits(mask[top:bottom, left:right])
    return mask.shape, (top, bottom, left, right), zlib.compress(bits.tobytes(), 1)


def _unpacked(shape: tuple[int, int], box: tuple[int, int, int, int], content: bytes) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    top, bottom, left, right = box
    if content:
        bits = np.frombuffer(zlib.decompress(content), np.uint8)
        height, width = bottom - top, right - left
        mask[top:bottom, left:right] = np.unpackbits(bits, count=height * width).reshape(height, width)
    return mask


def _size(packed: tuple[Any, ...]) -> int:
    return len(packed[2]) + _OVERHEAD
