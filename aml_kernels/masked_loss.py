"""masked_loss: BCE and Dice over the pixels that match the words, in one pass."""

from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from ._backend import choose
from ._library import Operator, differentiable, once_only
from .reference.masked_loss import MaskedLossStats
from .reference.quantile import RANK_IN_FP64, working_type

TARGET_TYPES = (torch.bool, torch.uint8, *_checks.FLOAT_TYPES)
REDUCTIONS = ("mean", "sum", "none")


def masked_loss(
    logits: Tensor, target: Tensor, similarity: Tensor | None = None, *,
    quantile: float | None = None, threshold: float | Tensor | None = None,
    valid: Tensor | None = None, map_valid: Tensor | None = None, protect_target: bool = False,
    bce_weight: float = 1.0, dice_weight: float = 1.0, class_weight: tuple[float, float] | None = None,
    smooth: float = 1e-5, reduction: str = "mean", return_stats: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, MaskedLossStats]:
    """BCE + Dice per sample, over the pixels whose similarity to the words reaches a threshold.

    With kept = valid and (similarity >= threshold, or target and `protect_target`), p = sigmoid(logit), y = target:

        BCE  = sum(kept w_y bce(logit, y)) / sum(kept w_y)
        Dice = 1 - (2 sum(kept p y) + smooth) / (sum(kept p) + sum(kept y) + smooth)
        loss = bce_weight * BCE + dice_weight * Dice

    A left-out pixel contributes to no sum, whatever it holds: NaN or infinity there changes nothing, and its
    gradient is exactly 0. A sample that keeps nothing has loss 0 and gradient 0. Sums are in fp32 or wider.

    Args:
        logits: `[B, h', w']` or `[B, 1, h', w']`, fp32, bf16, fp16 or fp64. If smaller or larger than the target it
            is resized bilinearly with `align_corners=True` (the convention of RIS), inside the kernel. Where one is
            kept it should be finite: of an infinite one the loss may be NaN.
        target: `[B, H, W]` bool, uint8 (0 or 1) or float in [0, 1] (soft). A kept value outside [0, 1] is an error
            on the CPU and makes the sample's loss NaN on a GPU and in compiled plain PyTorch. No gradient.
        similarity: `[B, h, w]` float, e.g. of `pixel_text_similarity`; resized bilinearly (`align_corners=False`) to
            the target's size inside the kernel. May be None if nothing is to be left out. No gradient: the threshold
            is hard.
        quantile: in [0, 1]; each sample's threshold is this quantile of its own similarity map. (One that changes from
            step to step makes `torch.compile` compile a graph for each value, like any number given to an operator.)
        threshold: a number, or `[B]`; the alternative to `quantile`. Neither: every valid pixel is kept.
        valid: `[B, H, W]` bool, pixels that exist (padding of a letterboxed image does not).
        map_valid: `[B, h, w]` bool, cells of `similarity` that count for the quantile.
        protect_target: never leave out a valid target pixel (value > 0.5).
        bce_weight, dice_weight: factors of the two parts.
        class_weight: (w_0, w_1); w_y = w_0 + (w_1 - w_0) y. With z = z_1 - z_0 of two-channel logits, (0.9, 1.1) is
            the weighted two-class cross entropy of the RIS recipes. None: (1, 1).
        smooth: keeps Dice defined for empty masks; > 0.
        reduction: "mean" or "sum" over samples, or "none" for `[B]`.
        return_stats: also return `MaskedLossStats`, computed in the same pass.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses.

    Returns:
        The loss in fp32 (fp64 for fp64 logits); `(loss, stats)` with `return_stats`. Differentiable once, in
        `logits` only.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, range or device, or a gradient is asked
            for where there is none.

    Source: masking of the loss by alignment after Chen et al., "AMLRIS", ICLR 2026 (there applied to the image);
    Dice with a smoothing term after Milletari et al., "V-Net", 2016.
    """
    options = check_loss(
        logits, target, similarity, quantile, threshold, valid, map_valid, protect_target, bce_weight, dice_weight,
        class_weight, smooth, reduction,
    )
    filtered = quantile is not None or threshold is not None
    if filtered and similarity is None:
        raise ValueError("similarity: expected [B, h, w] where quantile or threshold is given, got None")
    if similarity is not None:
        similarity = similarity.detach() if filtered else None
    chosen = choose(backend, logits.device, logits=logits, target=target, similarity=similarity)
    if chosen == "reference":
        loss, stats = reference.masked_loss(
            logits, target, similarity, valid=valid, map_valid=map_valid, **for_reference(*options),
        )
        return (loss, stats) if return_stats else loss
    loss, sums, counts = _masked_loss(chosen, logits, target, similarity, valid, map_valid, *options)
    return (loss, unpack_stats(sums, counts)) if return_stats else loss


def check_loss(
    logits, target, similarity, quantile, threshold, valid, map_valid, protect_target, bce_weight, dice_weight,
    class_weight, smooth, reduction,
) -> tuple:
    """Check the arguments shared by `masked_loss` and `aml_loss`; return the options of their operators."""
    _checks.tensor("logits", logits, (3, 4), _checks.FLOAT_TYPES, "[B, h', w'] or [B, 1, h', w']")
    if logits.dim() == 4 and logits.shape[1] != 1:
        raise ValueError(
            f"logits: expected one channel, [B, h', w'] or [B, 1, h', w'], got shape {list(logits.shape)}; fold "
            "two-class logits with logits[:, 1] - logits[:, 0]"
        )
    _checks.tensor("target", target, (3,), TARGET_TYPES, "[B, H, W]")
    samples = logits.shape[0]
    _checks.shape("target", target, (samples, *target.shape[1:]), "batch of logits")
    _checks.no_gradient("target", target, "soft targets are constants")
    if similarity is not None:
        _checks.tensor("similarity", similarity, (3,), _checks.FLOAT_TYPES, "[B, h, w]")
        _checks.shape("similarity", similarity, (samples, *similarity.shape[1:]), "batch of logits")
    if valid is not None:
        _checks.tensor("valid", valid, (3,), _checks.MASK_TYPES, "[B, H, W]")
        _checks.shape("valid", valid, target.shape, "that of target")
    if map_valid is not None:
        _checks.tensor("map_valid", map_valid, (3,), _checks.MASK_TYPES, "[B, h, w]")
        if similarity is not None:
            _checks.shape("map_valid", map_valid, similarity.shape, "that of similarity")
    quantile, threshold = _checks.at_most_one_limit(quantile, threshold, samples)
    limits = threshold if isinstance(threshold, Tensor) else None
    _checks.same_device(
        logits=logits, target=target, similarity=similarity, valid=valid, map_valid=map_valid, threshold=limits,
    )
    _checks.flag("protect_target", protect_target)
    bce_weight = _checks.number("bce_weight", bce_weight)
    dice_weight = _checks.number("dice_weight", dice_weight)
    negative, positive = (1.0, 1.0) if class_weight is None else check_class_weight(class_weight)
    smooth = _checks.number("smooth", smooth, 1e-30)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    return (
        None if limits is None else limits.detach().to(working_type(logits)),
        None if limits is not None else threshold, quantile, RANK_IN_FP64, protect_target, bce_weight, dice_weight,
        negative, positive, smooth, REDUCTIONS.index(reduction),
    )


def for_reference(
    thresholds, threshold, quantile, rank_in_fp64, protect_target, bce_weight, dice_weight, negative, positive, smooth,
    reduction,
) -> dict[str, Any]:
    """The operators' options as `reference.masked_loss` takes them."""
    return {
        "quantile": quantile, "threshold": threshold if thresholds is None else thresholds,
        "protect_target": protect_target, "bce_weight": bce_weight, "dice_weight": dice_weight,
        "class_weight": (negative, positive), "smooth": smooth, "reduction": REDUCTIONS[reduction],
    }


def check_class_weight(class_weight: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(class_weight, (tuple, list)) or len(class_weight) != 2:
        raise ValueError(f"class_weight: expected two numbers (w_0, w_1) or None, got {class_weight!r}")
    negative, positive = class_weight
    return _checks.number("class_weight", negative, 0.0), _checks.number("class_weight", positive, 0.0)


def unpack_stats(sums: Tensor, counts: Tensor) -> MaskedLossStats:
    """Columns of the operators' second and third output; see `SampleSums` in csrc/common/loss.h."""
    threshold, bce, dice, *_ = sums.unbind(1)
    kept, kept_target, intersection, union = counts.unbind(1)
    return MaskedLossStats(threshold, kept, kept_target, intersection, union, bce, dice)


OPTIONS = (
    "Tensor? thresholds, float? threshold, float? quantile, bool rank_in_fp64, bool protect_target, "
    "float bce_weight, float dice_weight, float negative_weight, float positive_weight, float smooth, int reduction"
)


def fake_outputs(logits: Tensor, reduction: int) -> tuple[Tensor, Tensor, Tensor]:
    samples, dtype = logits.shape[0], working_type(logits)
    loss = logits.new_empty((samples,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return loss, logits.new_empty((samples, 7), dtype=dtype), logits.new_empty((samples, 4), dtype=torch.int64)


def _fake(logits, target, similarity, valid, map_valid, *options):
    return fake_outputs(logits, options[-1])


def _fake_backward(grad, logits, target, similarity, valid, sums, *options):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forward = Operator(
    f"masked_loss(Tensor logits, Tensor target, Tensor? similarity, Tensor? valid, Tensor? map_valid, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
)
backward = Operator(
    "masked_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor? similarity, Tensor? valid, Tensor sums, "
    "bool protect_target, float bce_weight, float dice_weight, float negative_weight, float positive_weight, "
    "float smooth, int reduction) -> Tensor",
    _fake_backward,
)


def _setup(arguments, output):
    # What was kept follows from the similarity map and the threshold in `sums`: nothing else is stored.
    return (*arguments[:4], output[1]), arguments[9:]


_masked_loss = differentiable(_forward, backward, 1, _setup)
once_only(backward)
