"""Calls of the Triton launchers that make them choose each of their kernels in each of its configurations.

The tensors have no memory ("meta"), so that they may be of any size and no GPU is needed. TRITON_INTERPRET must not be
set: see ahead_of_time.py.
"""

from collections.abc import Callable

import torch

from aml_kernels.triton.aml_loss import aml_loss
from aml_kernels.triton.masked_loss import masked_loss, masked_loss_backward
from aml_kernels.triton.quantile import sample_quantile
from aml_kernels.triton.region_filter import filter_regions
from aml_kernels.triton.similarity import pixel_text_similarity, pixel_text_similarity_backward

F32, BF16, F16, U8, BOOL = torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(
    logits=(480, 480), target=(480, 480), map_size=(15, 15), dtype=BF16, kind=U8, map_dtype=F32, valid=False,
    quantile=0.3, threshold=None, protect=True, batch=4, reduction=0,
):
    """A call of masked_loss and its backward."""
    z, y = meta(batch, *logits, dtype=dtype), meta(batch, *target, dtype=kind)
    similarity = meta(batch, *map_size, dtype=map_dtype) if map_size else None
    masks = (meta(batch, *target, dtype=BOOL), meta(batch, *map_size, dtype=BOOL)) if valid else (None, None)
    options = (protect, 1.0, 1.0, 0.9, 1.1, 1e-5, reduction)

    def call():
        result, sums, _ = masked_loss(
            z, y, similarity, *masks, None, threshold, quantile if map_size else None, True, *options,
        )
        masked_loss_backward(result, z, y, similarity, masks[0], sums, *options)

    return call


def similarity(size=(512, 16, 16), words=20, dtype=BF16, text_dtype=None, last=False, softmax=False, batch=4):
    """A call of pixel_text_similarity and its backward; `last`: the channels of a pixel lie next to each other."""
    visual = meta(batch, *size[1:], size[0], dtype=dtype).movedim(-1, 1) if last else meta(batch, *size, dtype=dtype)
    text, mask = meta(batch, words, size[0], dtype=text_dtype or dtype), meta(batch, words, dtype=BOOL)

    def call():
        result = pixel_text_similarity(visual, text, mask, True, 2.0, softmax)
        pixel_text_similarity_backward(result, visual, text, mask, True, 2.0, softmax)

    return call


def quantile(length, dtype=F32, valid=False, per_sample=False, interpolation=0, rank_in_fp64=True, batch=4):
    values, mask = meta(batch, length, dtype=dtype), meta(batch, length, dtype=BOOL) if valid else None
    q = meta(batch) if per_sample else None
    return lambda: sample_quantile(values, 0.3, q, mask, interpolation, rank_in_fp64)


def regions(dtype=F32, block_size=32, protect=True, batch=4, size=480):
    image, guard = meta(batch, 3, size, size, dtype=dtype), meta(batch, size, size, dtype=BOOL) if protect else None
    map_ = meta(batch, 15, 15)
    return lambda: filter_regions(image, map_, guard, None, None, 0.3, True, 0.25, block_size, [0.0, 1.0, 2.0], 5)


def fused(batch=4, size=(480, 480), cells=(30, 30), words=20):
    """A call of aml_loss as trained with, and its backward."""
    z, y = meta(batch, size[0] // 4, size[1] // 4, dtype=BF16), meta(batch, *size, dtype=U8)
    visual, text = meta(batch, 512, *cells, dtype=BF16), meta(batch, words, 512, dtype=BF16)
    options = (False, 1.0, 1.0, 1.0, 1.0, 1e-5, 0)

    def call():
        result, sums, _, map_ = aml_loss(
            z, y, visual, text, None, None, None, True, 1.0, False, None, None, 0.25, True, *options,
        )
        masked_loss_backward(result, z, y, map_, None, sums, *options)

    return call


CALLS: dict[str, Callable[[], object]] = {
    "loss bf16 uint8": loss(),
    "loss fp32 fp32 valid": loss(dtype=F32, kind=F32, valid=True),
    "loss fp16 bool none": loss(dtype=F16, kind=BOOL, map_size=None, reduction=2),
    "loss fp32 bf16 direct map": loss(dtype=F32, kind=BF16, map_size=(480, 480), map_dtype=BF16, protect=False),
    "loss quarter bf16 uint8": loss(logits=(120, 120)),
    "loss quarter fp32 fp32 valid": loss(logits=(120, 120), dtype=F32, kind=F32, valid=True, map_dtype=F16),
    "loss quarter fp16 bool threshold": loss(logits=(120, 120), dtype=F16, kind=BOOL, quantile=None, threshold=0.5),
    "loss odd": loss(logits=(119, 117), target=(479, 477), valid=True, reduction=1),
    "loss huge": loss(logits=(50_000, 50_000), target=(50_000, 50_000), batch=1),
    "loss huge resized": loss(logits=(50_000, 50_000), target=(60_000, 60_000), batch=1),
    "similarity bf16": similarity(),
    "similarity fp16 last softmax": similarity(dtype=F16, last=True, softmax=True),
    "similarity fp32": similarity(dtype=F32),
    "similarity mixed": similarity(dtype=BF16, text_dtype=F32, softmax=True),
    "similarity mixed last": similarity(dtype=F32, text_dtype=F16, last=True),
    "similarity odd fp32": similarity(size=(300, 15, 15), words=77, dtype=F32, softmax=True),
    "similarity odd": similarity(size=(300, 15, 15), words=77),
    "similarity huge": similarity(size=(2048, 1024, 1024), batch=1),
    "quantile short": quantile(196, valid=True, per_sample=True),
    "quantile short bf16": quantile(3600, dtype=BF16, interpolation=4, rank_in_fp64=False),
    "quantile of a map": quantile(480 * 480),
    "quantile of a map fp16 valid": quantile(120 * 120, dtype=F16, valid=True, per_sample=True, interpolation=1),
    "quantile long": quantile(1_000_000, interpolation=3),
    "quantile long fp16": quantile(3_000_000_000, dtype=F16, valid=True, batch=1),
    "regions fp32": regions(),
    "regions uint8 small blocks": regions(dtype=U8, block_size=1, protect=False),
    "regions bf16 large blocks": regions(dtype=BF16, block_size=200),
    "aml_loss": fused(),
}

#: Calls that have every kernel, with the fused loss as it is trained with and the types that take most registers.
REPRESENTATIVE = (
    "aml_loss", "loss fp32 fp32 valid", "similarity fp32", "quantile short bf16", "quantile long", "regions fp32",
)

#: For calls and kernels whose inputs are aligned: at least how many 128-bit loads, tensor core instructions and 64-bit
#: loads.
EXPECTED = {
    ("loss bf16 uint8", "masked_loss.forward_kernel"): (0, 0, 2),  # 4 logits of a thread: of the first row, of others
    ("loss bf16 uint8", "masked_loss_backward.backward_kernel"): (0, 0, 2),
    ("loss fp16 bool none", "masked_loss.forward_kernel"): (0, 0, 2),
    ("loss fp16 bool none", "masked_loss_backward.backward_kernel"): (0, 0, 2),
    ("loss fp32 fp32 valid", "masked_loss.forward_kernel"): (5, 0),  # also 4 targets; and one of the partial sums
    ("loss fp32 fp32 valid", "masked_loss_backward.backward_kernel"): (4, 0),
    ("loss fp32 bf16 direct map", "masked_loss.limits_kernel"): (4, 0),
    ("loss fp32 bf16 direct map", "masked_loss.forward_kernel"): (3, 0, 4),  # targets and cells are 64 bits
    ("loss fp32 bf16 direct map", "masked_loss_backward.backward_kernel"): (2, 0, 4),
    ("loss quarter fp32 fp32 valid", "masked_loss.forward_kernel"): (3, 0),  # 4 targets; the rest is gathered
    ("loss quarter fp32 fp32 valid", "masked_loss_gather.gather_kernel"): (2, 0),
    **{
        (call, f"{module}.{kernel}"): (1, products)
        for call, products in (("similarity bf16", 1), ("similarity fp16 last softmax", 1), ("similarity fp32", 0))
        for module, kernel in (("similarity", "similarity_kernel"), ("similarity_backward", "coefficients_kernel"))
    },
    ("similarity fp32", "similarity_backward.visual_kernel"): (8, 0),
    ("similarity fp32", "similarity_backward.words_kernel"): (2, 0),
    ("similarity odd", "similarity.similarity_kernel"): (0, 1),
    ("aml_loss", "similarity.similarity_kernel"): (0, 1),
    ("quantile short bf16", "quantile.quantile_kernel"): (4, 0),  # once for each digit
    ("quantile of a map", "quantile.quantile_kernel"): (4, 0),
    ("quantile long", "quantile.digits_kernel"): (1, 0),
    ("regions fp32", "region_filter.copy_kernel"): (1, 0),
    ("regions bf16 large blocks", "region_filter.copy_kernel"): (1, 0),
    ("planted", "planted_kernels.narrow_kernel"): (1, 0),
}

#: Calls that differ in what changes from batch to batch and must not be compiled for.
ALIKE = {
    "batches": [fused(batch=batch) for batch in (1, 2, 16, 33)],
    "numbers of words": [fused(words=words) for words in (20, 1, 77)],
    "multiples of 64": [
        fused(size=(512, 512), cells=(32, 32)), fused(size=(320, 640), cells=(16, 48)),
        fused(size=(192, 448), cells=(8, 112)),
    ],
    "multiples of 64, more cells": [fused(size=(512, 512), cells=(48, 48)), fused(size=(192, 448), cells=(64, 112))],
    "odd sizes": [
        loss(logits=size, target=size, map_size=cells, batch=batch)
        for size, cells, batch in (((479, 477), (15, 15), 8), ((333, 251), (21, 13), 1), ((35, 1001), (7, 9), 3))
    ],
    "short lengths": [quantile(length, batch=batch) for length, batch in ((196, 4), (300, 1), (1020, 9))],
    "lengths": [quantile(length, batch=batch) for length, batch in ((1028, 4), (3604, 1), (8188, 9))],
    "long lengths": [quantile(length, batch=batch) for length, batch in ((8196, 4), (14_404, 1), (230_404, 9))],
    "images": [regions(size=size, batch=batch) for size, batch in ((480, 4), (320, 1), (1024, 7))],
}
