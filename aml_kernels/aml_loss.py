"""aml_loss: similarity, threshold and loss in one operator; the reason why this package exists."""

from typing import NamedTuple

from torch import Tensor

from . import _checks, reference
from ._backend import choose
from ._library import Operator, differentiable
from .masked_loss import OPTIONS, backward, check_loss, fake_outputs, for_reference, unpack_stats
from .reference.quantile import working_type
from .similarity import check_features, check_words


class AMLStats(NamedTuple):
    """`MaskedLossStats` and the similarity map `[B, h, w]` that they follow from; all without gradient."""

    threshold: Tensor
    kept: Tensor
    kept_target: Tensor
    intersection: Tensor
    union: Tensor
    bce: Tensor
    dice: Tensor
    similarity: Tensor


def aml_loss(
    logits: Tensor, target: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None = None, *,
    normalize: bool = True, scale: float = 1.0, softmax: bool = False,
    quantile: float | None = None, threshold: float | Tensor | None = None,
    valid: Tensor | None = None, map_valid: Tensor | None = None, protect_target: bool = False,
    bce_weight: float = 1.0, dice_weight: float = 1.0, class_weight: tuple[float, float] | None = None,
    smooth: float = 1e-5, reduction: str = "mean", return_stats: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, AMLStats]:
    """`masked_loss(logits, target, pixel_text_similarity(visual, text, text_mask), ...)` in one pass.

    Each input is read once and nothing of the size of the target is written in the forward; the backward writes the
    gradient of `logits` alone. Between them live the inputs of the loss, the similarity map `[B, h, w]` (a C-th of
    `visual`, which the backward does not need) and a few numbers per sample.

    Args:
        visual: `[B, C, h, w]`, and text, text_mask, normalize, scale, softmax: as in `pixel_text_similarity`.
        logits, target and the rest: as in `masked_loss`.

    Returns:
        As `masked_loss`; the stats also hold the similarity map. Differentiable once, in `logits` only: a hard
        threshold has no gradient in the features. To train a projection of them use `pixel_text_similarity`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, range or device.
    """
    options = check_loss(
        logits, target, None, quantile, threshold, valid, map_valid, protect_target, bce_weight, dice_weight,
        class_weight, smooth, reduction,
    )
    _checks.tensor("visual", visual, (4,), _checks.FLOAT_TYPES, "[B, C, h, w]")
    scale = check_features(visual, text, text_mask, normalize, scale, softmax)
    _checks.shape("visual", visual, (logits.shape[0], *visual.shape[1:]), "batch of logits")
    if map_valid is not None:
        _checks.shape("map_valid", map_valid, (visual.shape[0], *visual.shape[2:]), "one per cell of visual")
    _checks.same_device(logits=logits, visual=visual)
    chosen = choose(backend, logits.device, logits=logits, target=target, visual=visual, text=text)
    if chosen == "reference":
        check_words(text_mask)
        loss, stats, similarity = reference.aml_loss(
            logits, target, visual, text, text_mask, normalize=normalize, scale=scale, softmax=softmax,
            valid=valid, map_valid=map_valid, **for_reference(*options),
        )
        return (loss, AMLStats(*stats, similarity)) if return_stats else loss
    loss, sums, counts, similarity = _aml_loss(
        chosen, logits, target, visual.detach(), text.detach(), text_mask, valid, map_valid, normalize, scale, softmax,
        *options,
    )
    return (loss, AMLStats(*unpack_stats(sums, counts), similarity)) if return_stats else loss


def _fake(logits, target, visual, *options):
    similarity = visual.new_empty((visual.shape[0], *visual.shape[2:]), dtype=working_type(visual))
    return *fake_outputs(logits, options[-1]), similarity


_forward = Operator(
    "aml_loss(Tensor logits, Tensor target, Tensor visual, Tensor text, Tensor? text_mask, Tensor? valid, "
    f"Tensor? map_valid, bool normalize, float scale, bool softmax, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _setup(arguments, output):
    logits, target, valid = arguments[0], arguments[1], arguments[5]
    quantile_or_threshold = any(limit is not None for limit in arguments[10:13])
    similarity = output[3] if quantile_or_threshold else None
    return (logits, target, similarity, valid, output[1]), arguments[14:]


_aml_loss = differentiable(_forward, backward, 1, _setup)
