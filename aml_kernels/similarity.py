"""pixel_text_similarity: how well does each pixel match the words?"""

import torch
from torch import Tensor

from . import _checks, reference
from ._backend import choose
from ._library import Operator, differentiable, once_only
from .reference.quantile import working_type


def pixel_text_similarity(
    visual: Tensor, text: Tensor, text_mask: Tensor | None = None, *,
    normalize: bool = True, scale: float = 1.0, softmax: bool = False, backend: str | None = None,
) -> Tensor:
    """Similarity of every pixel to its best-matching word (PatchMax).

        s[i, j] = scale * <v_i, u_j>          v, u l2-normalised if `normalize`
        s[i, :] = softmax over the real words  if `softmax`
        result[i] = max over the real words j of s[i, j]

    Args:
        visual: `[B, C, h, w]` or `[B, N, C]`, fp32, bf16, fp16 or fp64; any strides (channels-first and
            channels-last are read in place, other layouts are copied once).
        text: `[B, L, C]` word features in the width of `visual`, any float dtype.
        text_mask: `[B, L]` bool, true = real word; None = all are. A sample without a real word is an error on the
            CPU and has similarity 0 on a GPU (where finding out would stall the device).
        normalize: compare directions. A vector of length 0 has similarity 0 to everything, and gradient 0.
        scale: factor on the scores, e.g. an inverse temperature.
        softmax: take the softmax over the words before the maximum, as the paper does. It costs signal: the score
            then depends on the other words and on how many there are.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses.

    Returns:
        `[B, h, w]` (`[B, N]` for `visual [B, N, C]`) in fp32 (fp64 for fp64 `visual`). Differentiable once in
        `visual` and `text`; among equal words the first one gets the gradient.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device.

    Source: Chen et al., "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", ICLR 2026,
    pixel-text matching; there with random projections in front and `softmax`.
    """
    scale = check_features(visual, text, text_mask, normalize, scale, softmax)
    chosen = choose(backend, visual.device, visual=visual, text=text)
    if chosen == "reference":
        check_words(text_mask)
        return reference.pixel_text_similarity(
            visual, text, text_mask, normalize=normalize, scale=scale, softmax=softmax,
        )
    return _similarity(chosen, visual, text, text_mask, normalize, scale, softmax)


def check_features(
    visual: Tensor, text: Tensor, text_mask: Tensor | None, normalize: bool, scale: float, softmax: bool,
) -> float:
    """Check the arguments shared by `pixel_text_similarity` and `aml_loss`; return the scale as Python's number."""
    _checks.tensor("visual", visual, (3, 4), _checks.FLOAT_TYPES, "[B, C, h, w] or [B, N, C]")
    _checks.tensor("text", text, (3,), _checks.FLOAT_TYPES, "[B, L, C]")
    samples, width = visual.shape[0], visual.shape[1 if visual.dim() == 4 else 2]
    _checks.shape("text", text, (samples, text.shape[1], width), "batch and width of visual")
    if text_mask is not None:
        _checks.tensor("text_mask", text_mask, (2,), _checks.MASK_TYPES, "[B, L]")
        _checks.shape("text_mask", text_mask, text.shape[:2], "one per word of text")
    _checks.same_device(visual=visual, text=text, text_mask=text_mask)
    _checks.flag("normalize", normalize)
    _checks.flag("softmax", softmax)
    return _checks.number("scale", scale)


def check_words(text_mask: Tensor | None) -> None:
    """On the CPU, where looking costs nothing: every sample has a word."""
    if text_mask is None or text_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    without = (~text_mask.any(1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"text_mask: expected at least one real word in every sample, got none in samples {without}")


def _fake(visual, text, text_mask, normalize, scale, softmax):
    size = (visual.shape[0], *visual.shape[2:]) if visual.dim() == 4 else visual.shape[:2]
    return visual.new_empty(size, dtype=working_type(visual))


def _fake_backward(grad, visual, text, text_mask, normalize, scale, softmax):
    return (
        torch.empty_like(visual, memory_format=torch.contiguous_format),
        torch.empty_like(text, memory_format=torch.contiguous_format),
    )


_OPTIONS = "Tensor visual, Tensor text, Tensor? text_mask, bool normalize, float scale, bool softmax"
_forward = Operator(f"pixel_text_similarity({_OPTIONS}) -> Tensor", _fake)
_backward = Operator(f"pixel_text_similarity_backward(Tensor grad, {_OPTIONS}) -> (Tensor, Tensor)", _fake_backward)


def _setup(arguments, output):
    return arguments[:3], arguments[3:]


_similarity = differentiable(_forward, _backward, 2, _setup)
once_only(_backward)
