"""From tensors to what the kernels take.

The public functions have checked shapes and types; what is checked here again is what would otherwise read or write
outside a tensor, for callers of torch.ops.
"""

import torch
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = (*FLOATS, torch.uint8, torch.bool)


def as_bytes(mask: Tensor) -> Tensor:
    """The same memory; Triton has no type for a bool in memory."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def plane(tensor: Tensor | None) -> tuple:
    """`[B, rows, columns]` or `[B, 1, rows, columns]`: the tensor, strides of sample, row and column; rows, columns."""
    if tensor is None:
        return None, 0, 0, 0, 0, 0
    strides = tensor.stride()
    return as_bytes(tensor), strides[0], strides[-2], strides[-1], tensor.shape[-2], tensor.shape[-1]


def extent(tensor: Tensor) -> int:
    """The largest offset, in elements, within a sample `[..., rows, columns]`."""
    return (tensor.shape[-2] - 1) * tensor.stride(-2) + (tensor.shape[-1] - 1) * tensor.stride(-1)


def index_type(*largest: int) -> tl.dtype:
    """What to compute offsets within a sample in: int32 if these numbers fit, and a tile beyond, as nearly always."""
    return tl.int32 if max(largest) < 2**30 else tl.int64


def loss_index_type(*planes: Tensor | None) -> tl.dtype:
    """The same for planes that are resized to each other: for the fractions that are their coordinates, too."""
    given = [plane for plane in planes if plane is not None]
    side = max(size for plane in given for size in plane.shape[-2:])
    return index_type(2 * side * side, *map(extent, given))


def at_most(registers: int | None) -> dict[str, int]:
    """The option that has a thread use no more. AMD's compiler has none like it, and refuses one it does not know."""
    return {} if registers is None or torch.version.hip else {"maxnreg": registers}


def check(name: str, tensor: Tensor, types: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """A tensor of one of these types and this shape, in which None is any size but 0."""
    fits = tensor.dtype in types and tensor.dim() == len(shape) and all(
        size > 0 if expected is None else size == expected for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        accepted, given = (", ".join(str(t).removeprefix("torch.") for t in types), str(tensor.dtype)[6:])
        raise ValueError(f"{name}: expected [{expected}] in {accepted}, got {list(tensor.shape)} in {given}")


def check_loss(logits: Tensor, target: Tensor, similarity: Tensor | None, valid: Tensor | None) -> None:
    """What the forward and the backward of a loss have in common."""
    samples = logits.shape[0]
    check("logits", logits, FLOATS, (None, None, None) if logits.dim() != 4 else (None, 1, None, None))
    check("target", target, TARGETS, (samples, None, None))
    if similarity is not None:
        check("similarity", similarity, FLOATS, (samples, None, None))
    if valid is not None:
        check("valid", valid, (torch.bool,), tuple(target.shape))


def check_limit(
    map_name: str, similarity: Tensor | None, map_valid: Tensor | None, thresholds: Tensor | None,
    quantile: float | None, samples: int,
) -> None:
    """The map and what says which of its values count for the threshold, or the thresholds."""
    if quantile is not None:
        if similarity is None:
            raise ValueError(f"{map_name}: expected [B, h, w] where quantile is given, got None")
        if map_valid is not None:
            check("map_valid", map_valid, (torch.bool,), tuple(similarity.shape))
    if thresholds is not None:
        check("thresholds", thresholds, (torch.float32,), (samples,))
