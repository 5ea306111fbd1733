"""Which pixels count in the loss: PatchMax similarity between pixels and words, and the strategies built on it.

    features -> projection -> similarity map (`aml_kernels.pixel_text_similarity`)
                                  | detached                      | with gradient, into the projection only
    logits, target -> `aml_kernels.masked_loss` by quantile       auxiliary loss on the map

Source: Chen et al., "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", ICLR 2026. Theirs are
the idea and the Gaussian projection; the trained projection and filtering the loss instead of the image are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aml.models.base import AlignmentInputs
from aml_kernels import masked_loss, pixel_text_similarity, sample_quantile

STRATEGIES = ("none", "loss", "random", "easiest")
GAUSSIAN_DIM = 2048  # the paper's D_a


class TrainedProjection(nn.Module):
    """Two linear maps into a common width, learned by the auxiliary loss of `AlignmentLoss`."""

    def __init__(self, visual_dim: int, text_dim: int, dim: int):
        super().__init__()
        self.visual = nn.Conv2d(visual_dim, dim, 1, bias=False)
        self.text = nn.Linear(text_dim, dim, bias=False)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(visual), self.text(text)


class GaussianProjection(nn.Module):
    """The paper's two random matrices to 2048 dimensions, entries N(0, 1/2048), never trained.

    Similarities need only inner products in the wide space. With [W_visual W_text] = QR and orthonormal Q, the columns
    of the small triangular R have the same ones, so that the wide features are never formed.
    """

    visual: Tensor
    text: Tensor

    def __init__(self, visual_dim: int, text_dim: int, seed: int):
        super().__init__()
        wide = torch.randn(
            GAUSSIAN_DIM,
            visual_dim + text_dim,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        folded = torch.linalg.qr(wide / math.sqrt(GAUSSIAN_DIM), mode="r").R.float()
        self.register_buffer("visual", folded[:, :visual_dim].contiguous())
        self.register_buffer("text", folded[:, visual_dim:].contiguous())

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(visual, self.visual[:, :, None, None]), F.linear(text, self.text)


class AlignmentLoss(nn.Module):
    """BCE + Dice over the pixels that a strategy keeps, plus the auxiliary loss that trains the projection.

    strategy: "none" keeps all pixels; "loss" leaves out the least aligned: per sample those below `quantile` of its
        similarity map; "random" and "easiest" (lowest loss) are its controls: in every sample they leave out exactly
        as many pixels as "loss" would.
    projection: "trained", to `dim` dimensions; or "gaussian", the paper's (chance level: see the README).
    quantile: in [0, 1). protect_target: no strategy leaves out a target pixel.
    aux_weight: weight of the binary cross entropy between scale * similarity + bias and the down-sampled mask. It
        trains projection, scale and bias, under every strategy, and reaches neither the model nor the choice of pixels.
    warmup_steps: nothing is left out before this step, while the projection learns.
    seed: of the Gaussian projection and, with the step, of "random".
    """

    def __init__(
        self,
        *,
        strategy: str = "loss",
        projection: str = "trained",
        visual_dim: int,
        text_dim: int,
        dim: int = 128,
        quantile: float = 0.25,
        protect_target: bool = True,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
        aux_weight: float = 0.1,
        warmup_steps: int = 100,
        seed: int = 0,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if projection not in ("trained", "gaussian"):
            raise ValueError(f"projection={projection!r}: expected trained or gaussian")
        if not 0 <= quantile < 1:
            raise ValueError(f"quantile={quantile}: expected a share of pixels to leave out, in [0, 1)")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: expected 0 or more")
        self.strategy = strategy
        self.quantile, self.protect_target = quantile, protect_target
        self.bce_weight, self.dice_weight, self.aux_weight = bce_weight, dice_weight, aux_weight
        self.warmup_steps, self.seed = warmup_steps, seed
        self.learns = projection == "trained"
        if self.learns:
            self.projection: nn.Module = TrainedProjection(visual_dim, text_dim, dim)
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-4.0))
        else:
            self.projection = GaussianProjection(visual_dim, text_dim, seed)

    def similarity(self, alignment: AlignmentInputs) -> Tensor:
        """PatchMax: per pixel the largest cosine with a real word, in the projected space. [B, h, w] in [-1, 1]."""
        visual, text = self.projection(alignment.visual.detach(), alignment.text.detach())
        return pixel_text_similarity(visual, text, alignment.text_mask)

    def forward(
        self, logits: Tensor, target: Tensor, alignment: AlignmentInputs, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logits [B, h', w']; target [B, H, W] bool or uint8; step: of the optimizer, from 0.

        Returns the loss and a record of detached scalars: loss, bce, dice, iou (over the whole image), kept and
        target_left_out (shares of pixels and of target pixels), and aux where the projection is trained.
        """
        similarity = self.similarity(alignment)
        loss, stats = masked_loss(
            logits,
            target,
            bce_weight=self.bce_weight,
            dice_weight=self.dice_weight,
            return_stats=True,
            **self._filter(logits, target, similarity.detach(), alignment.visual_valid, step),
        )
        target_pixels = (target > 0.5).sum((1, 2))
        record = {
            "bce": stats.bce.mean(),
            "dice": stats.dice.mean(),
            "iou": (stats.intersection / stats.union.clamp_min(1)).mean(),
            "kept": stats.kept.float().mean() / target[0].numel(),
            "target_left_out": 1 - stats.kept_target.sum() / target_pixels.sum().clamp_min(1),
        }
        if self.learns:
            aux = self._auxiliary_loss(similarity, target, alignment.visual_valid)
            loss = loss + self.aux_weight * aux
            record["aux"] = aux
        record["loss"] = loss
        return loss, {name: value.detach() for name, value in record.items()}

    def _filter(
        self, logits: Tensor, target: Tensor, similarity: Tensor, map_valid: Tensor | None, step: int
    ) -> dict[str, Any]:
        """The arguments of `masked_loss` that say which pixels are left out."""
        if self.strategy == "none" or step < self.warmup_steps:
            return {}
        by_alignment: dict[str, Any] = {
            "similarity": similarity,
            "quantile": self.quantile,
            "map_valid": map_valid,
            "protect_target": self.protect_target,
        }
        if self.strategy == "loss":
            return by_alignment
        with torch.no_grad():
            _, stats = masked_loss(logits, target, return_stats=True, **by_alignment)
            left_out = target[0].numel() - stats.kept
            worth = self._noise(target, step) if self.strategy == "random" else _pixel_loss(logits, target)
            if self.protect_target:
                worth = worth.masked_fill(target > 0.5, torch.inf)
            # A rank instead of the value: ties cannot change how many pixels are left out.
            rank = worth.flatten(1).argsort(dim=1, stable=True).argsort(1).view_as(worth)
        return {"similarity": rank.float(), "threshold": left_out.float()}

    def _noise(self, target: Tensor, step: int) -> Tensor:
        seed = (self.seed * 1_000_003 + step) % 2**32  # the CPU generator reads 32 bits of it
        generator = torch.Generator(target.device).manual_seed(seed)
        return torch.rand(target.shape, generator=generator, device=target.device)

    def _auxiliary_loss(self, similarity: Tensor, target: Tensor, map_valid: Tensor | None) -> Tensor:
        share = F.adaptive_avg_pool2d(target.float(), (similarity.shape[-2], similarity.shape[-1]))
        logits = similarity * self.log_scale.exp() + self.bias
        loss = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
        if map_valid is None:
            return loss.mean()
        return torch.where(map_valid, loss, 0).sum() / map_valid.sum().clamp_min(1)


def _pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of every pixel at the target's resolution; logits are resized as `masked_loss` does."""
    resized = F.interpolate(
        logits.float().view(len(target), 1, *logits.shape[-2:]),
        size=target.shape[-2:],
        mode="bilinear",
        align_corners=True,
    )
    return F.binary_cross_entropy_with_logits(resized.squeeze(1), target.float(), reduction="none")


def alignment_scores(similarity: Tensor, target: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """How well a similarity map [B, h, w] points at the target [B, H, W]; two tensors [B] in float64, for evaluation.

    AUC: the chance that a target pixel has a higher similarity than another one, ties counting one half; exact.
    Left out: the share of target pixels below the `quantile` of the map, which the strategy "loss" would leave out
    if it did not protect them. Both NaN where the target is empty, the AUC also where it is everything.

    The map is resized to the target's pixels as `masked_loss` does.
    """
    threshold = sample_quantile(similarity, quantile)
    resized = F.interpolate(
        similarity.float().unsqueeze(1), size=target.shape[-2:], mode="bilinear", align_corners=False
    ).squeeze(1)
    auc, left_out = [], []
    for values, mask, limit in zip(resized.flatten(1), target.flatten(1) > 0.5, threshold, strict=True):
        positives = mask.sum().double()
        negatives = mask.numel() - positives
        _, level, count = values.unique(return_inverse=True, return_counts=True)
        middle_rank = count.cumsum(0).double() - (count - 1) / 2  # ties share the mean of their ranks, from 1
        above = middle_rank[level[mask]].sum() - positives * (positives + 1) / 2
        auc.append(above / (positives * negatives))
        left_out.append((values[mask] < limit).sum() / positives)
    return torch.stack(auc), torch.stack(left_out)
