"""Samples and batches for training and evaluation.

Everything random here is a pure function of (seed, epoch, index): no sampler or worker state exists, so a
run that is resumed, or has another number of workers, sees the same samples.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from aml.data.refer import Expression, ReferDataset

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]

# First word of each random stream's key, so that the order of an epoch and its samples are independent.
_ORDER_STREAM, _ITEM_STREAM = 0, 1
# Augmentation: at most this part of the picture is cut off at each side; colours change by this at most.
_LARGEST_CUT = 0.1
_COLOUR_RANGE = 0.2


class RISDataset(Dataset):
    """Samples of one split, as tensors a model takes.

    Training (`train=True`): one item per referred object; its sentence and augmentation are drawn by
    (seed, epoch, index). The key of an item is the pair (epoch, index), which `EpochBatches` yields.
    Evaluation (`train=False`): one item per sentence, never augmented; the key is an int.

    An item is a dict:
        image: float32 [3, S, S], squash-resized (bilinear with antialiasing), normalised by `mean` and `std`
        tokens: int64 [L];  text_mask: bool [L], True for attended tokens: both as `tokenize` gives them
        target: uint8 [S, S] of 0 and 1, resized by nearest neighbour
        index: int;  sample_id: str
        full_target: uint8 [H, W] at the photo's own size (evaluation only)

    Args:
        refer: the annotations.
        split: as in `ReferDataset.expressions`.
        image_size: S.
        tokenize: list of N sentences -> (tokens int64 [N, L], text_mask bool [N, L]), usually
            `model.tokenize`. Called once here, so that worker processes need no tokenizer.
        mean, std: of the model's images, per channel, for values in [0, 1].
        train: one item per object (True) or per sentence (False).
        seed: of sentence choice and augmentation, not negative.
        augment: mild crop and colour jitter in training; never mirrored, as sentences say left and right.

    Raises (on reading an item):
        OSError: the image is missing or damaged; the message names file and sample.
        ValueError: image and annotations disagree in size.
    """

    def __init__(
        self,
        refer: ReferDataset,
        split: str,
        *,
        image_size: int,
        tokenize: Tokenize,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: expected at least 1")
        self.refer, self.split, self.image_size, self.train = refer, split, image_size, train
        self.seed, self.augment = _checked_seed(seed), augment
        self.expressions = refer.expressions(split)
        self._tokens, self._text_mask = _tokenized(tokenize, [e.sentence for e in self.expressions])
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={mean}, std={std}: expected three numbers each, std above 0")
        self._mean = np.asarray(mean, np.float32).reshape(3, 1, 1)
        self._std = np.asarray(std, np.float32).reshape(3, 1, 1)
        positions = range(len(self.expressions))
        self._sentences_of_item = self._positions_by_ref() if train else [[i] for i in positions]
        self._last_photo: tuple[Any, ...] = (None,)

    def __len__(self) -> int:
        return len(self._sentences_of_item)

    @property
    def sample_ids(self) -> list[str]:
        """Ids of all sentences of the split, in order; in evaluation one per item."""
        return [expression.sample_id for expression in self.expressions]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) that changes with annotations, split, sentences and their order."""
        digest = hashlib.sha256(f"{self.refer.fingerprint}\n{self.split}\n{self.train}\n".encode())
        for expression in self.expressions:
            digest.update(f"{expression.sample_id}\t{expression.sentence}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self._training_item(key) if self.train else self._evaluation_item(key)

    def _training_item(self, key: Any) -> dict[str, Any]:
        if not isinstance(key, tuple) or len(key) != 2:
            raise TypeError(f"key={key!r}: a training set is indexed by (epoch, index); see EpochBatches")
        epoch, index = key
        sentences = self._sentences_of_item[index]
        rng = _generator(self.seed, _ITEM_STREAM, epoch, index)
        position = sentences[rng.integers(len(sentences))]
        expression = self.expressions[position]
        image = self._open_image(expression)
        mask = self.refer.mask(expression)
        box = _crop_around(mask, rng) if self.augment else (0, 0, image.width, image.height)
        pixels = _resized_image(image, box, self.image_size)
        if self.augment:
            pixels = _jitter_colours(pixels, rng)
        return {
            "image": torch.from_numpy((pixels - self._mean) / self._std),
            "target": torch.from_numpy(_resized_mask(mask, box, self.image_size)),
            **self._labels(position, index),
        }

    def _evaluation_item(self, key: Any) -> dict[str, Any]:
        if not isinstance(key, int) or not 0 <= key < len(self):
            raise IndexError(f"key={key!r}: this evaluation set is indexed by 0 to {len(self) - 1}")
        expression = self.expressions[key]
        # The sentences of one object follow each other: its picture is read once, three times as fast in all.
        if self._last_photo[0] != expression.ref_id:
            image = self._open_image(expression)
            mask = self.refer.mask(expression)
            box = (0, 0, image.width, image.height)
            pixels = (_resized_image(image, box, self.image_size) - self._mean) / self._std
            self._last_photo = (expression.ref_id, pixels, _resized_mask(mask, box, self.image_size), mask)
        photo = {
            name: torch.from_numpy(array.copy())
            for name, array in zip(("image", "target", "full_target"), self._last_photo[1:], strict=True)
        }
        return photo | self._labels(key, key)

    def _labels(self, position: int, index: int) -> dict[str, Any]:
        return {
            "tokens": self._tokens[position],
            "text_mask": self._text_mask[position],
            "index": index,
            "sample_id": self.expressions[position].sample_id,
        }

    def _open_image(self, expression: Expression) -> Image.Image:
        where = f"sample {expression.sample_id}: image {expression.image_path}"
        try:
            with Image.open(expression.image_path) as file:
                image = file.convert("RGB")
        except Exception as error:  # decoders raise many types for damaged files
            raise OSError(f"{where} was not read ({error}); get the file again") from error
        if image.size != (expression.width, expression.height):
            raise ValueError(
                f"{where} is {image.width} x {image.height}, its annotations say {expression.width} x"
                f" {expression.height}: use the images that the annotations were made on"
            )
        return image

    def _positions_by_ref(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for position, expression in enumerate(self.expressions):
            groups.setdefault(expression.ref_id, []).append(position)
        return list(groups.values())


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of samples: tensors stacked, `index` as int64 [B]; `sample_id` and `full_target` stay lists."""
    batch: dict[str, Any] = {
        name: torch.stack([item[name] for item in items])
        for name in ("image", "tokens", "text_mask", "target")
    }
    batch["index"] = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    for name in ("sample_id", "full_target"):
        if name in items[0]:
            batch[name] = [item[name] for item in items]
    return batch


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of one epoch for one process: lists of (epoch, index), for `DataLoader(batch_sampler=...)`.

    A pure function of its arguments. All ranks see the same permutation and take disjoint parts of each
    global batch of `batch_size * world` samples; what does not fill a global batch is dropped, so every rank
    has as many batches.

    Args:
        length: number of items of the data set.
        batch_size: per process.
        seed, epoch: they fix the order.
        rank, world: this process and the number of processes.
        start: batches of this epoch that are already done (resume); `len()` counts the remaining ones.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}: expected 0 <= rank < world")
        if length < batch_size * world:
            raise ValueError(
                f"length={length}: fewer items than one batch of {batch_size} on each of {world} process(es);"
                " lower batch_size"
            )
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: expected 0 or more")
        self._batches = length // (batch_size * world)
        if not 0 <= start <= self._batches:
            raise ValueError(f"start={start}: expected 0 to {self._batches}, the batches of an epoch")
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, _checked_seed(seed), epoch
        self.rank, self.world, self.start = rank, world, start

    def __len__(self) -> int:
        return self._batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = _generator(self.seed, _ORDER_STREAM, self.epoch).permutation(self.length).tolist()
        for batch in range(self.start, self._batches):
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed={seed}: expected 0 or more")
    return seed


def _tokenized(tokenize: Tokenize, sentences: list[str]) -> tuple[Tensor, Tensor]:
    tokens, text_mask = tokenize(sentences)
    count = len(sentences)
    if tokens.dtype != torch.int64 or text_mask.dtype != torch.bool or tokens.shape != text_mask.shape:
        raise ValueError(
            "tokenize: expected (tokens int64, text_mask bool) of one shape, got "
            f"{tokens.dtype} {list(tokens.shape)} and {text_mask.dtype} {list(text_mask.shape)}"
        )
    if tokens.ndim != 2 or len(tokens) != count:
        raise ValueError(f"tokenize: expected [{count}, L] for {count} sentences, got {list(tokens.shape)}")
    return tokens, text_mask


def _crop_around(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Random box (left, top, right, bottom) that cuts a little off each side, but never into the target."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        columns, rows = np.arange(width), np.arange(height)
    left, right = rng.uniform(0, _LARGEST_CUT * width, 2).astype(int)
    top, bottom = rng.uniform(0, _LARGEST_CUT * height, 2).astype(int)
    return (
        min(left, columns[0]),
        min(top, rows[0]),
        max(width - right, columns[-1] + 1),
        max(height - bottom, rows[-1] + 1),
    )


def _jitter_colours(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation of float32 [3, S, S] in [0, 1]; the hue stays."""
    brightness, contrast, saturation = rng.uniform(1 - _COLOUR_RANGE, 1 + _COLOUR_RANGE, 3).astype(np.float32)
    pixels = pixels * (brightness * contrast) + pixels.mean() * brightness * (1 - contrast)
    pixels = pixels * saturation + pixels.mean(axis=0) * (1 - saturation)
    return np.clip(pixels, 0, 1)


def _resized_image(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The box of an image, squashed to float32 [3, size, size] in [0, 1]."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)


def _resized_mask(mask: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The box of a mask at [size, size]; output i takes input floor((i + 0.5) * length / size)."""
    left, top, right, bottom = box
    steps = 2 * np.arange(size) + 1
    rows = top + steps * (bottom - top) // (2 * size)
    columns = left + steps * (right - left) // (2 * size)
    return mask[np.ix_(rows, columns)]
