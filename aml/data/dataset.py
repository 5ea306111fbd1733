"""Samples and batches for training and evaluation.

Everything random here is a pure function of (seed, epoch, index): no sampler or worker state exists, so a
run that is resumed, or has another number of workers, sees the same samples.
"""

import copy
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from aml.data.photographs import to_rgb
from aml.data.pixels import RESIZES, Box, crop_around, jitter_colours, padded, place, resized_image, resized_mask
from aml.data.refer import Expression
from aml.data.union import Annotations
from aml.perturbations import perturbed

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]

# First word of each random stream's key, so that the order of an epoch and its samples are independent.
_ORDER_STREAM, _ITEM_STREAM = 0, 1


class RISDataset(Dataset):
    """Samples of one split, as tensors a model takes.

    Training (`train=True`): one item per referred object; its sentence and augmentation are drawn by
    (seed, epoch, index). The key of an item is the pair (epoch, index), which `EpochBatches` yields.
    Evaluation (`train=False`): one item per sentence, never augmented; the key is an int.

    An item is a dict:
        image: float32 [3, S, S], resized (bilinear with antialiasing), normalised by `mean` and `std`; padding is 0
        tokens: int64 [L];  text_mask: bool [L], True for attended tokens: both as `tokenize` gives them
        target: uint8 [S, S] of 0 and 1, resized by nearest neighbour; all 0 for a sentence without a target
        valid: bool [S, S], False where there is padding (letterbox only): `valid` of `aml_kernels.masked_loss`, and
            through `aml.data.pixels.valid_cells` its `map_valid`
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
        resize: "squash" to S x S, as published results do, or "letterbox", which keeps the picture's shape.

    Raises (on reading an item):
        OSError: the image is missing or damaged; the message names file and sample.
        ValueError: image and annotations disagree in size.
    """

    def __init__(
        self,
        refer: Annotations,
        split: str,
        *,
        image_size: int,
        tokenize: Tokenize,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool,
        seed: int = 0,
        augment: bool = True,
        resize: str = "squash",
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: expected at least 1")
        if resize not in RESIZES:
            raise ValueError(f"resize={resize!r}: expected one of {', '.join(RESIZES)}")
        self.refer, self.split, self.image_size, self.train = refer, split, image_size, train
        self.seed, self.augment, self.resize = _checked_seed(seed), augment, resize
        self.expressions = refer.expressions(split)
        self._tokens, self._text_mask = _tokenized(tokenize, [e.sentence for e in self.expressions])
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={mean}, std={std}: expected three numbers each, std above 0")
        self._mean = np.asarray(mean, np.float32).reshape(3, 1, 1)
        self._std = np.asarray(std, np.float32).reshape(3, 1, 1)
        positions = range(len(self.expressions))
        self._sentences_of_item = self._positions_by_ref() if train else [[i] for i in positions]
        self.perturb: tuple[str, int] | None = None
        self._last_photo: tuple[Any, ...] = (None,)

    def __len__(self) -> int:
        return len(self._sentences_of_item)

    def disturbed(self, perturb: tuple[str, int] | None) -> "RISDataset":
        """The same sentences about disturbed photographs; evaluation only.

        perturb: (kind, severity) of `aml.perturbations`, or None. A photograph is disturbed at its own size, drawn by
        its id, so it is the same for all sentences, and for models of any input size.
        """
        if perturb is not None and self.train:
            raise ValueError(f"perturb={perturb!r}: only for evaluation; expected None with train=True")
        other = copy.copy(self)
        other.perturb, other._last_photo = perturb, (None,)
        return other

    @property
    def sample_ids(self) -> list[str]:
        """Ids of all sentences of the split, in order; in evaluation one per item."""
        return [expression.sample_id for expression in self.expressions]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) that changes with annotations, split, sentences and their order, and `resize`."""
        digest = hashlib.sha256(f"{self.refer.fingerprint}\n{self.split}\n{self.train}\n{self.resize}\n".encode())
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
        box = crop_around(mask, rng) if self.augment else Box(0, 0, image.width, image.height)
        return self._square(image, mask, box, rng if self.augment else None) | self._labels(position, index)

    def _evaluation_item(self, key: Any) -> dict[str, Any]:
        if not isinstance(key, int) or not 0 <= key < len(self):
            raise IndexError(f"key={key!r}: this evaluation set is indexed by 0 to {len(self) - 1}")
        expression = self.expressions[key]
        # The sentences of one object follow each other: its picture is read once, three times as fast in all.
        if self._last_photo[0] != expression.ref_key:
            image = self._open_image(expression)
            if self.perturb is not None:
                image = perturbed(image, *self.perturb, seed=zlib.crc32(str(expression.image_id).encode()))
            mask = self.refer.mask(expression)
            square = self._square(image, mask, Box(0, 0, image.width, image.height))
            self._last_photo = (expression.ref_key, square | {"full_target": torch.from_numpy(mask)})
        photo = {name: tensor.clone() for name, tensor in self._last_photo[1].items()}
        return photo | self._labels(key, key)

    def _square(
        self, image: Image.Image, mask: np.ndarray, box: Box, jitter: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """The box of photograph and mask as the model takes them; colours change where a generator is given."""
        inside = place(box.height, box.width, self.image_size, self.resize)
        size = (inside.height, inside.width)
        pixels = resized_image(image, box, size)
        if jitter is not None:
            pixels = jitter_colours(pixels, jitter)
        arrays = {"image": (pixels - self._mean) / self._std, "target": resized_mask(mask, box, size)}
        if self.resize == "letterbox":
            arrays["valid"] = np.ones(size, bool)
        return {name: torch.from_numpy(padded(a, inside, self.image_size)) for name, a in arrays.items()}

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
                image = to_rgb(file)
        except Exception as error:  # decoders raise many types for damaged files
            raise OSError(
                f"{where} was not read ({error}); get the file again, or leave it out:"
                "  aml data check DATA --bad bad.txt  lists all such files, data.skip=bad.txt leaves them out"
            ) from error
        if image.size != (expression.width, expression.height):
            raise ValueError(
                f"{where} is {image.width} x {image.height}, its annotations say {expression.width} x"
                f" {expression.height}: use the images that the annotations were made on"
            )
        return image

    def _positions_by_ref(self) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for position, expression in enumerate(self.expressions):
            groups.setdefault(expression.ref_key, []).append(position)
        return list(groups.values())


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of samples: tensors stacked, `index` as int64 [B], `sample_id` a list.

    `full_target` is one flat tensor with `full_sizes` [B, 2], to be parted by `full_targets`: each tensor that a worker
    process sends takes a file descriptor of the process that reads.
    """
    stacked = [name for name in ("image", "tokens", "text_mask", "target", "valid") if name in items[0]]
    batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in stacked}
    batch["index"] = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    if "sample_id" in items[0]:
        batch["sample_id"] = [item["sample_id"] for item in items]
    if "full_target" in items[0]:
        targets = [item["full_target"] for item in items]
        batch["full_target"] = torch.cat([target.flatten() for target in targets])
        batch["full_sizes"] = torch.tensor([target.shape for target in targets], dtype=torch.int64)
    return batch


def full_targets(batch: dict[str, Any]) -> list[Tensor]:
    """The masks of a batch at the photographs' own sizes, uint8 [H, W] each."""
    sizes = batch["full_sizes"].tolist()
    parts = batch["full_target"].split([height * width for height, width in sizes])
    return [part.view(height, width) for part, (height, width) in zip(parts, sizes, strict=True)]


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
