"""Strided inputs and the rule that says what is accurate enough.

Numbers are drawn on the CPU, so that they are the same everywhere, and put on the default device: that of the back end
under test (`conftest.device`).
"""

import os

import textbook
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from aml_kernels import _backend
from aml_kernels.reference import resize_bilinear

FOR_GPUS = ("triton", "cuda")  #: back ends that cannot look at numbers, and take no fp64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS = ("contiguous", "transposed", "batch_last", "cut", "sliced")


def device_of(backend: str) -> str:
    """Where the tests of a back end have their tensors."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


def missing(backend: str) -> str | None:
    """Why a back end cannot be tested here."""
    device = device_of(backend)
    if device == "cuda" and not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return _backend.missing(backend, device)


def here(values):
    """`values` with its CPU tensors moved to the device of the back end under test."""
    return tree_map_only(Tensor, lambda x: x.to(torch.get_default_device()) if x.device.type == "cpu" else x, values)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return here(torch.randn(shape, generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype))


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return here(torch.rand(shape, generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype))


def coin(seed: int, *shape: int, share: float = 0.5) -> Tensor:
    """True with probability `share`."""
    return here(torch.rand(shape, generator=generator(seed), device="cpu") < share)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; the memory between them is poisoned."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "transposed" and tensor.dim() > 1:  # [B, C, h, w]: channels-last; [B, H, W]: column by column
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_last" and tensor.dim() > 1:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    step = 2 if layout == "sliced" else 1
    room = [size + 2 for size in tensor.shape[:-1]] + [step * tensor.shape[-1] + 3]
    poison = float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else True
    around = torch.full(room, poison, dtype=tensor.dtype, device=tensor.device)
    view = around[tuple(slice(1, size + 1) for size in tensor.shape[:-1])][..., 1 : step * tensor.shape[-1] + 1 : step]
    view.copy_(tensor)
    return view


def bits(tensor: Tensor) -> Tensor:
    """The memory of `tensor` as integers: equal exactly if every bit is."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str, ulps: int = 8) -> None:
    """No worse than twice the error of plain PyTorch, or than a few roundings, in the largest element and in L2.

    exact: computed in fp64 from the same input numbers; plain: by PyTorch, in fp32 from 16-bit inputs. A 16-bit
    `actual` may be rounded once, from a result of fp32 accuracy.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.isfinite().all(), f"{what}: not finite"
    rounding = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        floor = 8 * ulps * rounding  # the oracle has rounding errors of its own
    elif actual.dtype == torch.float32:
        floor = ulps * rounding
    else:
        floor = 0.51 * rounding + ulps * torch.finfo(torch.float32).eps
    actual, exact, plain = actual.double(), exact.double(), plain.double()
    for measure in (lambda x: x.abs().max(), lambda x: x.norm()):
        error, allowed = measure(actual - exact), max(2 * measure(plain - exact), floor * measure(exact))
        assert error <= allowed, f"{what}: error {error:.3g} of {measure(exact):.3g}, allowed {allowed:.3g}"


def assert_accurate_gradient(actual: Tensor, exact: Tensor, plain: Tensor, what: str, ulps: int = 16) -> None:
    """The same, and the direction: many small errors must not add up to a bias."""
    assert_accurate(actual, exact, plain, what, ulps)
    cosine = torch.nn.functional.cosine_similarity(actual.double().flatten(), exact.double().flatten(), dim=0)
    limit = 1e-9 if torch.finfo(actual.dtype).eps < 1e-5 else 1e-5
    if exact.any():
        assert cosine > 1 - limit, f"{what}: cosine {cosine:.12f}"


def loss_inputs(
    *, seed: int = 0, batch: int = 3, logits=(24, 33), target=(24, 33), map=(5, 7), dtype: torch.dtype = torch.float32,
    kind: str = "uint8", map_dtype: torch.dtype = torch.float32, layouts=("cut", "sliced", "batch_last", "transposed"),
) -> dict[str, Tensor]:
    """Arguments of `masked_loss`, each in another memory layout: logits, target, similarity, valid, map_valid."""
    label = coin(seed + 1, batch, *target, share=0.4)
    label = {
        "uint8": label.to(torch.uint8), "bool": label, "soft": uniform(seed + 1, batch, *target),
        "soft bf16": uniform(seed + 1, batch, *target, dtype=torch.bfloat16),
    }[kind]
    tensors = (
        3 * normal(seed, batch, *logits, dtype=dtype), label, normal(seed + 2, batch, *map, dtype=map_dtype),
        coin(seed + 3, batch, *target, share=0.8), coin(seed + 4, batch, *map, share=0.8),
    )
    names = ("logits", "target", "similarity", "valid", "map_valid")
    layouts = [layouts[i % len(layouts)] for i in range(len(names))]
    return {name: laid_out(tensor, layout) for name, tensor, layout in zip(names, tensors, layouts, strict=True)}


@textbook.on_cpu
def kept_pixels(
    logits: Tensor, target: Tensor, similarity: Tensor | None, *, quantile: float | None = None,
    threshold: float | Tensor | None = None, valid: Tensor | None = None, map_valid: Tensor | None = None,
    protect_target: bool = False, **_,
) -> Tensor:
    """The mask by its definition, in the precision in which it is defined."""
    keep = torch.ones(target.shape, dtype=torch.bool)
    if quantile is not None or threshold is not None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        similarity = similarity.detach().to(dtype)
        limit = textbook.quantile(similarity, quantile, map_valid) if threshold is None else torch.as_tensor(threshold)
        limit = limit.to(dtype).reshape(-1, 1, 1)
        keep = resize_bilinear(similarity, tuple(target.shape[1:]), align_corners=False) >= limit
        keep = keep | (target > 0.5) if protect_target else keep
    return keep if valid is None else keep & valid
