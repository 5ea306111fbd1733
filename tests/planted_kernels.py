"""Triton kernels with the faults that ahead_of_time.py looks for."""

import torch
import triton
import triton.language as tl


@triton.jit
def doubles_kernel(x, out):
    i = tl.arange(0, 128)
    tl.store(out + i, (tl.load(x + i).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def spilling_kernel(x, out):
    """64 warps' worth of sums in one warp."""
    i = tl.arange(0, 128)
    x = tl.load(x + i[:, None] * 128 + i[None, :])
    total = x
    for _ in range(9):
        total = tl.dot(x, total, input_precision="ieee")
    tl.store(out + i[:, None] * 128 + i[None, :], total)


@triton.jit
def narrow_kernel(x, out):
    i = tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i * 3))


@triton.jit
def rounding_kernel(x, out):
    i = tl.arange(0, 64)
    x = tl.load(x + i[:, None] * 64 + i[None, :])
    tl.store(out + i[:, None] * 64 + i[None, :], tl.dot(x, x, input_precision="tf32"))


def call() -> None:
    x = torch.empty(1 << 20, device="meta")
    doubles_kernel[(1,)](x, x, num_warps=4)
    spilling_kernel[(1,)](x, x, num_warps=1)
    narrow_kernel[(1,)](x, x, num_warps=4)
    rounding_kernel[(1,)](x, x, num_warps=4)
