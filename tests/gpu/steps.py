"""One training step that uses every operator, and inputs for it."""

import torch
from helpers import coin, loss_inputs, normal
from torch import Tensor

from aml_kernels import aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile


def arguments(seed: int = 0, size=(48, 64), map=(12, 16), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    loss = loss_inputs(seed=seed, batch=4, logits=size, target=size, map=map, dtype=dtype, layouts=("contiguous",))
    mask = coin(seed + 12, 4, 6, share=0.7)
    mask[:, 0] = True
    return loss | {
        "low": normal(seed + 5, 4, size[0] // 4, size[1] // 4, dtype=dtype), "text_mask": mask,
        "visual": normal(seed + 10, 4, 24, *map, dtype=dtype), "text": normal(seed + 11, 4, 6, 24, dtype=dtype),
        "image": normal(seed + 6, 4, 3, *size, dtype=dtype),
    }


LEAVES = ("logits", "low", "visual", "text")


def step(backend: str, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Losses, statistics, blocks; the first is the loss of the step."""
    at = {"backend": backend}
    similarity = pixel_text_similarity(x["visual"], x["text"], x["text_mask"], **at)
    loss, stats = masked_loss(
        x["logits"], x["target"], x["similarity"], quantile=0.3, valid=x["valid"], map_valid=x["map_valid"],
        return_stats=True, **at,
    )
    fused = aml_loss(
        x["low"], x["target"], x["visual"], x["text"], x["text_mask"], quantile=0.3, protect_target=True, **at,
    )
    limit = sample_quantile(x["similarity"], 0.5, valid=x["map_valid"], **at)
    filtered, blocks = filter_regions(x["image"], x["similarity"], threshold=limit, block_size=8, seed=3, **at)
    return loss + fused + similarity.square().mean(), *stats, limit, filtered, blocks


def results(function, x: dict[str, Tensor]) -> list[Tensor]:
    """What `function` of a step returns, and the gradients of its loss."""
    x = x | {name: x[name].detach().requires_grad_() for name in LEAVES}
    outputs = function(x)
    gradients = torch.autograd.grad(outputs[0], [x[name] for name in LEAVES])
    return [tensor.detach() for tensor in (*outputs, *gradients)]
