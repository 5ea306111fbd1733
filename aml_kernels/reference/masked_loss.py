"""masked_loss, defined."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .quantile import sample_quantile, working_type
from .resize import resize_bilinear


class MaskedLossStats(NamedTuple):
    """What `masked_loss(..., return_stats=True)` also gives: one value per sample each, `[B]`, without gradient."""

    threshold: Tensor  #: similarity from which a pixel is kept; -inf where nothing was asked to be left out
    kept: Tensor  #: int64, pixels that count in the loss
    kept_target: Tensor  #: int64, target pixels (value > 0.5) among them
    intersection: Tensor  #: int64, valid pixels, kept or not, that are predicted (logit > 0) and target
    union: Tensor  #: int64, valid pixels, kept or not, that are predicted or target
    bce: Tensor  #: weighted mean of the binary cross entropy over the kept pixels
    dice: Tensor  #: Dice loss over the kept pixels


def masked_loss(
    logits: Tensor, target: Tensor, similarity: Tensor | None = None, *,
    quantile: float | None = None, threshold: float | Tensor | None = None,
    valid: Tensor | None = None, map_valid: Tensor | None = None, protect_target: bool = False,
    bce_weight: float = 1.0, dice_weight: float = 1.0, class_weight: tuple[float, float] | None = None,
    smooth: float = 1e-5, reduction: str = "mean",
) -> tuple[Tensor, MaskedLossStats]:
    dtype = working_type(logits)
    size = (target.shape[1], target.shape[2])
    logits = logits.squeeze(1) if logits.dim() == 4 else logits
    logits = resize_bilinear(logits.to(dtype), size, align_corners=True)
    label = target.to(dtype)
    is_target = label > 0.5

    exists = torch.ones_like(is_target) if valid is None else valid
    keep = exists
    limit = logits.new_full(logits.shape[:1], -torch.inf)
    if quantile is not None or threshold is not None:
        assert similarity is not None  # the public function refuses it
        similarity = similarity.detach().to(dtype)
        limit = (
            sample_quantile(similarity, quantile, valid=map_valid) if quantile is not None
            else torch.as_tensor(threshold, dtype=dtype, device=logits.device).detach().expand(logits.shape[0])
        )
        aligned = resize_bilinear(similarity, size, align_corners=False) >= limit[:, None, None]
        keep = exists & (aligned | is_target) if protect_target else exists & aligned

    # Left-out pixels are replaced before any arithmetic, so that NaN there reaches neither a sum nor a gradient.
    z, y = logits.where(keep, torch.zeros_like(logits)), label.where(keep, torch.zeros_like(label))
    negative, positive = class_weight or (1.0, 1.0)
    weight = (negative + (positive - negative) * y).where(keep, torch.zeros_like(y))
    p = z.sigmoid().where(keep, torch.zeros_like(z))
    cross_entropy = functional.binary_cross_entropy_with_logits(z, y, reduction="none")

    pixels = (1, 2)
    total = weight.sum(pixels)
    has_weight = total > 0
    bce = (weight * cross_entropy).sum(pixels) / total.where(has_weight, torch.ones_like(total))
    dice = 1 - (2 * (p * y).sum(pixels) + smooth) / (p.sum(pixels) + y.sum(pixels) + smooth)
    kept = keep.sum(pixels)
    dice = dice.where(kept > 0, torch.zeros_like(dice))
    loss = bce_weight * bce + dice_weight * dice
    outside = (keep & ~((label >= 0) & (label <= 1))).sum(pixels)
    if outside.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere looking would stall
        refuse_targets(outside)
    loss = loss.masked_fill(outside > 0, torch.nan)

    predicted = (logits > 0) & exists
    stats = MaskedLossStats(
        limit, kept, (keep & is_target).sum(pixels),
        (predicted & is_target).sum(pixels), (predicted | (is_target & exists)).sum(pixels),
        bce.detach(), dice.detach(),
    )
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, stats


def refuse_targets(outside: Tensor) -> None:
    """`outside [B]`: how many kept target values are no probabilities."""
    for sample, count in enumerate(outside.tolist()):
        if count:
            raise ValueError(
                f"target: expected 0 and 1, or probabilities in [0, 1], at every kept pixel; sample {sample} has "
                f"{count} others. Pass target > 0 for a 0/255 mask, and pixels to ignore as valid = target != 255"
            )
