"""What the strategies leave out: pixels of the loss, or blocks of the input image.

Pixels: functions that give the arguments of `aml_kernels.masked_loss`. Blocks: functions that give the filtered image
[B, K, H, W] and its dropped blocks, bool [B, ceil(H / block_size), ceil(W / block_size)].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aml_kernels import filter_regions, masked_loss
from aml_kernels.reference.region_filter import philox_keys

PIXEL_STRATEGIES = ("loss", "random", "easiest")
BLOCK_STRATEGIES = ("image", "random_blocks")
STRATEGIES = ("none", *PIXEL_STRATEGIES, *BLOCK_STRATEGIES, "released")
RELEASED_BLOCK = 32
RELEASED_SHARE = 4  # one in so many of the low pixels is drawn


# ---------------------------------------------------------------------------------------------- pixels of the loss


@torch.no_grad()
def worst_ranked(
    logits: Tensor, target: Tensor, worth: Tensor, filtering: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `masked_loss` that leave out, in every sample, as many pixels as `filtering` would, but those of
    least `worth` [B, H, W]; and the limits [B] that `filtering` stands for."""
    valid = filtering["valid"]
    _, stats = masked_loss(logits, target, return_stats=True, **filtering)
    left_out = existing_pixels(target, valid) - stats.kept
    if filtering["protect_target"]:
        worth = worth.masked_fill(target > 0.5, torch.inf)
    if valid is not None:
        worth = worth.masked_fill(~valid, torch.inf)
    # A rank instead of the value: ties cannot change how many pixels are left out.
    rank = worth.flatten(1).argsort(dim=1, stable=True).argsort(1).view_as(worth)
    return {"similarity": rank.float(), "threshold": left_out.float(), "valid": valid}, stats.threshold


def noise(target: Tensor, seed: int, draw: int) -> Tensor:
    """Uniform in [0, 1), of the target's shape: a function of seed, draw and the kind of device."""
    seed = (seed * 1_000_003 + draw) % 2**32  # the CPU generator reads 32 bits of it
    generator = torch.Generator(target.device).manual_seed(seed)
    return torch.rand(target.shape, generator=generator, device=target.device)


@torch.no_grad()
def pixel_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of every pixel at the target's resolution; logits are resized as `masked_loss` does."""
    logits = logits.float().view(len(target), 1, *logits.shape[-2:])
    resized = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=True).squeeze(1)
    return F.binary_cross_entropy_with_logits(resized, target.float(), reduction="none")


def existing_pixels(target: Tensor, valid: Tensor | None) -> Tensor:
    """int64 [B]."""
    if valid is None:
        return torch.full(target.shape[:1], target[0].numel(), device=target.device)
    return valid.sum((1, 2))


# ---------------------------------------------------------------------------------------------- blocks of the image


@dataclass(frozen=True)
class BlockFilter:
    """Fills blocks of the image.

    drop_ratio: of the blocks with weak pixels this share is dropped, chosen at random. max_dropped: at most this share
    of all blocks is. block_size: their side, in pixels. fill: 0 is the mean colour of normalised images.
    """

    drop_ratio: float = 0.25
    block_size: int = 32
    max_dropped: float = 0.5
    fill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_ratio", "max_dropped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share of blocks, in [0, 1]")

    @torch.no_grad()
    def weak(
        self,
        image: Tensor,
        similarity: Tensor,
        limit: Tensor,
        seed: int,
        protect: Tensor | None = None,
        map_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`filter_regions`, with the cap. limit: [B]; map_valid: as in `masked_loss`; other cells are not weak."""
        if map_valid is not None:
            highest = similarity.masked_fill(~map_valid, -torch.inf).amax((1, 2), keepdim=True)
            similarity = torch.where(map_valid, similarity, highest)
        filtered, dropped = filter_regions(
            image,
            similarity,
            threshold=limit,
            drop_ratio=self.drop_ratio,
            block_size=self.block_size,
            protect=protect,
            fill=self.fill,
            seed=seed,
        )
        blocks = dropped[0].numel()
        most = int(self.max_dropped * blocks)
        if int(self.drop_ratio * blocks + 0.5) <= most:  # even if all of them are weak
            return filtered, dropped
        # Of those dropped, the ones that `filter_regions` drew first.
        dropped = _first_drawn(dropped, seed, torch.full_like(limit, most, dtype=torch.int64))
        return fill_blocks(image, dropped, self.block_size, self.fill), dropped

    @torch.no_grad()
    def random(
        self, image: Tensor, count: Tensor, seed: int, protect: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The control: `count` [B] blocks of each sample, whatever they show."""
        rows, columns = (-(-side // self.block_size) for side in image.shape[2:])
        allowed = torch.ones(len(image), rows, columns, dtype=torch.bool, device=image.device)
        if valid is not None:
            allowed &= _blocks_with(valid, self.block_size)
        if protect is not None:
            allowed &= ~_blocks_with(protect, self.block_size)
        dropped = _first_drawn(allowed, seed, count)
        return fill_blocks(image, dropped, self.block_size, self.fill), dropped


@torch.no_grad()
def released_filter(
    image: Tensor, similarity: Tensor, limit: Tensor, permutation: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """What the released code masks, to the bit, given the permutations that it draws; for reproduction only.

    Per sample, a quarter of the M pixels below `limit` is drawn: the first max(1, M // 4) of permutation(M). Each drawn
    pixel drops the block of 32 x 32 that it is in, and, by a mix-up of indices, the block whose *number* is the pixel's
    place within its own block (0 to 1023, at most the last block). So a few weak pixels blank most of the picture, and
    most of that is not weak: docs/alignment.md has the numbers.
    """
    side, last = RELEASED_BLOCK, (image.shape[2] // RELEASED_BLOCK) ** 2 - 1
    if image.shape[2] != image.shape[3] or image.shape[2] % side:
        raise ValueError(
            f"image: the released filter takes square images of whole {side} x {side} blocks, got {list(image.shape)}"
        )
    pixels = F.interpolate(similarity.float()[:, None], size=image.shape[2:], mode="bilinear", align_corners=False)
    places = F.pixel_unshuffle(pixels, side)  # [B, place within the block, block row, block column]
    low = (places < limit.view(-1, 1, 1, 1)).flatten(2).transpose(1, 2)
    dropped = torch.zeros(len(image), last + 1, dtype=torch.bool, device=image.device)
    for sample, found in enumerate(low):
        pairs = found.nonzero()  # (block, place within it), in this order
        if len(pairs):
            drawn = pairs[permutation(len(pairs)).to(pairs.device)[: max(1, len(pairs) // RELEASED_SHARE)]]
            dropped[sample, drawn.clamp(max=last).flatten()] = True
    dropped = dropped.view(len(image), image.shape[2] // side, -1)
    return fill_blocks(image, dropped, side, 0.0), dropped


def fill_blocks(image: Tensor, dropped: Tensor, block_size: int, fill: float) -> Tensor:
    return image.masked_fill(pixels_of_blocks(dropped, block_size, image.shape[2:])[:, None], fill)


def pixels_of_blocks(blocks: Tensor, block_size: int, size: Sequence[int]) -> Tensor:
    """bool [B, H, W]: which pixels are in a true block."""
    pixels = blocks.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
    return pixels[:, : size[0], : size[1]]


def _blocks_with(pixels: Tensor, block_size: int) -> Tensor:
    """bool: which blocks hold a true pixel; those at the right and bottom edge may be cut off."""
    return F.max_pool2d(pixels[:, None].float(), block_size, ceil_mode=True)[:, 0] > 0


def _first_drawn(blocks: Tensor, seed: int, count: Tensor) -> Tensor:
    """The `count` [B] true blocks with the smallest keys of `filter_regions`' generator; all, if there are no more."""
    keys = philox_keys(seed, len(blocks), blocks[0].numel(), blocks.device)
    keys = keys.masked_fill(~blocks.flatten(1), 2**32)
    rank = keys.argsort(dim=1, stable=True).argsort(1)
    return blocks & (rank < count[:, None]).view_as(blocks)
