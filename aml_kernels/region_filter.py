"""filter_regions: blank out blocks of the input image that do not match the words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, reference
from ._backend import choose
from ._library import Operator
from .reference.quantile import RANK_IN_FP64, working_type

IMAGE_TYPES = (*_checks.FLOAT_TYPES, torch.uint8)


def filter_regions(
    image: Tensor, similarity: Tensor, *, quantile: float | None = None, threshold: float | Tensor | None = None,
    drop_ratio: float = 0.25, block_size: int = 32, protect: Tensor | None = None,
    fill: float | Sequence[float] = 0.0, seed: int, backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Alignment-aware filtering of the input image: drop a random share of the blocks that hold weak pixels.

    The similarity map is resized bilinearly (`align_corners=False`) to the image. A pixel below the threshold is
    weak, a block that holds a weak pixel is weak, and of a sample's n weak blocks round(drop_ratio * n), chosen at
    random, are dropped (half a block counts as one): all their pixels become `fill`.

    Args:
        image: `[B, K, H, W]` with K channels, any float dtype or uint8. Blocks at the right and bottom edge may be
            cut off. Never written to. No gradient.
        similarity: `[B, h, w]` float.
        quantile, threshold: exactly one of them; as in `masked_loss`.
        drop_ratio: in [0, 1].
        block_size: edge of a block in pixels, >= 1.
        protect: `[B, H, W]` bool; a block that holds a true pixel is never dropped.
        fill: a number or one per channel, in the space of `image` (0 = mean colour after normalisation).
        seed: in [0, 2**64); the same seed drops the same blocks on every back end and device (Philox-4x32-10,
            counter = (block, sample)).
        backend: "reference", "cpu", "triton" or "cuda"; None chooses.

    Returns:
        The filtered image, contiguous, and `[B, ceil(H / block_size), ceil(W / block_size)]` bool, true = dropped.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, range or device.

    Source: Chen et al., "AMLRIS", ICLR 2026, alignment-aware filtering mask.
    """
    _checks.tensor("image", image, (4,), IMAGE_TYPES, "[B, K, H, W]")
    _checks.no_gradient("image", image, "the filter is no part of the trained function")
    _checks.tensor("similarity", similarity, (3,), _checks.FLOAT_TYPES, "[B, h, w]")
    samples, channels, rows, columns = image.shape
    _checks.shape("similarity", similarity, (samples, *similarity.shape[1:]), "batch of image")
    quantile, threshold = _checks.at_most_one_limit(quantile, threshold, samples)
    if quantile is None and threshold is None:
        raise ValueError("quantile, threshold: expected one of them, got neither")
    drop_ratio = _checks.number("drop_ratio", drop_ratio, 0.0, 1.0)
    block_size = _checks.whole_number("block_size", block_size, "a whole number of pixels in [1, 2**31)", 1, 2**31)
    seed = _checks.whole_number("seed", seed, "a whole number in [0, 2**64)", 0, 2**64)
    if protect is not None:
        _checks.tensor("protect", protect, (3,), _checks.MASK_TYPES, "[B, H, W]")
        _checks.shape("protect", protect, (samples, rows, columns), "batch and size of image")
    colour = list(fill) if isinstance(fill, Sequence) else [fill] * channels
    if len(colour) != channels:
        raise ValueError(f"fill: expected a number or {channels} of them (one per channel), got {len(colour)}")
    bounds = (0, 255) if image.dtype == torch.uint8 else ()
    colour = [_checks.number("fill", value, *bounds) for value in colour]
    limits = threshold if isinstance(threshold, Tensor) else None
    _checks.same_device(image=image, similarity=similarity, protect=protect, threshold=limits)

    chosen = choose(backend, image.device, image=image, similarity=similarity)
    if chosen == "reference":
        return reference.filter_regions(
            image, similarity, quantile=quantile, threshold=threshold, drop_ratio=drop_ratio, block_size=block_size,
            protect=protect, fill=torch.tensor(colour, dtype=torch.float64, device="cpu"), seed=seed,
        )
    limit = None if limits is not None else threshold
    limits = None if limits is None else limits.to(working_type(similarity))
    signed = seed - 2**64 if seed >= 2**63 else seed  # operators take int64
    return _filter(
        chosen, image, similarity, protect, limits, limit, quantile, RANK_IN_FP64, drop_ratio, block_size, colour,
        signed,
    )


def _fake(image, similarity, protect, thresholds, threshold, quantile, rank, drop_ratio, block_size, fill, seed):
    blocks = [(size + block_size - 1) // block_size for size in image.shape[2:]]
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format),
        image.new_empty((image.shape[0], *blocks), dtype=torch.bool),
    )


_filter = Operator(
    "filter_regions(Tensor image, Tensor similarity, Tensor? protect, Tensor? thresholds, float? threshold, "
    "float? quantile, bool rank_in_fp64, float drop_ratio, int block_size, float[] fill, SymInt seed) "
    "-> (Tensor, Tensor)",
    _fake,
)
