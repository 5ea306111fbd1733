"""aml_loss, defined: the three operators one after the other."""

import torch
from torch import Tensor

from .masked_loss import MaskedLossStats, masked_loss
from .similarity import pixel_text_similarity


def aml_loss(
    logits: Tensor, target: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None = None, *,
    normalize: bool = True, scale: float = 1.0, softmax: bool = False, **loss_options,
) -> tuple[Tensor, MaskedLossStats, Tensor]:
    """Loss, statistics and the similarity map `[B, h, w]`; `loss_options` are those of `masked_loss`."""
    with torch.no_grad():  # a hard threshold has no gradient in the similarity
        similarity = pixel_text_similarity(
            visual, text, text_mask, normalize=normalize, scale=scale, softmax=softmax,
        )
    loss, stats = masked_loss(logits, target, similarity, **loss_options)
    return loss, stats, similarity
