"""The operators as a textbook would write them, independent of `aml_kernels.reference`: the oracle, in fp64."""

import functools

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only


def on_cpu(function):
    """The oracle is PyTorch on the CPU also for tensors on a GPU, where its roundings differ."""

    @functools.wraps(function)
    def run(*arguments, **named):
        given = (arguments, named)
        device = next(x.device for x in tree_leaves(given) if isinstance(x, Tensor))
        arguments, named = tree_map_only(Tensor, Tensor.cpu, given)
        with torch.device("cpu"):
            return function(*arguments, **named).to(device)

    return run


@on_cpu
def similarity(
    visual: Tensor, text: Tensor, text_mask: Tensor | None = None, *, normalize: bool = True, scale: float = 1.0,
    softmax: bool = False,
) -> Tensor:
    """Sample by sample over the real words only."""
    pixels = visual.flatten(2).mT if visual.dim() == 4 else visual
    maps = []
    for sample in range(len(pixels)):
        words = text[sample] if text_mask is None else text[sample][text_mask[sample]]
        v, u = (functional.normalize(x, dim=-1) if normalize else x for x in (pixels[sample], words))
        score = scale * v @ u.T
        maps.append((score.softmax(-1) if softmax else score).max(-1).values)
    return torch.stack(maps).reshape(len(visual), *visual.shape[2:]) if visual.dim() == 4 else torch.stack(maps)


@on_cpu
def quantile(values: Tensor, q: float | Tensor, valid: Tensor | None = None, interpolation: str = "linear") -> Tensor:
    """`torch.quantile` of one row after the other; NaN for an empty one."""
    values = values if values.dtype == torch.float64 else values.float()
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    results = []
    for sample in range(len(values)):
        row = values[sample][valid[sample]]
        q_row = q[sample].to(values.dtype) if isinstance(q, Tensor) else q
        results.append(
            torch.quantile(row, q_row, interpolation=interpolation) if row.numel() else row.new_tensor(torch.nan)
        )
    return torch.stack(results)


@on_cpu
def resize(image: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return functional.interpolate(image[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


@on_cpu
def loss(
    logits: Tensor, target: Tensor, keep: Tensor, *, bce_weight: float = 1.0, dice_weight: float = 1.0,
    class_weight: tuple[float, float] | None = None, smooth: float = 1e-5,
) -> Tensor:
    """`[B]`, sample by sample over the pixels in `keep` only."""
    logits = logits[:, 0] if logits.dim() == 4 else logits
    negative, positive = class_weight or (1, 1)
    resized, losses = resize(logits, tuple(target.shape[1:]), align_corners=True), []
    for sample in range(len(logits)):
        z, y = resized[sample][keep[sample]], target[sample][keep[sample]].to(logits.dtype)
        if not z.numel():
            losses.append(resized[sample].sum() * 0)
            continue
        weight, p = negative * (1 - y) + positive * y, z.sigmoid()
        bce = functional.binary_cross_entropy_with_logits(z, y, weight, reduction="sum") / weight.sum()
        dice = 1 - (2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)
        losses.append(bce_weight * bce + dice_weight * dice)
    return torch.stack(losses)
