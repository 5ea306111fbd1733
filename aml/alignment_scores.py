"""How well a similarity map points at the target: numbers for evaluation and for `aml alignment-report`.

The map [B, h, w] is resized to the target's pixels [B, H, W] as `masked_loss` does. valid, map_valid: as there; pixels
that do not exist count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aml_kernels import sample_quantile


def alignment_scores(
    similarity: Tensor,
    target: Tensor,
    *,
    quantile: float | None = None,
    threshold: float | None = None,
    valid: Tensor | None = None,
    map_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`target_auc`, and the share of target pixels below the `quantile` of the map, or below `threshold`: what the
    strategy "loss" would leave out if it did not protect them. Two tensors [B] in float64."""
    if quantile is not None:
        limit = sample_quantile(similarity, quantile, valid=map_valid)
    elif threshold is not None:
        limit = similarity.new_full((len(similarity),), threshold)
    else:
        raise ValueError("quantile, threshold: expected one of them, got neither")
    return target_auc(similarity, target, valid), target_below(similarity, target, limit[None], valid)[0]


def target_auc(similarity: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """The chance that a target pixel has a higher similarity than another one, ties counting one half; exact.

    float64 [B]; NaN where the target is empty or everything.
    """
    result = []
    for values, mask in _samples(similarity, target, valid):
        others, positives = _sorted(values[~mask]), values[mask]
        below, not_above = (torch.searchsorted(others, positives, right=right) for right in (False, True))
        result.append((below.sum() + not_above.sum()).double() / (2 * len(others) * len(positives)))
    return torch.stack(result)


def target_below(similarity: Tensor, target: Tensor, limits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The share of target pixels below each of the limits [n, B]; float64 [n, B], NaN where the target is empty."""
    result = []
    for (values, mask), limit in zip(_samples(similarity, target, valid), limits.unbind(1), strict=True):
        result.append((values[mask] < limit[:, None]).sum(1) / mask.sum().double())
    return torch.stack(result, dim=1)


def resized_map(similarity: Tensor, size: Sequence[int]) -> Tensor:
    """A map [B, h, w] at another size."""
    return F.interpolate(similarity.float()[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _sorted(values: Tensor) -> Tensor:
    if values.is_cuda:
        return values.sort().values
    return torch.from_numpy(np.sort(values.detach().numpy()))  # five times as fast as PyTorch's


def _samples(similarity: Tensor, target: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Per sample the values of the pixels that exist, and which of them are target."""
    values, mask = resized_map(similarity, target.shape[-2:]).flatten(1), (target > 0.5).flatten(1)
    if valid is None:
        return list(zip(values, mask, strict=True))
    exists = valid.flatten(1)
    return [(values[i][exists[i]], mask[i][exists[i]]) for i in range(len(values))]
