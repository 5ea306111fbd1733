"""aml_loss: three launches, for the similarity map, the thresholds and the loss."""

from torch import Tensor

from .masked_loss import masked_loss
from .similarity import pixel_text_similarity
from .tensors import FLOATS, check


def aml_loss(
    logits: Tensor, target: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None, valid: Tensor | None,
    map_valid: Tensor | None, normalize: bool, scale: float, softmax: bool, thresholds: Tensor | None,
    threshold: float | None, quantile: float | None, *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("visual", visual, FLOATS, (len(logits), None, None, None))
    similarity = pixel_text_similarity(visual, text, text_mask, normalize, scale, softmax)
    limited = thresholds is not None or threshold is not None or quantile is not None
    loss, sums, counts = masked_loss(
        logits, target, similarity if limited else None, valid, map_valid, thresholds, threshold, quantile, *options,
    )
    return loss, sums, counts, similarity
