"""filter_regions, defined."""

import torch
from torch import Tensor
from torch.nn import functional

from .quantile import sample_quantile, working_type
from .resize import resize_bilinear


@torch.no_grad()
def filter_regions(
    image: Tensor, similarity: Tensor, *, quantile: float | None = None, threshold: float | Tensor | None = None,
    drop_ratio: float = 0.25, block_size: int = 32, protect: Tensor | None = None,
    fill: float | Tensor = 0.0, seed: int,
) -> tuple[Tensor, Tensor]:
    samples, channels, rows, columns = image.shape
    similarity = similarity.to(working_type(similarity))
    limit = (
        sample_quantile(similarity, quantile) if quantile is not None
        else torch.as_tensor(threshold, dtype=similarity.dtype, device=image.device).expand(samples)
    )
    weak = resize_bilinear(similarity, (rows, columns), align_corners=False) < limit[:, None, None]
    weak = _any_in_block(weak, block_size)
    if protect is not None:
        weak &= ~_any_in_block(protect, block_size)

    # Of the n weak blocks of a sample, the round(drop_ratio * n) with the smallest random keys are dropped.
    blocks = weak[0].numel()
    key = philox_keys(seed, samples, blocks, image.device)
    order = key.where(weak.flatten(1), torch.full_like(key, 2**32)).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(blocks, device=image.device).expand_as(order))
    ratio = torch.tensor(drop_ratio, dtype=torch.float32, device=image.device)
    count = (ratio * weak.sum((1, 2)) + 0.5).floor().long()
    dropped = (weak.flatten(1) & (rank < count[:, None])).view_as(weak)

    y, x = (torch.arange(size, device=image.device) // block_size for size in (rows, columns))
    pixels = dropped[:, y[:, None], x][:, None]
    fill = torch.as_tensor(fill, dtype=image.dtype, device=image.device).reshape(1, -1, 1, 1)
    return torch.where(pixels, fill, image).contiguous(), dropped


def _any_in_block(pixels: Tensor, block: int) -> Tensor:
    """`[B, H, W]` to `[B, ceil(H / block), ceil(W / block)]`: does the block hold a true pixel?"""
    return functional.max_pool2d(pixels.float()[:, None], block, ceil_mode=True)[:, 0] > 0


def philox_keys(seed: int, samples: int, blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """A random 32-bit key for each block, `[samples, blocks]` int64: the first word of Philox-4x32-10.

    Counter (block, sample, 0, 0), key (low and high half of `seed`). Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", SC 2011. The same on every back end and device.
    """
    low = 0xFFFFFFFF
    x0 = torch.arange(blocks, device=device).expand(samples, blocks)
    x1 = torch.arange(samples, device=device)[:, None].expand(samples, blocks)
    x2, x3 = torch.zeros_like(x0), torch.zeros_like(x0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # wrap-around keeps the 64 bits that count
        x0, x1, x2, x3 = (
            (product1 >> 32) & low ^ x1 ^ k0, product1 & low, (product0 >> 32) & low ^ x3 ^ k1, product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0
